"""Our engine and llama.cpp's, each in a process of its own, measured through the same methods."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import time
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import peak_bytes
from benchmarks.llama_cpp import BLOCK_BITS, model_file, tool
from server.core import GenerationRequest, SamplingParams
from server.errors import ServerError, StartupError

# A logit bias with which only these ids are drawn: whole pieces of text in every vocabulary. So no answer ends early,
# and the servers, which hold back ids that make no text yet, send each at once.
TEXT_ONLY = dict.fromkeys(range(300, 364), 100.0)


class Cost(NamedTuple):
    """What one token takes: bytes of weights read, and multiply-adds with them."""

    bytes: int
    macs: int


def random_ids(seed: str, length: int) -> list[int]:
    """Ids that every vocabulary has; other seeds share no prefix."""
    source = random.Random(seed)
    return [source.randrange(300, 1500) for _ in range(length)]


class OurEngine:
    """The engine in a process that only waits on a pipe between two measurements."""

    def __init__(self, server_options: list[str]):
        """``server_options`` as for ``python -m server``. Raises StartupError if the model cannot be loaded."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, server_options))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.cost = Cost(*self._receive())
        self._answer(random_ids("warm-up", 32), 4)

    def decode(self, context: int, count: int, seed: str) -> float:
        """Tokens/s of ``count`` steps behind ``context`` tokens; the first answer token belongs to the prompt."""
        stamps = self._answer(random_ids(seed, max(1, context)), count + 1)
        return count / (stamps[-1] - stamps[0])

    def read_prompt(self, length: int, seed: str) -> float:
        """Prompt tokens/s, up to and with the draw of the first answer token."""
        return length / self._answer(random_ids(seed, length), 1)[0]

    def peak(self) -> int:
        """Bytes resident at the peak, loading included."""
        return peak_bytes(self.pid)

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _answer(self, prompt_ids: list[int], new_tokens: int) -> list[float]:
        """Seconds from the start to each token."""
        self._pipe.send((prompt_ids, new_tokens))
        stamps = self._receive()
        if len(stamps) != new_tokens:
            raise StartupError(f"引擎只生成了 {len(stamps)} 个 token，应为 {new_tokens} 个。",
                               f"The engine made {len(stamps)} tokens instead of {new_tokens}.")
        return stamps

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise StartupError("引擎进程意外退出，原因见上面的输出。",
                               "The engine's process ended; its output above says why.") from None
        if kind == "failed":
            raise StartupError(*value)
        return value


def _work(pipe: Connection, server_options: list[str]) -> None:
    """What runs in our engine's process: answers one request after the other."""
    from benchmarks.stamps import drawn, note_tokens
    from server.assembly import build_engine, prepare
    from server.config import parse

    try:
        config = parse(server_options, env={})
        engine = build_engine(config, *prepare(config))
    except ServerError as error:
        pipe.send(("failed", (error.zh, error.en)))
        return
    note_tokens()
    pipe.send(("cost", weight_cost(engine._model.network)))
    while order := pipe.recv():
        begin, request_id = _submit(engine, *order)
        pipe.send(("stamps", [at - begin for at in drawn.pop(request_id, [])]))
    engine.close()


def _submit(engine: Any, prompt_ids: list[int], new_tokens: int) -> tuple[float, str]:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, logit_bias=TEXT_ONLY)
    begin = time.perf_counter()
    stream = engine.submit(GenerationRequest(prompt_ids=tuple(prompt_ids), params=params))
    *_, last = stream
    if last.error:
        raise last.error
    return begin, stream.request_id


def weight_cost(network: Any) -> Cost:
    """All weights of a torch network but its embedding, of which a token reads one row.

    Raises TypeError for a quantized layer whose weight is no dataclass of tensors: its bytes would be missing.
    """
    import torch

    size = macs = 0
    for module in network.modules():
        if hasattr(module, "num_embeddings"):
            continue
        packed = getattr(module, "weight", None)  # a quantized layer's has whatever layout the back end wants
        packed = None if isinstance(packed, torch.Tensor) else packed
        if not (packed is None or is_dataclass(packed)):
            raise TypeError(f"cannot count the bytes of {type(packed).__name__}")
        values = [getattr(packed, field.name) for field in fields(packed)] if packed else []
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False), *values]
        size += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        if hasattr(module, "in_features"):
            macs += module.in_features * module.out_features
    return Cost(size, macs)


class LlamaBench:
    """llama.cpp's engine, measured by its own llama-bench: a new process each time, so ``pid`` is None."""

    pid = None

    def __init__(self, folder: Path, checkpoint: Path, bits: int, threads: int):
        """``folder`` is ``llama_cpp.prepare``'s. Raises StartupError where something is missing in it."""
        self._command = [tool(folder, "llama-bench"), "-m", model_file(folder, bits), "-t", str(threads)]
        self._command += ["-r", "1", "-o", "json"]
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        self._embedding = config["padded_vocab_size"] * config["hidden_size"]
        self._bits = bits
        self._peak = 0
        self.cost = Cost(0, 0)  # known after the first measurement

    def decode(self, context: int, count: int, seed: str) -> float:
        """Tokens/s of ``count`` steps behind ``context`` tokens, all drawn by llama-bench."""
        return self._run("-p", "0", "-n", str(count), "-d", str(context))

    def read_prompt(self, length: int, seed: str) -> float:
        """Prompt tokens/s."""
        return self._run("-p", str(length), "-n", "0")

    def peak(self) -> int:
        """Bytes resident at the peak of any measurement so far."""
        return self._peak

    def close(self) -> None:
        """Nothing runs between measurements."""

    def _run(self, *options: str) -> float:
        process = subprocess.Popen([*self._command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while True:
            try:
                out, err = process.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                self._peak = max(self._peak, peak_bytes(process.pid))
        if process.returncode:
            last = err.decode(errors="replace").strip().splitlines()[-1:]
            raise StartupError(f"llama-bench 失败：{last}", f"llama-bench failed: {last}")
        (result,) = json.loads(out)
        self.cost = Cost(result["model_size"] - int(self._embedding * BLOCK_BITS[self._bits] / 8),
                         result["model_n_params"] - self._embedding)  # fmt: skip
        return result["avg_ts"]
