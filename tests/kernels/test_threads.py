"""The kernels' thread pool under load, alone and under ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from server.kernels import build

STRESS = Path(__file__).with_name("threads_stress.c")
SECONDS = 3


@pytest.mark.skipif(os.name == "nt", reason="the driver uses pthreads")
@pytest.mark.parametrize("flags", [["-O2"], ["-O1", "-g", "-fsanitize=thread"]], ids=["fast", "sanitized"])
def test_every_item_is_done_once(tmp_path, flags):
    compiler = build.find_compiler()
    if not compiler:
        pytest.skip("no C compiler")
    sources = [str(STRESS), str(build.SOURCES / "threads.c")]
    command = [*compiler, *flags, "-Wall", "-Wextra", "-Werror", f"-I{build.SOURCES}", *sources, "-o", "stress"]
    made = subprocess.run([*command, "-lpthread"], cwd=tmp_path, capture_output=True, text=True)
    if "-fsanitize=thread" in flags and made.returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert made.returncode == 0, made.stderr
    done = subprocess.run(["./stress", str(SECONDS)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run in this system's address space")
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
