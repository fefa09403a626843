"""Our server and llama-server over HTTP, with the same streaming clients."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import peak_bytes
from benchmarks.llama_cpp import model_file, tool
from benchmarks.peer_engines import TEXT_ONLY, random_ids
from server.errors import StartupError
from tests.functional.program import Program

LOADING = 1800  # seconds
ANSWERING = 3600


class Answer(NamedTuple):
    """Begin, first token and end, by perf_counter(); how many tokens were sent."""

    begin: float
    first: float
    end: float
    tokens: int


class Server(ABC):
    """One that runs; ``pid`` is its process."""

    path: str
    pid: int
    port: int

    @abstractmethod
    def body(self, prompt_ids: list[int], new_tokens: int) -> dict[str, Any]:
        """A streamed greedy answer of exactly ``new_tokens``."""

    @abstractmethod
    def tokens(self, event: dict[str, Any]) -> int:
        """How many tokens an event of the stream brings."""

    def ask(self, prompt_ids: list[int], new_tokens: int) -> Answer:
        """Read one answer. Raises StartupError for an HTTP error or an answer of another length."""
        body = json.dumps(self.body(prompt_ids, new_tokens))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWERING)
        begin = time.perf_counter()
        connection.request("POST", self.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise _failed(response.read().decode(errors="replace"))
        first, count = 0.0, 0
        for event in _events(response):
            count += self.tokens(event)
            first = first or (time.perf_counter() if count else 0.0)
        if count != new_tokens:
            raise _failed(f"{count} tokens instead of {new_tokens}")
        return Answer(begin, first, time.perf_counter(), count)

    def together(self, clients: int, prompt: int, new_tokens: int, seed: str) -> tuple[float, float]:
        """Tokens/s of all clients together, and the median seconds to their first tokens."""
        prompts = [random_ids(f"{seed} {client}", prompt) for client in range(clients)]
        start = threading.Barrier(clients)

        def read(prompt_ids: list[int]) -> Answer:
            start.wait()
            return self.ask(prompt_ids, new_tokens)

        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(read, prompts))
        seconds = max(answer.end for answer in answers) - min(answer.begin for answer in answers)
        return sum(answer.tokens for answer in answers) / seconds, statistics.median(a.first - a.begin for a in answers)

    def follow_up(self, history: int, prompt: int, seed: str) -> tuple[float, float, float]:
        """Seconds to the first token of a conversation's first round of ``history`` tokens and of its next round,
        ``prompt`` tokens more, and the second divided by the first."""
        talk = random_ids(seed, history)
        rounds = [self.ask(ids, 1) for ids in (talk, talk + random_ids(f"{seed} next", prompt))]
        first, following = (answer.first - answer.begin for answer in rounds)
        return first, following, following / first

    def peak(self) -> int:
        """Bytes resident at the peak, loading included."""
        return peak_bytes(self.pid)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def _failed(why: str) -> StartupError:
    return StartupError(f"服务器没有正常回答：{why}", f"The server did not answer as it should: {why}")


class OurServer(Server):
    path = "/v1/completions"

    def __init__(self, model: Path, server_options: list[str]):
        self._program = Program(*server_options, model=str(model), wait=False)
        try:
            self.port = int(self._program.wait_for(r"ready: http://127\.0\.0\.1:(\d+)", LOADING)[1])
        except AssertionError as error:
            self._program.stop()
            raise _failed(str(error)) from None
        self.pid = self._program.process.pid
        self.ask(random_ids("warm-up", 32), 4)

    def body(self, prompt_ids: list[int], new_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt_ids, "max_tokens": new_tokens, "stream": True, "temperature": 0,
                "logit_bias": TEXT_ONLY, "return_token_ids": True}  # fmt: skip

    def tokens(self, event: dict[str, Any]) -> int:
        return sum(len(choice["token_ids"]) for choice in event["choices"])

    def close(self) -> None:
        self._program.stop()


class LlamaServer(Server):
    path = "/completion"

    def __init__(self, folder: Path, bits: int, threads: int, slots: int, max_length: int):
        """``slots`` of ``max_length`` tokens each."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [tool(folder, "llama-server"), "-m", model_file(folder, bits), "-t", str(threads), "--no-webui"]
        command += ["-c", str(slots * max_length), "--parallel", str(slots), "--host", "127.0.0.1"]
        # no prompt comes twice here: without a cache of old ones it has less to do
        command += ["--port", str(self.port), "--cache-ram", "0"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.pid = self._process.pid
        self._wait()
        self.ask(random_ids("warm-up", 32), 4)

    def body(self, prompt_ids: list[int], new_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt_ids, "n_predict": new_tokens, "stream": True, "temperature": 0,
                "logit_bias": list(TEXT_ONLY.items()), "cache_prompt": False, "return_tokens": True}  # fmt: skip

    def tokens(self, event: dict[str, Any]) -> int:
        return 0 if event.get("stop") else len(event["tokens"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + LOADING
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                why = self._log.read().decode(errors="replace")[-2000:]
                self.close()
                raise _failed(why)
            time.sleep(0.2)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
