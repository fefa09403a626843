"""What the checks make of facts: those of Windows too, which this machine need not be."""

import sys
import tempfile
from pathlib import PurePosixPath, PureWindowsPath

import pytest

from server.doctor.host import (
    PythonFacts,
    System,
    judge_packages,
    judge_python,
    judge_system,
    satisfies,
    wanted_packages,
)
from server.doctor.place import DEEPEST, Disk, Place, judge_disk, judge_place, read_place
from tests.conftest import ROOT
from tests.doctor.judged import GIB, OK, PROBLEM, WARNING, judged

# system and Python

WINDOWS_10 = System("win32", "Windows 10", "AMD64", (10, 0, 19045))
DEBIAN = System("linux", "Debian GNU/Linux 12", "x86_64", libc=(2, 36))


@pytest.mark.parametrize(
    ("system", "state", "word"),
    [
        (WINDOWS_10, OK, "10.0.19045"),
        (WINDOWS_10._replace(wine="10.0"), OK, "wine 10.0"),
        (WINDOWS_10._replace(version=(6, 1, 7601)), PROBLEM, "Windows 10 or later"),
        (WINDOWS_10._replace(machine="ARM64"), WARNING, "ARM64"),
        (DEBIAN, OK, "Debian"),
        (DEBIAN._replace(libc=(2, 17)), PROBLEM, "glibc 2.28"),
        (DEBIAN._replace(libc=()), PROBLEM, "musl"),
        (DEBIAN._replace(machine="aarch64"), OK, "aarch64"),
        (DEBIAN._replace(machine="i686"), WARNING, "i686"),
        (System("darwin", "macOS", "arm64"), WARNING, "not tried"),
    ],
)
def test_system(system, state, word):
    judged(judge_system(system), state, word)


BUNDLED = PythonFacts((3, 11, 9), 64, r"D:\模型\system\python\python.exe", "bundle")


@pytest.mark.parametrize(
    ("change", "state", "word"),
    [
        ({}, OK, "3.11.9, 64 bit, the bundle's"),
        ({"home": "venv"}, OK, "a virtual environment"),
        ({"home": "other"}, WARNING, "not set up"),
        ({"version": (3, 9, 1)}, PROBLEM, "from 3.10 to 3.14"),
        ({"version": (3, 15, 0)}, PROBLEM, "from 3.10 to 3.14"),
        ({"bits": 32}, PROBLEM, "64-bit"),
        ({"pth_missing": True}, WARNING, "setup_offline.bat"),
        ({"leaks": ("PYTHONPATH",)}, WARNING, "remove PYTHONPATH"),
        ({"user_site": r"C:\x"}, WARNING, "start with a .bat"),
        ({"user_site": r"C:\x", "home": "venv"}, OK, "3.11.9"),
    ],
)
def test_python(change, state, word):
    judged(judge_python(BUNDLED._replace(**change)), state, word)


def test_packages_as_the_requirements_name_them():
    wanted = wanted_packages((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert wanted["torch"].startswith("==") and wanted["numpy"].startswith(">=")
    assert ("colorama" in wanted) == (sys.platform == "win32")
    assert ("tomli" in wanted) == (sys.version_info < (3, 11))


@pytest.mark.parametrize(
    ("version", "limits", "fits"),
    [
        ("2.13.0+cpu", "==2.13.0", True), ("2.13", "==2.13.0", True), ("2.12.0", "==2.13.0", False),
        ("5.20", ">=5.20,<6", True), ("6.0.0", ">=5.20,<6", False), ("5.9", ">=5.20,<6", False), ("1", "", True),
    ],
)  # fmt: skip
def test_version_limits(version, limits, fits):
    assert satisfies(version, limits) is fits


def test_packages():
    wanted = {"torch": "==2.13.0", "flask": ">=3.1,<4"}
    judged(judge_packages(wanted, {"torch": "2.13.0+cpu", "flask": "3.1.2"}, False), OK, "2 of 2")
    judged(judge_packages(wanted, {"torch": None, "flask": "3.1.2"}, False), PROBLEM, "missing: torch")
    judged(judge_packages(wanted, {"torch": "2.12.0", "flask": "3.1.2"}, False), WARNING, "torch 2.12.0")
    judged(judge_packages(wanted, {"torch": "2.13.0", "flask": "3.1.2"}, True), PROBLEM, "not finished")


# folder and disk


def place(path, **change):
    flavour = PureWindowsPath if ":\\" in path or path.startswith("\\\\") else PurePosixPath
    return Place(flavour(path), **{"temporary": r"C:\Users\me\AppData\Local\Temp", "long_paths": False, **change})


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        (place(r"D:\chatglm"), OK, ""),
        (place(r"D:\模型 & (1) 测试!"), OK, ""),
        (place(r"D:\50% off"), PROBLEM, "%"),
        (place("/home/me/50% off"), OK, ""),
        (place("/home/me/a:b"), PROBLEM, "colon"),
        (place(r"\\nas\share\chatglm"), PROBLEM, "network share"),
        (place("D:\\" + "x" * 120), WARNING, "limit of 260"),
        (place("D:\\" + "x" * 120, long_paths=True), OK, ""),
        (place("D:\\" + "x" * 57, deepest=199), WARNING, "limit of 260"),
        (place("D:\\" + "x" * 56, deepest=199), OK, ""),
        (place(r"C:\Users\me\OneDrive - Firma\chatglm"), WARNING, "OneDrive"),
        (place(r"E:\Wolke\chatglm", onedrive=(r"e:\wolke",)), WARNING, "OneDrive"),
        (place(r"D:\no-onedrive\chatglm"), OK, ""),
        (place(r"E:\Wolkenkratzer\chatglm", onedrive=(r"E:\Wolke",)), OK, ""),
        (place(r"C:\Users\me\AppData\Local\Temp\Temp1_chatglm.zip\chatglm"), WARNING, "unpack"),
        (place(r"C:\Program Files\chatglm", write_error="Permission denied"), PROBLEM, "Program Files"),
    ],
)
def test_folder(facts, state, word):
    result = judged(judge_place(facts), state, word)
    assert result.facts["length"] == len(str(facts.path))


def test_the_longest_path_is_what_the_bundle_says(tmp_path):
    assert read_place(tmp_path).deepest == DEEPEST
    for text, length in (('{"longest_path": 199}', 199), ("{}", DEEPEST), ("[", DEEPEST), ("[]", DEEPEST)):
        (tmp_path / "manifest.json").write_text(text)
        assert read_place(tmp_path).deepest == length


def test_whether_a_folder_can_be_written(tmp_path, monkeypatch):
    assert read_place(tmp_path).write_error == "" and not list(tmp_path.iterdir())
    assert read_place(tmp_path / "none").write_error == "No such file or directory"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("no usable one")))
    assert read_place(tmp_path).temporary == ""


@pytest.mark.parametrize(
    ("disk", "state", "word"),
    [
        (Disk(500 * GIB, 100 * GIB), OK, "100.0 GiB of 500.0 GiB"),
        (Disk(500 * GIB, 10 * GIB, model=12 * GIB), PROBLEM, "12.0 GiB more"),
        (Disk(500 * GIB, 15 * GIB, model=12 * GIB, kept=4 * GIB), WARNING, "quantized model (4.0 GiB)"),
        (Disk(500 * GIB, 17 * GIB, model=12 * GIB, kept=4 * GIB), WARNING, "nearly full"),
    ],
)
def test_disk(disk, state, word):
    judged(judge_disk(disk), state, word)
