"""Complete folders of every generation behind HTTP: answers are those of the official prompt on an independent network.

The expected text is made with nothing of the server's: prompt and decoding by sentencepiece alone, the ids by
tools/plain_networks.py, greedily.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from server.engine.local import EngineSettings, LocalEngine
from server.kernels.torch_ops import TorchOps
from server.models.loader import load_model
from tests.functional.live import serve
from tests.functional.program import Program, parse_events
from tests.models.half_precision import plain_reference
from tests.models.reference import OWN, TOKENIZERS, complete_folder, load_reference

TOKENS = 20
# an answer must not hang on how a machine rounds
MARGIN = 3e-4
CODE = "# language: Python\ndef add(a, b):\n    return"
QUERIES = ("你好", "今天天气怎么样？")


class Official:
    """What the official code would answer with greedy decoding."""

    def __init__(self, name: str):
        reference = load_reference(OWN / name)
        self.family = reference.family.name
        self.network = plain_reference(reference)
        self.first = self.family == "chatglm"
        file = TOKENIZERS / ("ice_text.model" if self.first else "tokenizer.model")
        self.sp = SentencePieceProcessor(model_file=str(file))
        self.end = self.sp.piece_to_id("<eop>") if self.first else 2

    def prompt(self, query: str, history: list[list[str]]) -> list[int]:
        """build_prompt and the tokenizer's call; ChatGLM3: build_chat_input."""
        special = self.sp.get_piece_size()
        start = [special + 1, special + 3]  # [gMASK] sop
        if self.family == "chatglm3":
            user, assistant = special + 6, special + 7
            turns = [(role, text) for pair in history for role, text in zip((user, assistant), pair, strict=True)]
            messages = [[role, *self.sp.encode("\n"), *self.sp.encode(text)] for role, text in [*turns, (user, query)]]
            return [*start, *(i for message in messages for i in message), assistant]
        text = self._text(query, history)
        if self.first:
            named = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            ids = self.sp.encode(re.sub(" {2,80}", lambda blank: f"<|blank_{len(blank[0])}|>", named))
            return [*ids, self.sp.piece_to_id("[gMASK]"), self.sp.piece_to_id("<sop>")]
        return [*start, *self.sp.encode(text)]

    def _text(self, query: str, history: list[list[str]]) -> str:
        rounds = [*history, [query, ""]]
        if self.family == "codegeex2":
            return query if query.startswith("# language") else "\n".join(f"问：{q}\n答：{a}" for q, a in rounds)
        if self.first:
            told = "\n".join(f"[Round {i}]\n问：{q}\n答：{a}" for i, (q, a) in enumerate(rounds))
            return told if history else query
        return "\n\n".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}" for i, (q, a) in enumerate(rounds, start=1))

    @torch.inference_mode()
    def greedy(self, prompt: list[int]) -> list[int]:
        answer: list[int] = []
        while len(answer) < TOKENS and self.end not in answer:
            best = self.network(torch.tensor(prompt + answer))[-1].topk(2)
            assert best.values[0] - best.values[1] > MARGIN, "choose another question"
            answer.append(int(best.indices[0]))
        return answer

    def answer(self, query: str, history: list[list[str]]) -> str:
        prompt = self.prompt(query, history)
        ids = [i for i in self.greedy(prompt) if i != self.end]
        if query.startswith("# language"):  # the whole is decoded, and begins with the prompt
            whole = self.sp.decode([i for i in prompt if i < self.sp.get_piece_size()] + ids)
            assert whole.startswith(query)
            return whole.removeprefix(query)
        text = re.sub(r"<\|blank_(\d+)\|>", lambda blank: " " * int(blank[1]), self.sp.decode(ids))
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t").strip().replace("[[训练时间]]", "2023年")
        text = text.rstrip("\ufffd")  # stream_chat shows no half character, and this one was not finished
        assert self.family != "chatglm3" or "\n" not in text, "its first line would be a tool's name"
        return full_width(text) if self.first else text


def full_width(text: str) -> str:
    """process_response of ChatGLM-6B."""
    for mark, wide in zip(",!:;?", "，！：；？", strict=True):
        text = re.sub(rf"([\u4e00-\u9fff])\{mark}", rf"\1{wide}", text)
        text = re.sub(rf"\{mark}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


@cache
def official(name: str) -> Official:
    return Official(name)


def stream(port: int, query: str, history: list[list[str]]) -> list[str]:
    """The text so far of each event of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"query": query, "history": history, "stream": True, "temperature": 0, "max_tokens": TOKENS}
    connection.request("POST", "/generate", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    return [event["response"] for event in parse_events(response)]


def check(port: int, name: str, queries: tuple[str, ...] = QUERIES) -> None:
    """Questions at the same time, and one with a history."""
    first = official(name).answer(queries[0], [])
    asked = [*((query, []) for query in queries), (queries[-1], [[queries[0], first]])]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda question: stream(port, *question), asked))
    for (query, history), told in zip(asked, answers, strict=True):
        assert told[-1] == official(name).answer(query, history), (name, query, history)
        assert told[-1] and all(after.startswith(before) for before, after in itertools.pairwise(told))


@contextlib.contextmanager
def served(folder: Path, bits: int = 16, **adapter: Path):
    """The port of an engine on a folder, whose family is found by its files."""
    model = load_model(folder, dtype=torch.float32, device="cpu", bits=bits, ops=TorchOps(), **adapter)
    engine = LocalEngine(model, EngineSettings(max_length=256, slots=2, queue=4, prefill_chunk=16))
    with serve(engine) as port:
        yield port


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("small-chatglm", 16),
        ("small-chatglm-int8", 8),
        ("small-chatglm-int4", 4),
        ("small-chatglm-int4-qe", 4),
        ("small-chatglm2", 16),
        ("small-chatglm2-int4", 4),
        ("small-chatglm3", 16),
        ("small-chatglm3-with-ptuning", 16),
        ("small-codegeex2", 16),
    ],
)
def test_answers_are_the_official_ones(tmp_path, name, bits):
    with served(complete_folder(name, tmp_path), bits) as port:
        check(port, name)


@pytest.mark.parametrize("adapter", ["small-chatglm2-ptuning", "small-chatglm2-lora", "small-chatglm3-ptuning"])
def test_answers_with_an_adapter_are_the_official_ones(tmp_path, adapter):
    base, _, kind = adapter.rpartition("-")
    with served(complete_folder(base, tmp_path), **{kind: OWN / adapter}) as port:
        check(port, adapter)


def test_code_is_continued(tmp_path):
    with served(complete_folder("small-codegeex2", tmp_path)) as port:
        assert stream(port, CODE, [])[-1] == official("small-codegeex2").answer(CODE, [])


@pytest.mark.parametrize(
    ("name", "adapter", "option"),
    [("small-chatglm", "small-chatglm-ptuning", "--ptuning"), ("small-codegeex2", None, None)],
)
def test_the_real_program(tmp_path, name, adapter, option):
    folder = complete_folder(name, tmp_path)
    options = [option, str(OWN / adapter)] if adapter else []
    with Program("--dtype", "float32", "--quantize", "16", *options, model=str(folder)) as program:
        check(program.port, adapter or name)
