"""The server's port: free, our own server's, or somebody else's."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from typing import NamedTuple

from server.doctor.result import Complaint, Result, conclude, problem, warning
from server.profiles import Note
from server.running import SERVER, authority, near, server_name

_SECONDS = 4.0
_FORBIDDEN = (errno.EACCES, 10013)


class Port(NamedTuple):
    """``taken``: somebody answers on it; ``ours``: and is this program; ``error``: why it cannot be bound, if so."""

    host: str
    number: int
    taken: bool = False
    ours: bool = False
    silent: bool = False  # it takes connections and says nothing, as this program does while it loads a model
    holder: str = ""  # name and process id of who has it, where the system tells
    error: str = ""
    errno: int = 0


def look_at_port(host: str, number: int) -> Port:
    """Asks who is there, binds the port for a moment where nobody is."""
    if number == 0:
        return Port(host, 0)
    try:
        with socket.create_connection((near(host), number), timeout=_SECONDS):
            pass
    except (OSError, UnicodeError):  # UnicodeError: what can be no host's name
        return _bind(Port(host, number))
    name = server_name(host, number)
    return Port(host, number, taken=True, ours=name == SERVER, silent=name is None, holder=find_holder(number))


def _bind(port: Port) -> Port:
    try:
        family, kind, _, _, address = socket.getaddrinfo(port.host, port.number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            if os.name != "nt":  # there it would share the port instead of passing over one that is being closed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1)
    except UnicodeError as error:
        return port._replace(error=str(error))
    except OSError as error:
        return port._replace(error=error.strerror or str(error), errno=error.errno or 0,
                             holder=find_holder(port.number), taken=error.errno in (errno.EADDRINUSE, 10048))
    return port


def find_holder(number: int) -> str:
    """"program.exe, process 1234" of whoever listens on it; "" where the system does not tell."""
    try:
        import psutil

        held = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == number and c.status == "LISTEN"]
        pid = next((c.pid for c in held if c.pid), None)
        return f"{psutil.Process(pid).name()}, {pid}" if pid else ""
    except ImportError:
        return _ask_netstat(number) if sys.platform == "win32" else ""
    except Exception:  # psutil.AccessDenied, or the process has ended meanwhile
        return ""


def _ask_netstat(number: int) -> str:
    try:
        pid = parse_netstat(_run("netstat", "-ano", "-p", "TCP"), number)
        return f"{parse_tasklist(_run('tasklist', '/FI', f'PID eq {pid}', '/FO', 'CSV', '/NH'))}, {pid}" if pid else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, timeout=_SECONDS).stdout.decode(errors="replace")


def parse_netstat(output: str, number: int) -> int | None:
    """The process that listens, from ``netstat -ano``: its lines end alike in every language."""
    found = re.search(rf"^\s*TCP\s+\S+:{number}\s+\S+:0\s+\S+\s+(\d+)\s*$", output, re.MULTILINE)
    return int(found[1]) if found else None


def parse_tasklist(output: str) -> str:
    """The program's name from one row of ``tasklist /FO CSV /NH``."""
    found = re.match(r'\s*"([^"]+)"', output)
    return found[1] if found else "?"


def judge_port(port: Port) -> Result:
    where, who, facts = authority(port.host, port.number), port.holder or "?", port._asdict()
    if port.number == 0:
        return conclude(Note("任选一个空闲的", "any that is free"), facts=facts)
    if port.ours:
        url = f"http://{authority(near(port.host), port.number)}"
        return conclude(Note(f"{where}：本程序正在运行", f"{where}: this program is running"),
                        hint=Note(f"打开 {url}，不用再启动一次", f"open {url}; there is no need to start it again"),
                        facts=facts)  # fmt: skip
    complaint = _complaint(port, where, who)
    return conclude(None if complaint else Note(f"{where} 空闲", f"{where} is free"), [complaint] * bool(complaint),
                    facts=facts)  # fmt: skip


def _complaint(port: Port, where: str, who: str) -> Complaint | None:
    other = ("换一个端口启动，例如 --port 6000", "start with another port, --port 6000 say")
    if port.silent:
        return warning(f"{where} 有程序占用但不回答（{who}）",
                       f"{where} is held by a program that does not answer ({who})",
                       do=(f"如果是本程序正在加载模型，请等它；否则关掉它，或{other[0]}",
                           f"wait if it is this program, loading its model; else end it, or {other[1]}"))  # fmt: skip
    if port.taken:
        return problem(f"{where} 被别的程序占用（{who}）", f"{where} is held by another program ({who})",
                       do=(f"关掉它，或{other[0]}", f"end it, or {other[1]}"))  # fmt: skip
    if port.errno in _FORBIDDEN:
        return problem(f"{where} 被系统保留（{port.error}）", f"the system keeps {where} ({port.error})", do=other)
    if port.error:
        return problem(f"{where} 用不了（{port.error}）", f"{where} cannot be used ({port.error})",
                       do=("检查 --host 和 --port", "check --host and --port"))  # fmt: skip
    return None
