"""The types of values that options take: how each is read from text and what it says it allows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A type of value. ``cast(text, base)`` raises ValueError; ``zh`` and ``en`` say what is allowed."""

    cast: Callable[[str, Path], Any]
    metavar: str
    zh: str
    en: str
    bare: str | None = None  # what --name without a value means
    negated: str | None = None  # what --no-name means


def flag(name: str) -> str:
    """How the command line spells an option's name."""
    return "--" + name.replace("_", "-")


def variable(row: Field) -> str:
    """The environment variable of an option's row."""
    return row.metadata["env"] or "CHATGLM_" + row.name.upper()


def text(metavar: str, pattern: str, zh: str, en: str) -> Kind:
    def cast(value: str, base: Path) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Kind(cast, metavar, zh, en)


def choice(*values: str) -> Kind:
    return text("|".join(values), "|".join(values), "、".join(values), ", ".join(values))


def integer(low: int, high: int, *, auto: bool = False) -> Kind:
    def cast(value: str, base: Path) -> int | None:
        if auto and value == "auto":
            return None
        if not low <= int(value) <= high:
            raise ValueError
        return int(value)

    zh, en = f"{low} 到 {high} 的整数", f"a whole number from {low} to {high}"
    return Kind(cast, "N", zh + "，或 auto" * auto, en + " or auto" * auto)


def number(low: float, high: float) -> Kind:
    def cast(value: str, base: Path) -> float:
        if not low <= float(value) <= high:
            raise ValueError
        return float(value)

    return Kind(cast, "N", f"{low} 到 {high} 的数", f"a number from {low} to {high}")


def _cast_bits(value: str, base: Path) -> int | None:
    return {"4": 4, "8": 8, "16": 16, "0": 16, "auto": None}[value]


def _cast_device(value: str, base: Path) -> str:
    # ChatGLM-web-stream-demo's launcher took GPU numbers, 0 or 0,1, and -1 for the CPU
    value = "cpu" if value == "-1" else f"cuda:{value}" if value[:1].isdigit() else value
    if not re.fullmatch(r"auto|cpu|cuda(:\d+(,\d+)*)?", value):
        raise ValueError
    return value


def _cast_flag(value: str, base: Path) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[value.lower()]


def _cast_path(value: str, base: Path) -> Path | None:
    if not value:
        raise ValueError
    return None if value.lower() in ("none", "false") else base / Path(value).expanduser()


def _cast_model(value: str, base: Path) -> str | None:
    return None if value == "auto" else NAME.cast(value, base)


def _cast_origins(value: str, base: Path) -> tuple[str, ...]:
    origins = tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
    return () if origins == ("none",) else origins


def _cast_server(value: str, base: Path) -> str:
    """An address as users have it at hand: without http://, or with the /v1 that OpenAI's clients are given."""
    address = value if "://" in value else f"http://{value}"
    if not re.fullmatch(r"https?://[^\s/]\S*", address):
        raise ValueError
    return address.rstrip("/").removesuffix("/v1")


def _cast_url(value: str, base: Path) -> str | None:
    if value == "auto":
        return None
    if not re.fullmatch(r"https?://\S+", value):
        raise ValueError
    return value


def _cast_sources(value: str, base: Path) -> tuple[str, ...] | None:
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if names == ("auto",):
        return None
    address = r"https?://[^\s/]\S*"
    if not names or not all(re.fullmatch(rf"{'|'.join(SOURCE_NAMES)}|(modelscope=)?{address}", name) for name in names):
        raise ValueError
    return names


SOURCE_NAMES = ("modelscope", "hf-mirror", "huggingface")
BITS = Kind(_cast_bits, "4|8|16|0|auto", "4、8、16、0（即 16）、auto", "4, 8, 16, 0 (meaning 16), auto")
FLAG = Kind(_cast_flag, "", "true 或 false", "true or false", bare="true", negated="false")
FILE = Kind(_cast_path, "FILE", "文件名，或 none", "a file name or none")
FOLDER = Kind(_cast_path, "DIR", "文件夹，或 none", "a folder or none")
LOG = FILE._replace(metavar="PATH", negated="none")
ORIGINS = Kind(_cast_origins, "ORIGINS", "用逗号隔开的来源、* 或 none", "origins separated by commas, * or none")
URL = Kind(_cast_url, "URL|auto", "http:// 或 https:// 开头的网址，或 auto",
           "an address that starts with http:// or https://, or auto")
SERVER = Kind(_cast_server, "URL", "服务的地址，例如 http://127.0.0.1:5178",
              "a server's address, e.g. http://127.0.0.1:5178")
SOURCES = Kind(_cast_sources, "NAMES|URL|auto",
               "auto，或用逗号隔开的 modelscope、hf-mirror、huggingface、Hugging Face 镜像的网址、modelscope=网址",
               "auto, or some of modelscope, hf-mirror, huggingface, addresses of Hugging Face mirrors and "
               "modelscope=ADDRESS, separated by commas")
DEVICE = Kind(_cast_device, "auto|cpu|cuda|cuda:N", "auto、cpu（或 -1）、cuda、cuda:N（或 N，显卡的编号）",
              "auto, cpu (or -1), cuda, cuda:N (or N, a GPU's number)")
TEXT = text("TEXT", r"(?s).*", "文字", "a text")
NAME = text("NAME|DIR", r".*\S.*", "模型名或文件夹", "a model's name or a folder")
MODEL = Kind(_cast_model, "NAME|DIR|auto", "模型名、文件夹或 auto", "a model's name, a folder or auto")
HOST = text("ADDRESS", r"\S+", "网络地址", "a network address")
