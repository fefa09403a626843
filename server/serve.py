"""``python -m server serve``: puts the parts together, starts them, and stops them in order."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import ROOT, VERSION, Config
from server.core import Engine
from server.download import SENTENCE, ensure_model
from server.download.folder import locate
from server.errors import StartupError
from server.hardware import lan_addresses, probe
from server.profiles import LaunchProfile, ModelShape, choose
from server.spool.folder import SpoolFolder, open_folder
from server.spool.loop import Spool

if TYPE_CHECKING:
    from server.api.chatlog import ChatLog
    from server.engine.embedder import Embedder

log = logging.getLogger(__name__)

# running answers get this long to send their last event after Ctrl+C, the engine's last step included
_SHUTDOWN_SECONDS = 4.0


def serve(config: Config) -> int:
    """Run the server until Ctrl+C or SIGTERM; returns the exit code.

    Whatever can be wrong is found before the model is loaded, which may take minutes: raises StartupError for a log
    that cannot be written, a port in use, a model that is not there or does not fit.
    """
    from server.api.app import create_app
    from server.api.chatlog import open_chat_log
    from server.api.dialect import ApiSettings
    from server.api.wsgi import create_server

    say = speaker(config)
    locate(config.model, ROOT)
    locate(config.embedding_model, ROOT, SENTENCE)
    chat_log = open_chat_log(config.chat_log) if config.chat_log else None
    with _bind(config.host, config.port) as sock, _open_spool(config.spool) as files:
        folder, profile = prepare(config)
        print_choice(say, folder, profile)
        engine = build_engine(config, folder, profile)
        addresses = _addresses(sock)
        settings = ApiSettings(
            chat_log=chat_log,
            max_body_bytes=config.max_body * 2**20,
            cors_origins=config.cors if config.cors != ("*",) else "*",
            language=config.language,
            addresses=tuple(addresses),
            version=VERSION,
            glm_api_stream=config.glm_api_stream,
        )
        server = create_server(create_app(engine, settings), engine, settings, sock)
        told = _watch_signals()
        # in a thread of its own, so that the main thread can take signals on Windows too
        http = threading.Thread(target=server.run, name="http", daemon=True)
        http.start()
        _print_ready(say, addresses, config)
        spool_thread = None
        if files:
            run = _make_spool(say, files, engine, profile, config, chat_log).run
            spool_thread = threading.Thread(target=_run_until_told, args=(run, told), name="spool", daemon=True)
            spool_thread.start()
        if config.browser:
            webbrowser.open(addresses[0])
        while http.is_alive() and not told.wait(0.5):  # without a timeout Windows would not deliver Ctrl+C
            pass
        say("正在停止……", "stopping ...")
        told.set()
        if spool_thread:
            spool_thread.join(timeout=1)  # before the engine, which would end its answers
        _stop(server, engine, http)
    return 0


def spool(config: Config) -> int:
    """``python -m server spool``: answer request files until Ctrl+C, SIGTERM or quit.flag; returns the exit code."""
    from server.api.chatlog import open_chat_log

    say = speaker(config)
    locate(config.model, ROOT)
    chat_log = open_chat_log(config.chat_log) if config.chat_log else None
    with open_folder(config.spool or Path.cwd()) as files:
        folder, profile = prepare(config)
        print_choice(say, folder, profile)
        engine = build_engine(config, folder, profile)
        _make_spool(say, files, engine, profile, config, chat_log).run(_watch_signals())
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
        at_once=min(profile.slots, max(1, engine.capacity - 1)),  # leaves HTTP clients a place
        language=config.language,
        record=chat_log.record if chat_log else None,
    )


def _run_until_told(run: Callable[[threading.Event], None], told: threading.Event) -> None:
    """For a thread whose end, by a defect too, ends the program."""
    try:
        run(told)
    finally:
        told.set()


def prepare(config: Config) -> tuple[Path, LaunchProfile]:
    """The model's folder, downloaded if it is missing, and how to run it on this machine."""
    folder = ensure_model(config.model, endpoint=config.endpoint, language=config.language)
    return folder, choose(probe(ROOT), ModelShape.from_folder(folder), config)


def build_engine(config: Config, folder: Path, profile: LaunchProfile) -> Engine:
    """Load the model as the profile says, with a progress bar if it is a large one; torch is imported only now."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which the probe numbered the GPUs
    import torch

    from server.engine.local import EngineSettings, LocalEngine
    from server.kernels.torch_ops import TorchOps
    from server.models.loader import load_model

    torch.set_num_threads(profile.threads)
    with _progress_bar(config) as progress:
        model = load_model(
            folder,
            dtype=getattr(torch, profile.dtype),
            device=profile.device,
            bits=profile.bits,
            ops=TorchOps(),
            family=config.family,
            progress=progress,
        )
    settings = EngineSettings(profile.max_length, profile.slots, config.queue, profile.prefill_chunk)
    return LocalEngine(model, settings, build_embedder(config, threads=max(1, profile.threads // 2)))


def build_embedder(config: Config, threads: int) -> Embedder:
    """Looks for no model yet; that is done on first use."""
    from server.engine.embedder import Embedder

    def find() -> Path:
        folder = ensure_model(config.embedding_model, SENTENCE, endpoint=config.endpoint, language=config.language)
        _check_memory(folder)
        return folder

    name = locate(config.embedding_model, ROOT, SENTENCE).resolve().name
    return Embedder(name, find, threads=threads)


def _check_memory(folder: Path) -> None:
    """Refuse a sentence model that is too large: the system would end the whole program, chats and all."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    needed, free = sum(file.stat().st_size for file in files), probe(ROOT).ram_available
    if needed > free:
        size, left = f"{needed / 2**30:.1f} GiB", f"{free / 2**30:.1f} GiB"
        raise StartupError(
            f"内存不够：{folder} 要 {size}，只剩 {left}。请关掉别的程序。",
            f"Not enough memory: {folder} takes {size}, {left} is free. Close other programs.",
        )


@contextlib.contextmanager
def _progress_bar(config: Config):
    """A callback (done, total) in bytes that draws a bar on a terminal once loading has taken more than a second."""
    from tqdm import tqdm

    label = "正在加载模型" if config.language == "zh" else "loading the model"
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=label, delay=1, leave=False, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def speaker(config: Config) -> Callable[[str, str], None]:
    """Prints one of two sentences, by the user's language."""
    return lambda zh, en: print(zh if config.language == "zh" else en, flush=True)


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
        raise StartupError(
            f"不能在 {host} 的端口 {port} 上监听（{error.strerror}）：可能程序已经在运行，请关掉它，"
            "或用 --port 换一个端口。",
            f"Cannot listen on {host} port {port} ({error.strerror}): the program may be running already; stop it, or "
            "choose another port with --port.",
        ) from None
    return sock


def _addresses(sock: socket.socket) -> list[str]:
    """URLs under which the server can be reached, the local one first."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return [f"http://{address}:{port}" for address in ("127.0.0.1", *lan_addresses())]
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"]


def print_choice(say: Callable[[str, str], None], folder: Path, profile: LaunchProfile) -> None:
    """Which model runs, and how."""
    needs, length = f"{profile.needs / 2**30:.1f} GiB", profile.max_length
    say(f"模型：{folder}", f"model: {folder}")
    zh, en = ("不量化", "not quantized") if profile.bits == 16 else (f"int{profile.bits}", f"int{profile.bits}")
    say(
        f"档位：{profile.name}（{zh}，{profile.dtype}，设备 {profile.device}，约需内存 {needs}），"
        f"因为{profile.reason.zh}",
        f"profile: {profile.name} ({en}, {profile.dtype}, on {profile.device}, needs about {needs}): "
        f"{profile.reason.en}",
    )
    say(
        f"同时回答的请求数：{profile.slots}，每个最多 {length} token；CPU 线程数：{profile.threads}",
        f"requests at once: {profile.slots}, of at most {length} tokens each; CPU threads: {profile.threads}",
    )
    print_warnings(say, profile)


def print_warnings(say: Callable[[str, str], None], profile: LaunchProfile) -> None:
    """What the user may not expect of the profile."""
    for warning in profile.warnings:
        say(f"注意：{warning.zh}", f"note: {warning.en}")


def _print_ready(say: Callable[[str, str], None], addresses: list[str], config: Config) -> None:
    say(f"已就绪：{addresses[0]}", f"ready: {addresses[0]}")
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
