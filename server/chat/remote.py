"""Answers of a running server, through its POST /generate.

http.client and not a larger HTTP library: its socket can be shut down while another thread reads from it, which is
how an answer is interrupted, and it sends nothing for this machine or the local network through a proxy.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from server.core import FinishReason, GenerationRequest, RequestOutput
from server.errors import GenerationFailed, ServerError, StartupError, Unavailable

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # without any event; our own server repeats its last one every 1.5 s
_LONGEST = 131072  # tokens: more than any server allows, so that its own limit holds


class RemoteServer:
    """A server that speaks my-chatglm2's protocol; ``url`` may have a path, for one behind a reverse proxy.

    The sentences with which it refuses something come in ``language``.
    """

    def __init__(self, url: str, language: str):
        self.url = url.rstrip("/")
        self._headers = {"Accept-Language": language, "Accept": "application/json, text/event-stream"}

    def check(self) -> None:
        """Raises StartupError if nobody answers there, or somebody else does."""
        try:
            with contextlib.closing(self.connect()) as connection:
                response = self.exchange(connection, "GET", "/")
                if _json_object(_read(response)).get("success") is not True:
                    raise self.stranger()
        except ServerError as error:
            raise StartupError(error.zh, error.en, param="url") from None

    def submit(self, request: GenerationRequest) -> RemoteStream:
        """Start asking; whatever fails is told by the stream's last output."""
        return RemoteStream(self, request)

    def connect(self) -> http.client.HTTPConnection:
        """Raises Unavailable."""
        try:
            parts = urlsplit(self.url)
            secure = parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)
            connection.connect()
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: impossible host or port
            raise self._unreachable(error) from None
        return connection

    def exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, fields: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """Send a request; returns a response with status 200, of which the body is still to be read.

        Raises Unavailable, or what the server says.
        """
        body = fields and json.dumps(fields).encode()
        try:
            connection.request(method, urlsplit(self.url).path + path, body, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            said = _json_object(_read(response)).get("message")
        except (OSError, ValueError) as error:  # ValueError: impossible path
            raise self._unreachable(error) from None
        except http.client.HTTPException:
            raise self.stranger() from None
        raise ServerError(said, said) if isinstance(said, str) else self.stranger(response.status)

    def _unreachable(self, error: Exception) -> Unavailable:
        if isinstance(error, TimeoutError):
            return Unavailable(
                f"{self.url} 没有回应：请检查地址；如果那里的服务还在加载模型，请稍后再试。",
                f"{self.url} does not answer: check the address; if the server there is still loading its model, try "
                "again later.",
            )
        reason = getattr(error, "strerror", None) or error
        return Unavailable(
            f"连不上 {self.url}（{reason}）：请检查地址，以及那里的服务是否已经启动。",
            f"Cannot connect to {self.url} ({reason}): check the address and whether the server there is running.",
        )

    def stranger(self, status: int = 200) -> Unavailable:
        """The sentence for something that is no server of ours."""
        zh, en = (f"（HTTP {status}）", f" (HTTP {status})") if status != 200 else ("", "")
        return Unavailable(
            f"{self.url} 的回复{zh}不像是 ChatGLM 服务的：请检查地址。",
            f"What answers at {self.url}{en} does not seem to be a ChatGLM server: check the address.",
        )

    def broken(self) -> GenerationFailed:
        """The sentence for an answer whose rest does not come."""
        return GenerationFailed(
            f"回答到一半，与 {self.url} 的连接断了：请确认那里的服务还在运行，再问一次。",
            f"The connection to {self.url} broke in mid-answer: check that the server there is running and ask again.",
        )


class RemoteStream:
    """One answer. It is read in a thread of its own, so that waiting for it can end without ending it."""

    def __init__(self, server: RemoteServer, request: GenerationRequest):
        self._server = server
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._connection_socket: socket.socket | None = None
        self._closed = False
        threading.Thread(target=self._run, args=(_fields(request),), name="answer", daemon=True).start()

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        """See ``core.RequestStream``; token ids and counts are not known here."""
        with contextlib.suppress(queue.Empty):
            return self._outputs.get(timeout=timeout)
        return None

    def close(self) -> None:
        """Close the connection, whereupon the server stops generating."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._outputs.put(RequestOutput(finish_reason=FinishReason.ABORT))
            if self._connection_socket:
                # close() alone would not wake the thread that reads from it
                with contextlib.suppress(OSError):
                    self._connection_socket.shutdown(socket.SHUT_RDWR)

    def _run(self, fields: dict[str, Any]) -> None:
        try:
            with contextlib.closing(self._server.connect()) as connection:
                with self._lock:
                    if self._closed:
                        return
                    self._connection_socket = connection.sock
                connection.sock.settimeout(SILENCE_SECONDS)
                self._follow(self._server.exchange(connection, "POST", "/generate", fields))
            last = RequestOutput(finish_reason=FinishReason.STOP)
        except ServerError as error:
            last = RequestOutput(finish_reason=FinishReason.ERROR, error=error)
        except (OSError, http.client.HTTPException):
            last = RequestOutput(finish_reason=FinishReason.ERROR, error=self._server.broken())
        except Exception:  # events of a shape that is not ours; without a last output the reader would wait for ever
            last = RequestOutput(finish_reason=FinishReason.ERROR, error=self._server.stranger())
        self._outputs.put(last)

    def _follow(self, response: http.client.HTTPResponse) -> None:
        """Every event holds the whole answer so far."""
        shown = 0
        for line in _lines(response):
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                text = event["response"]
                if len(text) > shown:  # else the event only says that the server is still there
                    self._outputs.put(RequestOutput(text=text[shown:]))
                    shown = len(text)
                if event.get("success") is False:
                    raise GenerationFailed(event["message"], event["message"])


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Complete lines. Not ``for line in response``, which takes a chunked body that breaks off for a whole one."""
    rest = b""
    while data := response.read1(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _fields(request: GenerationRequest) -> dict[str, Any]:
    *past, query = [message.content for message in request.messages]
    return {
        "query": query,
        "history": list(zip(past[::2], past[1::2], strict=True)),
        "answer_prefix": request.answer_prefix,
        "stream": True,
        "temperature": request.params.temperature,
        "top_p": request.params.top_p,
        "max_length": request.params.max_length or _LONGEST,
    }


def _read(response: http.client.HTTPResponse) -> bytes:
    """The beginning of what should be a sentence, or nothing if it breaks off."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return response.read(1 << 16)
    return b""


def _json_object(data: bytes) -> dict[str, Any]:
    """What ``data`` holds, or nothing if it is no JSON object."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
