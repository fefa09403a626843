"""Proxies that break localhost, addresses, and the firewall."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from server.doctor.mask import without_password
from server.doctor.result import Complaint, Result, conclude, warning
from server.hardware import lan_addresses
from server.profiles import Note
from server.running import authority

LOCAL = ("127.0.0.1", "localhost")
_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443, "socks5": 1080}
_TEST_NETWORK = ("192.0.2.1", 9)  # of RFC 5737: nobody's


class Proxies(NamedTuple):
    """``urls``: protocol -> proxy; ``bypassed``: which of LOCAL go past it; ``dead``: proxies that take no connection.

    The same settings as those that requests, httpx and openai-python read: the environment, on Windows else the
    registry.
    """

    urls: Mapping[str, str]
    bypassed: tuple[str, ...]
    dead: tuple[str, ...] = ()


def read_proxies() -> Proxies:
    urls = {name: url for name, url in urllib.request.getproxies().items() if name != "no" and url}
    bypassed = tuple(host for host in LOCAL if urllib.request.proxy_bypass(host))
    dead = tuple(without_password(url) for url in dict.fromkeys(urls.values()) if not _answers(url))
    return Proxies({name: without_password(url) for name, url in urls.items()}, bypassed, dead)


def _answers(url: str) -> bool:
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        address = (parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80))
        with socket.create_connection(address, timeout=_SECONDS):
            return True
    except (OSError, ValueError, OverflowError):  # ValueError: no address at all
        return False


def judge_proxies(proxies: Proxies) -> Result:
    facts = proxies._asdict()
    if not proxies.urls:
        return conclude(Note("没有设置", "none is set"), facts=facts)
    shown = ", ".join(dict.fromkeys(proxies.urls.values()))
    complaints: list[Complaint] = []
    lost = [host for host in LOCAL if host not in proxies.bypassed]
    if lost and {"http", "all"} & set(proxies.urls):
        complaints.append(warning(f"发往 {'、'.join(lost)} 的请求也会走代理，客户端连不上本机的服务（常见报错 502）",
                                  f"requests to {', '.join(lost)} go to the proxy too, so clients do not reach the "
                                  "server on this machine (often error 502)",
                                  do=_bypass(sys.platform == "win32")))
    if proxies.dead:
        dead = ", ".join(proxies.dead)
        complaints.append(warning(f"{dead} 连不上，下载会失败", f"{dead} does not answer, so downloads fail",
                                  do=("打开代理软件，或在系统设置里关掉代理",
                                      "start the proxy's program, or switch the proxy off in the system's settings")))
    return conclude(Note(shown, shown), complaints, facts=facts)


def _bypass(windows: bool) -> tuple[str, str]:
    command = "setx NO_PROXY localhost,127.0.0.1" if windows else "export NO_PROXY=localhost,127.0.0.1"
    return (f"设置环境变量 NO_PROXY（命令：{command}），再重新打开客户端",
            f"set NO_PROXY ({command}), then start the clients again")  # fmt: skip


def find_addresses() -> list[str]:
    """IPv4 addresses in the local network; without psutil the one that the default route uses."""
    try:
        return lan_addresses()
    except Exception:  # it is not installed, or cannot read what it wants to
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(_TEST_NETWORK)  # sends nothing, only asks for the route
            except OSError:
                return []
            return [] if sock.getsockname()[0].startswith("127.") else [sock.getsockname()[0]]


def judge_lan(addresses: list[str], host: str, port: int, system: str = sys.platform) -> Result:
    """Whether others could reach the server: the firewall cannot be asked by everybody, so it is a hint."""
    facts = {"addresses": addresses, "host": host, "port": port}
    everywhere = host in ("0.0.0.0", "::")
    if not addresses:
        return conclude(Note("没有局域网地址（没有连网络）", "no address: not connected to a network"), facts=facts)
    shown = "，".join(addresses), ", ".join(addresses)
    there = authority(addresses[0], port) if port else addresses[0]  # 0: the system chooses at the start
    if host.startswith("127.") or host in ("localhost", "::1"):
        return conclude(Note(f"本机地址 {shown[0]}；服务只有本机能访问",
                             f"{shown[1]}; the server is for this machine alone"),
                        hint=Note(f"要让局域网里的机器访问 http://{there}，启动时加 --host 0.0.0.0",
                                  f"to let others open http://{there}, start with --host 0.0.0.0"),
                        facts=facts)  # fmt: skip
    url = f"http://{there if everywhere else authority(host, port)}"
    said = Note(f"局域网里访问 {url}（{shown[0]}）", f"others open {url} ({shown[1]})")
    return conclude(said, hint=_firewall(port, system), facts=facts)


def _firewall(port: int, system: str) -> Note:
    if system == "win32":
        rule = f"netsh advfirewall firewall add rule name=chatglm dir=in action=allow protocol=TCP localport={port}"
        return Note(f"别的机器打不开时：Windows 防火墙提示时选“允许”，或以管理员身份运行 {rule}",
                    'if others cannot open it: choose "Allow" when Windows Firewall asks, or run as administrator: '
                    + rule)
    return Note(f"别的机器打不开时检查防火墙，例如 sudo ufw allow {port}/tcp",
                f"if others cannot open it, look at the firewall, e.g. sudo ufw allow {port}/tcp")
