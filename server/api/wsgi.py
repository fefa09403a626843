"""waitress for our application: its settings, its own errors as JSON, and how to stop it."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from functools import partial
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.server import create_server as create_waitress
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error

from server.api.app import internal_error, language_of, too_large
from server.api.dialect import ApiSettings, to_json
from server.api.routing import dialect_for_path
from server.core import Engine
from server.errors import BadRequest, ServerError

# for /interrupt and the like (4) while every admitted answer and every request for embeddings (16) holds a thread
SPARE_THREADS = 20
SPARE_CONNECTIONS = 200  # idle keep-alive connections and requests that are refused
MAX_CONNECTIONS = 500  # Windows' select() takes 512 sockets
STALL_SECONDS = 60  # without taking anything of what there is for it, until a client is dropped
LINGER_SECONDS = 30
LINGER_BYTES = 1 << 30


def create_server(app: Flask, engine: Engine, settings: ApiSettings, sock: socket.socket) -> TcpWSGIServer:
    """A waitress server on a bound IPv4 or IPv6 socket; ``run()`` it, and ``stop()`` it from another thread."""
    server = create_waitress(
        app,
        sockets=[sock],
        threads=engine.capacity + SPARE_THREADS,
        channel_request_lookahead=1,  # else a client that leaves while its prompt is being read is never noticed
        connection_limit=min(engine.capacity + SPARE_CONNECTIONS, MAX_CONNECTIONS),
        max_request_body_size=settings.max_body_bytes + 65536,  # chunk headers are counted; the application is exact
        log_socket_errors=False,  # a client that resets its connection is no news
        ident="chatglm-portable",
    )
    server.channel_class = partial(_Channel, settings)
    # it tells of every client that leaves and of every request that waits a moment for a thread
    logging.getLogger("waitress").setLevel(logging.ERROR)
    return server


def stop(server: TcpWSGIServer, timeout: float = 5) -> None:
    """Wait up to ``timeout`` seconds for answers in hand, which the engine's close() ends, then make run() return."""
    server.task_dispatcher.shutdown(timeout=timeout)
    with contextlib.suppress(OSError):  # the loop may have done so, and closed the trigger, before it was written to
        server.trigger.pull_trigger(partial(wasyncore.close_all, server._map, ignore_all=True))


class _ErrorTask(ErrorTask):
    """A failure that waitress finds before the application sees the request, or one that escaped from it."""

    def execute(self) -> None:
        self.channel.refused = True
        settings = self.channel.settings
        language = language_of(self.request.headers.get("ACCEPT_LANGUAGE", ""), settings.language)
        error = self.request.error
        dialect = dialect_for_path(getattr(self.request, "path", ""))  # none if the request line was not understood
        body = to_json(dialect.error_body(_as_server_error(error, settings), language))
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [("Content-Type", "application/json; charset=utf-8")]
        if settings.cors_origins == "*":
            self.response_headers.append(("Access-Control-Allow-Origin", "*"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


def _as_server_error(error: Error, settings: ApiSettings) -> ServerError:
    if error.code == 413:
        return too_large(settings.max_body_bytes)
    if error.code == 431:
        return BadRequest("请求头过大。", "The request's headers are too large.")
    if error.body == "Bad URI":  # mostly: curl ".../generate?query=你好"
        return BadRequest(
            "网址里的中文等字符要经过 URL 编码，例如 curl -G --data-urlencode。",
            "Characters outside ASCII must be URL-encoded in an address, e.g. with curl -G --data-urlencode.",
        )
    if error.code < 500:
        return BadRequest(f"HTTP 请求有误：{error.body}。", f"The HTTP request is malformed: {error.body}.")
    if error.code == 501:
        return ServerError("不支持这种 Transfer-Encoding。", "This Transfer-Encoding is not supported.")
    return internal_error()


class _Task(WSGITask):
    def get_environment(self) -> dict[str, Any]:
        environ = super().get_environment()
        environ["chatglm.client_behind"] = self.channel.client_behind
        return environ


class _Channel(HTTPChannel):
    """Drops clients that have stopped reading, which waitress keeps for ever, with the thread that answers them.

    After a refusal it reads on for a while: closing with unread data resets the connection, and the answer is lost.
    waitress answers a body over its limit before the body has come, and closes.
    """

    task_class = _Task
    error_task_class = _ErrorTask
    stirred = (0.0, 0.0)  # last_activity when it was last seen to change, and the monotonic time then
    refused = False
    linger_until = 0.0
    linger_bytes = LINGER_BYTES

    def __init__(self, settings: ApiSettings, *args, **kwargs):
        self.settings = settings
        super().__init__(*args, **kwargs)

    def client_behind(self) -> bool:
        """Whether there is output that the client's side of the connection has no room for yet."""
        return self.total_outbufs_len > 0

    def writable(self) -> bool:
        # called on each turn of the loop, at least once a second
        now = time.monotonic()
        if not self.client_behind() or self.stirred[0] != self.last_activity:
            self.stirred = (self.last_activity, now)
        elif now - self.stirred[1] > STALL_SECONDS:
            # not here, where the loop is collecting the sockets to wait for; and will_close is heeded by none that is
            # not ready to be written to
            self.server.trigger.pull_trigger(self.handle_close)
        return super().writable()

    def received(self, data: bytes) -> bool:
        if not self.linger_until:
            return super().received(data)
        self.linger_bytes -= len(data)
        if self.linger_bytes < 0 or time.monotonic() > self.linger_until:
            self.handle_close()
        return False

    def handle_close(self) -> None:
        if self.refused and self.connected and not self.linger_until:
            self.linger_until = time.monotonic() + LINGER_SECONDS
            self.will_close = False
            try:
                self.socket.shutdown(socket.SHUT_WR)
                return
            except OSError:  # the client is gone already
                pass
        super().handle_close()
