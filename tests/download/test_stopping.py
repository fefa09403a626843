"""Stopping a download and seeing how far it is: kill -9, Ctrl+C at any moment, lines and bars."""

import os
import random
import re
import signal
import socket
import struct
import threading
import time

import pytest

from server.download import interrupts, progress
from tests.download.conftest import MODEL, NAME, SECOND, SHARDS, contents, folder_of, get, publish
from tests.download.test_command import run, start


def killed_in(program, hub, *argv) -> bytes:
    """What is there of SECOND after kill -9."""
    hub.stall[SECOND] = 2_200_000
    process = start(program, NAME, *argv)
    assert hub.stalled.wait(30)
    part = folder_of(program) / f"{SECOND}.part"
    end = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == 2_200_000):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.communicate()
    hub.stall.clear()
    return part.read_bytes()


def test_after_kill_9_another_source_goes_on(servers, program):
    one, other = servers(2)
    there = killed_in(program, one, "--source", one.url)
    assert there == SHARDS[SECOND][:2_200_000]
    code, out, _ = run(program, NAME, "--source", f"modelscope={other.url}")
    assert code == 0 and contents(folder_of(program)) == MODEL
    assert other.ranges() == [(SECOND, "bytes=2200000-")]
    assert "1 files, 1.3 MB to go" in out and "checking the 2.2 MB that are there" in out


def test_kill_9_at_any_moment(servers, program):
    """No file has a name that it does not deserve, and no byte that was written is asked for again."""
    (hub,) = servers(1)
    hub.rate = 5e6
    publish(program, SHARDS)
    kills, moments = int(os.environ.get("KILLS", "3")), random.Random(9)
    for _ in range(kills):
        sizes = {path.name: path.stat().st_size for path in folder_of(program).glob("*.bin.part")}
        before = len(hub.requests)
        process = start(program, NAME, "--source", hub.url)
        end = time.monotonic() + 20
        while len(hub.requests) == before and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2.5 / kills))
        process.kill()
        process.communicate()
        for name, content in contents(folder_of(program)).items() if folder_of(program).exists() else ():
            whole = MODEL[name.removesuffix(".part")]
            assert whole.startswith(content) if name.endswith(".part") else content == whole, name
        for name, asked in [(path.rpartition("/")[2], asked) for _, path, asked in hub.requests[before:]]:
            if size := sizes.get(f"{name}.part"):
                assert asked == f"bytes={size}-"
    code, _, err = run(program, NAME, "--source", hub.url)
    assert code == 0 and contents(folder_of(program)) == MODEL, err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process, which Windows cannot")
def test_ctrl_c_in_a_download(servers, program):
    (hub,) = servers(1)
    hub.stall[SECOND] = 2_200_000
    process = start(program, NAME, "--source", hub.url)
    assert hub.stalled.wait(30)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 4
    there = f"all that was downloaded stays in {folder_of(program)} (a file under way ends in .part)"
    assert err == f"Download interrupted: {there}, the next time it goes on from there.\n"
    left = contents(folder_of(program))
    assert SHARDS[SECOND].startswith(left.pop(f"{SECOND}.part"))
    assert left == {name: MODEL[name] for name in MODEL if name != SECOND}


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process, which Windows cannot")
def test_ctrl_c_while_nobody_answers(program):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        process = start(program, NAME, "--source", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Download interrupted" in err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process, which Windows cannot")
def test_no_ctrl_c_is_lost():
    """Objects that end at every moment would swallow an exception: what Python does with those in destructors."""

    class Ends:
        def __del__(self):
            sum(range(200))

    def work(stop: threading.Event) -> None:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        while not stop.is_set():
            for _ in range(100):
                Ends()

    before = signal.getsignal(signal.SIGINT)
    for _ in range(30):
        with pytest.raises(KeyboardInterrupt):
            interrupts.run(work)
    assert signal.getsignal(signal.SIGINT) is before


def test_results_and_failures_come_through():
    assert interrupts.run(lambda stop: 5) == 5
    with pytest.raises(ZeroDivisionError):
        interrupts.run(lambda stop: 1 / 0)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(interrupts.run(lambda stop: 6)))  # as the embedder does
    thread.start()
    thread.join()
    assert found == [6]


def test_lines_where_there_is_no_bar(servers, program, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.2)
    (hub,) = servers(1)
    hub.rate = 4e6
    get(program, hub.url)
    line = r"^  (\d\.\d) MB / 6\.6 MB \(\d+%\), \d\.\d MB/s, about \d+ s left$"
    lines = re.findall(line, capsys.readouterr().out, re.M)
    assert len(lines) > 2 and lines == sorted(lines)
    folder_of(program).rename(program / "away")
    get(program, hub.url, language="zh")
    assert re.search(r"MB/s，还要约 \d+ 秒$", capsys.readouterr().out, re.M)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
@pytest.mark.parametrize("columns", [80, 50])
def test_a_bar_in_a_terminal(columns, servers, program):
    import fcntl
    import pty
    import termios

    (hub,) = servers(1)
    hub.rate = 8e6
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with start(program, NAME, "--source", hub.url, stderr=writer) as process:
        os.close(writer)
        shown = b""
        while True:
            try:
                piece = os.read(reader, 4096)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=30) == 0
    os.close(reader)
    bars = re.findall(r"\d%\|[^\r\n]*M/6\.\d+M \[00:0\d<00:0\d, [^\r\n]*MB/s\]", shown.decode())
    assert bars and max(map(len, bars)) < columns


