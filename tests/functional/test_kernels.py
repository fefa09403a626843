"""The CPU kernels in the real program: used where they can be compiled, missed with a sentence where they cannot."""

import json
from dataclasses import replace

import pytest
import torch

from server.assembly import build_engine, prepare
from server.config import parse
from server.kernels.build import NoKernels, available
from server.kernels.cpu_ops import CpuOps
from tests.functional.program import Program

QUESTION = {"prompt": "你好", "temperature": 0}


def answer(program: Program) -> str:
    response = program.post("/", QUESTION)
    body = json.loads(response.read())
    assert response.status == 200, body
    return body["response"]


@pytest.mark.skipif(not available(), reason="no C compiler for the CPU kernels")
def test_int4_on_the_kernels_answers_as_the_whole_model():
    with Program("--device", "cpu") as plain, Program("--device", "cpu", "-q", "4") as quantized:
        assert answer(quantized) == answer(plain)
        assert "int4, float32" in quantized.text and "could not be compiled" not in quantized.text


def test_without_the_kernels_torch_keeps_its_threads(monkeypatch):
    def fails(self, threads):
        raise NoKernels("no compiler")

    monkeypatch.setattr(CpuOps, "__init__", fails)
    config = parse(["--model", "demo", "--device", "cpu", "-q", "4", "--threads", "2"], env={})
    folder, profile = prepare(config)
    before = torch.get_num_threads()
    try:
        engine = build_engine(config, folder, replace(profile, kernels=True, threads=2))
        assert torch.get_num_threads() == 2
        engine.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("language", "sentence"), [("en", "install a C compiler"), ("zh", "请安装 C 编译器")])
def test_a_compiler_that_fails_is_said_and_torch_computes(tmp_path, language, sentence):
    env = {"CC": str(tmp_path / "no such compiler"), "XDG_CACHE_HOME": str(tmp_path), "CHATGLM_LANG": language}
    with Program("--device", "cpu", "-q", "4", env=env, wait=False) as program:
        program.port = int(program.wait_for(r"http://127\.0\.0\.1:(\d+)")[1])
        assert answer(program)
        assert sentence in program.text and "Traceback" not in program.text
