"""How long a token takes from the engine to the client's socket, through waitress; median and 99th percentile.

    python -m benchmarks.wire --model demo          (every option of the server works)

Steps are slowed down to ``--step`` seconds, so that pacing (events at least 20 ms apart) does not hide the delay.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.stamps import drawn, note_tokens
from server.api.app import create_app
from server.api.dialect import ApiSettings
from server.api.wsgi import create_server, stop
from server.assembly import build_engine, prepare
from server.config import parse


def read_stream(port: int) -> tuple[str, list[float]]:
    """One streamed answer: its id, and when each event with new text arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate", json.dumps({"query": "讲个故事", "stream": True, "max_tokens": 40}))
    response = connection.getresponse()
    arrived, before = [], b'data: {"response": ""}\n'
    for line in response:
        if line.startswith(b"data: ") and line != before:
            arrived.append(time.perf_counter())
            before = line
    return response.headers["X-Request-Id"], arrived


def delays(request_id: str, arrived: list[float]) -> list[float]:
    """For each event, the time since the token before it."""
    return [at - max(drawn_at for drawn_at in drawn[request_id] if drawn_at <= at) for at in arrived]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.08, help="seconds per token")
    options, server_options = parser.parse_known_args()
    config = parse(server_options)
    engine = build_engine(config, *prepare(config))
    note_tokens(options.step)
    sock = socket.create_server(("127.0.0.1", 0))
    settings = ApiSettings()
    server = create_server(create_app(engine, settings), engine, settings, sock)
    threading.Thread(target=server.run, daemon=True).start()
    read_stream(sock.getsockname()[1])  # warm-up
    for clients in (1, 4):
        with ThreadPoolExecutor(clients) as pool:
            streams = list(pool.map(read_stream, [sock.getsockname()[1]] * clients))
        found = sorted(delay for stream in streams for delay in delays(*stream))
        worst = found[int(len(found) * 0.99)]
        print(f"{clients} clients, {len(found)} events: median {statistics.median(found) * 1e3:.1f} ms, "
              f"99% within {worst * 1e3:.1f} ms")  # fmt: skip
    engine.close()
    stop(server)


if __name__ == "__main__":
    main()
