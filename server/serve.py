"""``python -m server serve``: puts the parts together, starts them, and stops them in order."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.assembly import build_embedder, build_engine, prepare, print_choice, speaker
from server.config import ROOT, VERSION, Config
from server.core import Engine
from server.download import SENTENCE
from server.download.folder import DEFAULT_MODEL, locate
from server.errors import StartupError
from server.hardware import lan_addresses
from server.profiles import LaunchProfile
from server.running import authority, find_server
from server.spool.folder import SpoolFolder, open_folder
from server.spool.loop import Spool

if TYPE_CHECKING:
    from server.api.chatlog import ChatLog
    from server.api.dialect import ApiSettings

log = logging.getLogger(__name__)

# running answers get this long to send their last event after Ctrl+C, the engine's last step included
_SHUTDOWN_SECONDS = 4.0


class PortInUse(StartupError):
    """Something listens there already, or the system does not allow it."""


def serve(config: Config) -> int:
    """Run the server until Ctrl+C, SIGTERM or the spool's quit.flag; returns the exit code.

    Whatever can be wrong is found before the model is loaded, which may take minutes: raises StartupError for a log
    that cannot be written, a port in use, a model that is not there or does not fit. Where a browser is to show the
    page and the port is in use by this very program, its page is what there is to show.
    """
    from server.api.app import create_app
    from server.api.wsgi import create_server

    say = speaker(config)
    if config.spool:
        config = dataclasses.replace(config, queue=max(1, config.queue))  # a place for HTTP clients
    locate(config.model or DEFAULT_MODEL, ROOT)
    locate(config.embedding_model, ROOT, SENTENCE)
    chat_log = _open_chat_log(config)
    try:
        bound = _bind(config.host, config.port)
    except PortInUse:
        if not config.browser or not (address := find_server(config.host, config.port)):
            raise
        say(f"程序已经在运行，打开它的网页：{address}", f"the program runs already, opening its page: {address}")
        webbrowser.open(address)
        return 0
    with bound as sock, _open_spool(config.spool) as files:
        folder, profile = prepare(config)
        print_choice(say, config, folder, profile)
        engine = build_engine(config, folder, profile, build_embedder(config, profile.threads))
        settings = _api_settings(config, chat_log, sock)
        server = create_server(create_app(engine, settings), engine, settings, sock)
        told = _watch_signals()
        # in a thread of its own, so that the main thread can take signals on Windows too
        http = threading.Thread(target=server.run, name="http", daemon=True)
        http.start()
        spool = _make_spool(say, files, engine, profile, config, chat_log) if files else None
        _print_ready(say, settings.addresses, config)
        try:
            with _beside(spool, told):
                if config.browser:
                    webbrowser.open(settings.addresses[0])
                while http.is_alive() and not told.wait(0.5):  # without a timeout Windows would not deliver Ctrl+C
                    pass
                say("正在停止……", "stopping ...")
        finally:
            _stop(server, engine, http)
    return 0


def _api_settings(config: Config, chat_log: ChatLog | None, sock: socket.socket) -> ApiSettings:
    from server.api.dialect import ApiSettings

    return ApiSettings(
        chat_log=chat_log,
        max_body_bytes=config.max_body * 2**20,
        cors_origins=config.cors if config.cors != ("*",) else "*",
        language=config.language,
        addresses=tuple(_addresses(sock)),
        version=VERSION,
        glm_api_stream=config.glm_api_stream,
    )


def _open_chat_log(config: Config) -> ChatLog | None:
    from server.api.chatlog import open_chat_log

    return open_chat_log(config.chat_log) if config.chat_log else None


def spool(config: Config) -> int:
    """``python -m server spool``: answer request files until Ctrl+C, SIGTERM or quit.flag; returns the exit code."""
    say = speaker(config)
    locate(config.model or DEFAULT_MODEL, ROOT)
    chat_log = _open_chat_log(config)
    with open_folder(config.spool or Path.cwd()) as files:
        folder, profile = prepare(config)
        print_choice(say, config, folder, profile)
        engine = build_engine(config, folder, profile)
        _make_spool(say, files, engine, profile, config, chat_log).run(_watch_signals())
        say("正在停止……", "stopping ...")
        engine.close(timeout=_SHUTDOWN_SECONDS)
    return 0


def _open_spool(root: Path | None) -> contextlib.AbstractContextManager[SpoolFolder | None]:
    return open_folder(root) if root else contextlib.nullcontext()


def _make_spool(
    say: Callable[[str, str], None],
    files: SpoolFolder,
    engine: Engine,
    profile: LaunchProfile,
    config: Config,
    chat_log: ChatLog | None,
) -> Spool:
    from server.api.question_files import read_question

    say(f"处理文件夹里的请求：{files.requests}", f"answering the requests in {files.requests}")
    return Spool(
        files,
        engine,
        read_question,
        at_once=min(profile.slots, max(1, engine.capacity - 1)),  # leaves HTTP clients a place, where there are any
        language=config.language,
        record=chat_log.record if chat_log else None,
    )


@contextlib.contextmanager
def _beside(spool: Spool | None, told: threading.Event) -> Iterator[None]:
    """Run the spool in a thread whose end ends the program, and the program's end that thread; raises its failure."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            spool.run(told)
        except BaseException as error:
            failures.append(error)
        finally:
            told.set()

    thread = threading.Thread(target=run, name="spool", daemon=True)
    if spool:
        thread.start()
    yield
    told.set()
    if spool:
        thread.join(timeout=1)  # before the engine, which would end its answers
    if failures:
        raise failures[0]


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(
            f"不认识监听地址 {host}（{error.strerror}）：请检查 --host。",
            f"{host} is not an address to listen on ({error.strerror}): check --host.",
        ) from None
    # on Windows this option would let two programs share the port
    if os.name != "nt":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        if os.name != "nt":
            sock.listen(1)  # two sockets may be bound to a port, but only one can listen
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise StartupError(
                f"{host} 不是这台机器的地址：请检查 --host（127.0.0.1 只供本机，0.0.0.0 也供局域网）。",
                f"{host} is not an address of this machine: check --host (127.0.0.1 for this machine alone, 0.0.0.0 "
                "for others too).",
            ) from None
        raise PortInUse(
            f"不能在 {host} 的端口 {port} 上监听（{error.strerror}）：可能程序已经在运行或正在启动，请关掉它，"
            "或用 --port 换一个端口。",
            f"Cannot listen on {host} port {port} ({error.strerror}): the program may be running or starting already; "
            "stop it, or choose another port with --port.",
        ) from None
    return sock


def _addresses(sock: socket.socket) -> list[str]:
    """URLs under which the server can be reached, the local one first."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return [f"http://{address}:{port}" for address in ("127.0.0.1", *lan_addresses())]
    return [f"http://{authority(host, port)}"]


def _print_ready(say: Callable[[str, str], None], addresses: Sequence[str], config: Config) -> None:
    say(f"已就绪：{addresses[0]} （用浏览器打开就能聊天）", f"ready: {addresses[0]} (open it in a browser to chat)")
    for address in addresses[1:]:
        say(f"局域网：{address}", f"on the local network: {address}")
    if config.chat_log:
        say(
            f"问答记在 {config.chat_log}（--no-chat-log 关闭）",
            f"chats are kept in {config.chat_log} (--no-chat-log switches that off)",
        )
    port = addresses[0].rpartition(":")[2]
    if len(addresses) == 1 and config.host == "127.0.0.1" and (lan := lan_addresses()):
        say(
            f"只有本机能访问；要让局域网里的机器也能用，启动时加 --host 0.0.0.0，地址是 http://{lan[0]}:{port}",
            f"only this machine can reach it; for others start with --host 0.0.0.0: http://{lan[0]}:{port}",
        )
    say(
        f"接口说明：{addresses[0]}/docs；OpenAI 客户端用 {addresses[0]}/v1",
        f"all calls are described at {addresses[0]}/docs; for OpenAI's clients: {addresses[0]}/v1",
    )
    body = '{"query":"你好","stream":true}'
    # cmd.exe knows no single quotes
    quoted = '"' + body.replace('"', '\\"') + '"' if os.name == "nt" else f"'{body}'"
    say("试一试：", "try it:")
    print(f"  curl -N {addresses[0]}/generate -d {quoted}", flush=True)
    say("按 Ctrl+C 停止", "Ctrl+C stops it")


def _watch_signals() -> threading.Event:
    """Set by Ctrl+C, SIGTERM or the closing of a Windows console; a second signal ends the program at once."""
    told = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: os._exit(130) if told.is_set() else told.set())
    return told


def _stop(server, engine: Engine, http: threading.Thread) -> None:
    """The engine first, which ends the running answers; then the server, once they have been sent."""
    from server.api.wsgi import stop

    deadline = time.monotonic() + _SHUTDOWN_SECONDS
    engine.close(timeout=_SHUTDOWN_SECONDS / 2)
    stop(server, timeout=max(0.1, deadline - time.monotonic()))
    http.join(timeout=1)
