"""curl -N: events come one by one, as they are made."""

import json
import os
import shutil
import subprocess
import threading

import pytest

from tests.fake_engine import FakeEngine
from tests.functional.live import serve

WORDS = ("你", "好", "吗", "😀")
CURL = shutil.which("curl")
pytestmark = pytest.mark.skipif(not CURL, reason="no curl on this machine")

STREAMS = {
    "/generate": {"query": "q", "stream": True},
    "/stream": {"query": "q", "history": []},
    "/chat-stream": {"prompt": "q"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "q"}], "stream": True},
    "/v1/completions": {"prompt": "q", "stream": True},
}


def curl(port, path, *options) -> subprocess.Popen:
    command = [CURL, "-sSN", "--noproxy", "*", "--max-time", "30", f"http://127.0.0.1:{port}{path}", *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


@pytest.mark.parametrize("path", STREAMS)
def test_the_next_event_is_made_when_the_one_before_has_come(path):
    heard = [threading.Event() for _ in WORDS]
    script = [step for pair in zip(WORDS, heard, strict=True) for step in pair]
    with serve(FakeEngine(*script)) as port, curl(port, path, "-d", json.dumps(STREAMS[path])) as process:
        output = b""
        for word, event in zip(WORDS, heard, strict=True):
            while word.encode() not in output:
                more = os.read(process.stdout.fileno(), 65536)
                assert more, output
                output += more
            event.set()
        process.stdin.close()
        output += process.stdout.read()
    assert process.returncode == 0 and output.endswith(b"\n\n")


def test_a_large_body_which_curl_asks_leave_to_send():
    history = [["问" * 1_000_000, "答"]]
    engine = FakeEngine("好")
    with serve(engine) as port, curl(port, "/generate", "--data-binary", "@-") as process:
        output, _ = process.communicate(json.dumps({"query": "q", "history": history}, ensure_ascii=False).encode())
    assert (process.returncode, output) == (0, "好".encode())
    assert engine.requests[0].messages[0].content == history[0][0]
