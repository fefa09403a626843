"""A question that comes as files: what their bytes say, by the rules for an HTTP request's fields."""

from __future__ import annotations

import codecs
import re

from pydantic import Field

from server.api.fields import Fields, History, Text, conversation, decode_text, validate
from server.core import Message
from server.errors import BadRequest


class QuestionFields(Fields):
    query: Text = Field(description="the question")
    history: History = Field([], description="earlier rounds, [[question, answer], ...]")


def read_question(request: bytes, history: bytes) -> tuple[Message, ...]:
    """The messages of a question's text and its history's JSON, b"" for none; raises BadRequest for what is neither.

    Line ends behind the question are those of ``echo``. A history of two quotes is what cmd.exe makes of ``echo ''``.
    """
    query = _text(request, "请求文件", "The request file").rstrip()
    if not query:
        raise BadRequest("请求文件是空的：请把问题写进去。", "The request file is empty: write the question into it.")
    past = _text(history, "历史文件", "The history file").strip()
    fields = {"query": query, "history": [] if re.fullmatch(r"''|\"\"|", past) else past}
    question = validate(QuestionFields, fields)
    return conversation(question.history, question.query)


def _text(data: bytes, zh: str, en: str) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what > makes in Windows PowerShell
    try:
        text = data.decode("utf-16") if utf16 else decode_text(data)
    except (UnicodeDecodeError, BadRequest):
        text = "\0"
    if "\0" in text:
        raise BadRequest(f"{zh}不是文本：请存为 UTF-8。", f"{en} is not text: save it as UTF-8.")
    return text
