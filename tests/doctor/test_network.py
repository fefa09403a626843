"""Ports, proxies and addresses: with real sockets, real servers, and Windows' words as text."""

import errno
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest

from server import running
from server.doctor import network
from server.doctor.network import Proxies, find_addresses, judge_lan, judge_proxies, read_proxies
from server.doctor.port import Port, judge_port, look_at_port, parse_netstat, parse_tasklist
from server.doctor.result import State
from tests.fake_engine import FakeEngine
from tests.functional.live import serve

HERE = "127.0.0.1"


def free_port():
    with socket.create_server((HERE, 0)) as taken:
        return taken.getsockname()[1]


def test_a_free_port_stays_free():
    number = free_port()
    for host in (HERE, "0.0.0.0"):
        found = look_at_port(host, number)
        assert found == Port(host, number)
        assert judge_port(found).state is State.OK and "is free" in judge_port(found).finding.en
    socket.create_server((HERE, number)).close()


def test_our_own_server_is_known():
    with serve(FakeEngine()) as number:
        for host in (HERE, "0.0.0.0", "localhost"):
            found = look_at_port(host, number)
            assert found.taken and found.ours
            result = judge_port(found)
            assert result.state is State.OK and "this program is running" in result.finding.en
    assert f"open http://{HERE}:{number}" in judge_port(Port("0.0.0.0", number, True, True)).advice.en
    for host in ("::", "::1"):
        result = judge_port(Port(host, number, True, True))
        assert f"open http://[::1]:{number};" in result.advice.en and f"[{host}]:{number}" in result.finding.en


def test_somebody_elses_server_is_named():
    code = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); " \
           "print(s.server_port, flush=True); s.serve_forever()"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        found = look_at_port(HERE, int(other.stdout.readline()))
        assert found.taken and not found.ours and not found.silent
        assert found.holder.endswith(f", {other.pid}") and "python" in found.holder
        result = judge_port(found)
        assert result.state is State.PROBLEM and found.holder in result.finding.zh
        assert "another port" in result.advice.en
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_one_that_is_silent_may_be_loading_a_model(monkeypatch):
    monkeypatch.setattr(running, "_SECONDS", 0.3)
    with socket.create_server((HERE, 0)) as silent:
        result = judge_port(look_at_port(HERE, silent.getsockname()[1]))
    assert result.state is State.WARNING and "loading its model" in result.advice.en


def test_one_that_speaks_another_protocol():
    with socket.create_server((HERE, 0)) as other:
        def answer():
            connection, _ = other.accept()  # the first look, which says nothing
            connection.close()
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        found = look_at_port(HERE, other.getsockname()[1])
    assert found.taken and not found.ours and not found.silent


def test_a_port_that_is_bound_and_not_listened_on():
    """As a server does on Windows before its model is loaded."""
    with socket.socket() as held:
        held.bind((HERE, 0))
        held.listen(0) if os.name == "nt" else None
        found = look_at_port(HERE, held.getsockname()[1])
    assert found.taken and judge_port(found).state is State.PROBLEM


def test_an_address_that_is_not_ours():
    result = judge_port(look_at_port("192.0.2.77", free_port()))
    assert result.state is State.PROBLEM and "--host" in result.advice.en


@pytest.mark.parametrize("code", [errno.EACCES, 10013])
def test_a_port_that_windows_keeps_for_itself(code):
    result = judge_port(Port(HERE, 5178, error="An attempt was made ...", errno=code))
    assert result.state is State.PROBLEM and "the system keeps" in result.finding.en


def test_any_port():
    assert judge_port(look_at_port(HERE, 0)).state is State.OK


NETSTAT = """
活动连接

  协议  本地地址          外部地址        状态           PID
  TCP    0.0.0.0:135            0.0.0.0:0              LISTENING       1044
  TCP    127.0.0.1:51789        0.0.0.0:0              LISTENING       7
  TCP    127.0.0.1:5178         127.0.0.1:50000        ESTABLISHED     8
  TCP    127.0.0.1:5178         0.0.0.0:0              LISTENING       9320
"""


def test_windows_tells_who_holds_a_port():
    assert parse_netstat(NETSTAT, 5178) == 9320
    assert parse_netstat(NETSTAT, 80) is None
    assert parse_tasklist('"python.exe","9320","Console","1","812,345 K"\r\n') == "python.exe"
    assert parse_tasklist("信息: 没有运行的任务匹配指定标准。") == "?"


# proxies


@pytest.fixture
def proxies(monkeypatch):
    for name in ("http", "https", "all", "no", "ftp"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)

    def make(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return read_proxies()

    return make


def test_no_proxy(proxies):
    assert judge_proxies(proxies()).state is State.OK


def test_a_proxy_that_takes_localhost_too(proxies):
    with socket.create_server((HERE, 0)) as clash:
        found = proxies(HTTP_PROXY=f"http://me:geheim@127.0.0.1:{clash.getsockname()[1]}")
    result = judge_proxies(found)
    assert result.state is State.WARNING and "127.0.0.1, localhost" in result.finding.en
    assert "NO_PROXY" in result.advice.en and "NO_PROXY" in result.advice.zh
    assert "geheim" not in repr(result) and not found.dead


@pytest.mark.parametrize("bypass", ["localhost,127.0.0.1", "*", "127.0.0.1, localhost, .local"])
def test_a_proxy_that_leaves_localhost_alone(proxies, bypass):
    with socket.create_server((HERE, 0)) as clash:
        found = proxies(HTTP_PROXY=f"http://127.0.0.1:{clash.getsockname()[1]}", NO_PROXY=bypass)
    assert judge_proxies(found).state is State.OK, found


def test_only_one_spelling_of_localhost_goes_past_the_proxy(proxies):
    with socket.create_server((HERE, 0)) as clash:
        found = proxies(HTTP_PROXY=f"http://127.0.0.1:{clash.getsockname()[1]}", NO_PROXY="localhost")
    assert found.bypassed == ("localhost",)
    assert "requests to 127.0.0.1 go" in judge_proxies(found).finding.en


def test_a_proxy_for_https_alone_does_not_take_localhost(proxies):
    with socket.create_server((HERE, 0)) as clash:
        assert judge_proxies(proxies(HTTPS_PROXY=f"http://127.0.0.1:{clash.getsockname()[1]}")).state is State.OK


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "127.0.0.1:{}", "socks5://127.0.0.1:{}", "http://[bad:{}"])
def test_a_proxy_that_is_gone(proxies, address):
    url = address.format(free_port())
    result = judge_proxies(proxies(HTTPS_PROXY=url))
    assert result.state is State.WARNING and f"{url} does not answer" in result.finding.en


def test_proxies_of_windows_registry():
    """<local> covers names without dots, and so not 127.0.0.1."""
    result = judge_proxies(Proxies({"http": "http://127.0.0.1:7890"}, ("localhost",)))
    assert result.state is State.WARNING and "127.0.0.1" in result.finding.zh


# addresses


def test_addresses_without_psutil(monkeypatch):
    def missing():
        raise ImportError("psutil")

    monkeypatch.setattr(network, "lan_addresses", missing)
    found = find_addresses()
    assert len(found) <= 1 and all(len(address.split(".")) == 4 and address[:4] != "127." for address in found)


@pytest.mark.parametrize(
    ("host", "system", "said", "hint"),
    [
        (HERE, "win32", "for this machine alone", "--host 0.0.0.0"),
        ("localhost", "linux", "for this machine alone", "http://192.168.1.5:6000"),
        ("0.0.0.0", "win32", "http://192.168.1.5:6000", "netsh advfirewall"),
        ("0.0.0.0", "linux", "http://192.168.1.5:6000", "ufw allow 6000/tcp"),
    ],
)
def test_local_network(host, system, said, hint):
    result = judge_lan(["192.168.1.5", "10.0.0.2"], host, 6000, system)
    assert result.state is State.OK and said in result.finding.en and hint in result.advice.en
    assert hint in result.advice.zh


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://192.168.1.5:6000 "), ("::", "http://192.168.1.5:6000 "), ("10.0.0.2", "http://10.0.0.2:6000 "),
     ("fd00::2", "http://[fd00::2]:6000 ")],
)  # fmt: skip
def test_the_address_that_others_open(host, url):
    assert url in judge_lan(["192.168.1.5", "10.0.0.2"], host, 6000).finding.en
    assert "http://192.168.1.5," in judge_lan(["192.168.1.5"], HERE, 0).advice.en


def test_a_host_that_can_be_none():
    result = judge_port(look_at_port("a" * 70 + ".b", 5178))
    assert result.state is State.PROBLEM and "--host" in result.advice.en


@pytest.mark.parametrize("url", ["me:geheim@127.0.0.1:{}", "http://me:ge@he/im@127.0.0.1:{}"])
def test_passwords_are_not_shown(proxies, url):
    found = proxies(HTTP_PROXY=url.format(free_port()))
    assert "ge" not in repr(found) and found.dead


def test_a_proxy_of_several_protocols_is_asked_once(proxies, monkeypatch):
    asked = []
    monkeypatch.setattr(network, "_answers", asked.append)
    proxies(HTTP_PROXY="http://h:1", HTTPS_PROXY="http://h:1", ALL_PROXY="http://h:1")
    assert asked == ["http://h:1"]


def test_no_network():
    assert "not connected" in judge_lan([], "0.0.0.0", 1).finding.en


def test_a_server_that_answers_with_an_error_page_is_not_ours():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(500)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer((HERE, 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        found = look_at_port(HERE, other.server_port)
        other.shutdown()
    assert found.taken and not found.ours and not found.silent
