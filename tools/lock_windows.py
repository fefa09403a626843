"""Pin what requirements.txt means for the bundle's Python on Windows, with hashes: system/windows-lock.txt.

    python tools/lock_windows.py          (needs uv: tools/requirements.txt)

pip cannot do this on another system: it would leave out what only Windows needs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "system" / "windows-lock.txt"
EXTRAS = ("pip", "msvc-runtime")  # what the embeddable lacks: an installer, and DLLs that torch needs
HEADER = """\
# The packages of the Windows bundle (64 bit, Python 3.11), pinned with hashes: tools/lock_windows.py makes this from
# requirements.txt, setup_offline.bat installs from this, tools/build_bundle.py packs it.
"""


def main() -> int:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--generate-hashes", "--only-binary", ":all:", "--python-platform", "x86_64-pc-windows-msvc"]
    command += ["--python-version", "3.11", str(ROOT / "requirements.txt"), "-"]
    done = subprocess.run(command, input="\n".join(EXTRAS), capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        return 1
    LOCK.write_text(HEADER + done.stdout, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
