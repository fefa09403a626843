"""Servers with a model of a few megabytes, and a program that loses its patience sooner."""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.download import Origin, ensure_model, manifest, web
from tests.hub_server import Hub

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
_random = random.Random(6)
SHARDS = {FIRST: _random.randbytes(3_000_000), SECOND: _random.randbytes(3_500_000)}
MODEL = {
    "config.json": b'{"num_layers": 28}',
    "tokenizer.model": _random.randbytes(50_000),
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode(),
    **SHARDS,
}
NAME, REPOSITORY, ON_MODELSCOPE = "chatglm2-6b", "THUDM/chatglm2-6b", "ZhipuAI/chatglm2-6b"
NOWHERE = "http://127.0.0.1:9"
QUICK = web.Patience(connect=2, silence=0.6, window=0.8, slowest=100_000, probe=1, grace=2, retries=(0.05, 0.1),
                     longest=3)  # fmt: skip


@pytest.fixture(autouse=True)
def program(monkeypatch, tmp_path) -> Path:
    """Root of a program that knows no model; nothing of this machine's environment comes in."""
    for variable in os.environ:
        if variable.startswith(("HF_", "CHATGLM_")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(web, "PATIENCE", QUICK)
    monkeypatch.setattr(manifest, "MANIFEST", tmp_path / "manifest.json")
    publish(tmp_path, {})
    return tmp_path


def publish(root: Path, files: dict[str, bytes], name: str = NAME, *, sized: bool = True) -> None:
    """Make the program know files of a model."""
    known = {file: {"size": len(content) if sized else None, "sha256": sha256(content)}
             for file, content in files.items()}  # fmt: skip
    (root / "manifest.json").write_text(json.dumps({name: known}))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def servers() -> Iterator:
    """Starts hubs that have the model: the first is the fastest by far, each next one is slower."""
    with ExitStack() as stack:

        def start(number: int) -> list[Hub]:
            hubs = [stack.enter_context(Hub({REPOSITORY: MODEL, ON_MODELSCOPE: MODEL})) for _ in range(number)]
            for hub, rate in zip(hubs, (None, 20e6, 8e6), strict=False):
                hub.rate = rate
            return hubs

        yield start


def get(root: Path, *sources: str, name: str = NAME, thorough: bool = False, language: str = "en") -> Path:
    return ensure_model(name, origin=Origin(sources), root=root, language=language, thorough=thorough)


def folder_of(root: Path) -> Path:
    return root / "THUDM" / NAME


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
