"""The system, its Python, and the packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from server.doctor.result import Complaint, Result, conclude, problem, warning
from server.profiles import Note
from system.install import NEWEST, OLDEST

WINDOWS_10 = (10, 0)
WINDOWS_11_BUILD = 22000
OLDEST_GLIBC = (2, 28)  # that PyTorch's wheels ask for
_NAMED = 4  # packages on the page; the facts have all
SETUP = ("删掉 .venv，再运行 ./run.sh", "delete .venv, then start ./run.sh")
if sys.platform == "win32":
    SETUP = ("双击 setup_offline.bat", "run setup_offline.bat")


class System(NamedTuple):
    """``version``: (major, minor, build) of Windows; ``libc``: glibc's on Linux, () for another library."""

    kind: str  # sys.platform
    name: str
    machine: str
    version: tuple[int, int, int] = (0, 0, 0)
    libc: tuple[int, ...] = ()
    wine: str = ""


def read_system() -> System:
    machine = platform.machine()
    if sys.platform == "win32":
        numbers = sys.getwindowsversion()[:3]
        name = "Windows 11" if numbers[2] >= WINDOWS_11_BUILD else f"Windows {platform.release()}"
        return System(sys.platform, name, machine, numbers, wine=_wine())
    name = platform.platform(terse=True)
    with contextlib.suppress(OSError, KeyError):  # macOS, or a system without that file
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    kind, version = platform.libc_ver()
    libc = tuple(int(part) for part in re.findall(r"\d+", version)) if kind == "glibc" else ()
    return System(sys.platform, name, machine, libc=libc)


def _wine() -> str:
    import ctypes

    try:
        get_version = ctypes.CDLL("ntdll.dll").wine_get_version
    except (OSError, AttributeError):  # a real Windows
        return ""
    get_version.restype = ctypes.c_char_p
    return get_version().decode()


def judge_system(system: System) -> Result:
    """PyTorch is built for Windows 10 and later on x86-64, and for Linux with glibc."""
    said = f"{system.name} {system.machine}"
    if system.kind == "win32":
        said += f" ({'.'.join(map(str, system.version))})" + (f", wine {system.wine}" if system.wine else "")
    complaints: list[Complaint] = []
    if system.kind == "win32" and system.version[:2] < WINDOWS_10:
        complaints.append(problem("PyTorch 要 Windows 10 或更新的系统", "PyTorch needs Windows 10 or later",
                                  do=("换一台装有 Windows 10 或 11 的电脑", "use a computer with Windows 10 or 11")))
    if system.kind == "linux" and system.libc < OLDEST_GLIBC:
        complaints.append(problem("PyTorch 要 glibc 2.28 或更新的（musl 不行）",
                                  "PyTorch needs glibc 2.28 or later (musl will not do)",
                                  do=("换用较新的发行版，例如 Debian 12", "use a newer distribution, Debian 12 say")))
    if system.kind not in ("win32", "linux"):
        complaints.append(warning("没有在这种系统上试过", "not tried on this system",
                                  do=("最好用 Windows 或 Linux", "better use Windows or Linux")))
    if system.machine.lower() not in ("amd64", "x86_64", "aarch64", "arm64") or (
        system.kind == "win32" and system.machine.lower() != "amd64"
    ):
        complaints.append(warning(f"没有在 {system.machine} 处理器上试过", f"not tried on {system.machine} processors",
                                  do=("最好用 x86-64 的电脑", "better use an x86-64 computer")))
    return conclude(Note(said, said), complaints, facts=system._asdict())


class PythonFacts(NamedTuple):
    """``leaks``: environment variables that change where this Python finds packages; ``user_site``: in use or None."""

    version: tuple[int, int, int]
    bits: int
    executable: str
    home: str  # bundle, venv or other
    leaks: tuple[str, ...] = ()
    user_site: str | None = None
    pth_missing: bool = False  # the bundle's python3*._pth, which keeps other Pythons' packages out


def read_python(root: Path, env: Mapping[str, str] = os.environ) -> PythonFacts:
    executable = Path(sys.executable)
    bundled = root / "system" / "python"
    home = "bundle" if bundled in executable.parents else "venv" if sys.prefix != sys.base_prefix else "other"
    ignored = bool(sys.flags.ignore_environment)
    foreign = [name for name in ("PYTHONHOME", "PYTHONPATH") if env.get(name) and env.get(name) != str(root)]
    return PythonFacts(
        version=tuple(sys.version_info[:3]),
        bits=64 if sys.maxsize > 2**32 else 32,
        executable=str(executable),
        home=home,
        leaks=() if ignored else tuple(foreign),
        user_site=site.getusersitepackages() if site.ENABLE_USER_SITE else None,
        pth_missing=home == "bundle" and not list(bundled.glob("python3*._pth")),
    )


def judge_python(facts: PythonFacts) -> Result:
    version = ".".join(map(str, facts.version))
    place = {"bundle": ("自带的", "the bundle's"), "venv": ("虚拟环境", "a virtual environment"),
             "other": ("系统的", "the system's")}[facts.home]  # fmt: skip
    said = Note(f"{version}，{facts.bits} 位，{place[0]}：{facts.executable}",
                f"{version}, {facts.bits} bit, {place[1]}: {facts.executable}")
    complaints: list[Complaint] = []
    if not OLDEST <= facts.version[:2] <= NEWEST or facts.bits != 64:
        complaints.append(problem("需要 64 位的 Python 3.10 到 3.14", "a 64-bit Python from 3.10 to 3.14 is needed",
                                  do=("从 python.org 安装 Python 3.11（64 位），再" + SETUP[0],
                                      "install Python 3.11 (64 bit) from python.org, then " + SETUP[1])))
    elif facts.home == "other":
        complaints.append(warning("启动服务用的 Python 还没有装好", "the Python that serves is not set up yet",
                                  do=SETUP))
    if facts.pth_missing:
        complaints.append(warning("自带 Python 的 ._pth 文件被删了，会混进别的 Python 的包",
                                  "the bundled Python's ._pth file was deleted, so packages of others get in",
                                  do=("运行 setup_offline.bat 恢复它", "run setup_offline.bat, which restores it")))
    if facts.leaks:
        names = "、".join(facts.leaks), ", ".join(facts.leaks)
        complaints.append(warning(f"环境变量 {names[0]} 会混进别的 Python 的包",
                                  f"{names[1]} in the environment brings packages of another Python in",
                                  do=(f"删掉环境变量 {names[0]}，再启动", f"remove {names[1]}, then start again")))
    if facts.user_site and facts.home == "bundle":
        complaints.append(warning("会用到用户目录里的包", "packages in the user's folder are used too",
                                  do=("用 .bat 启动，不要直接运行 python",
                                      "start with a .bat, not with python itself")))
    return conclude(said, complaints, facts=facts._asdict())


def wanted_packages(requirements: str) -> dict[str, str]:
    """Names and version limits from a requirements.txt, those for other systems left out."""
    wanted = {}
    for line in requirements.splitlines():
        line, _, marker = line.split("#")[0].partition(";")
        if not (match := re.match(r"\s*([\w.-]+)\s*(.*?)\s*$", line)):
            continue
        other = re.search(r"""sys_platform\s*==\s*['"](\w+)""", marker)
        older = re.search(r"""python_version\s*<\s*['"](\d+)\.(\d+)""", marker)
        elsewhere = other and other[1] != sys.platform
        brought = older and sys.version_info[:2] >= (int(older[1]), int(older[2]))
        if not elsewhere and not brought:
            wanted[match[1]] = match[2]
    return wanted


def satisfies(version: str, limits: str) -> bool:
    """Whether 2.13.0+cpu is within ``==2.13.0`` or ``>=2.12,<3``: numbers alone count."""
    operators = {
        "==": lambda a, b: a == b,
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
        "<=": lambda a, b: a <= b,
    }
    for sign, limit in re.findall(r"(==|>=|<=|<|>)\s*([\d.]+)", limits):
        numbers = [tuple(map(int, re.findall(r"\d+", text.split("+")[0]))) for text in (version, limit)]
        longest = max(map(len, numbers))
        ours, theirs = (number + (0,) * (longest - len(number)) for number in numbers)
        if not operators[sign](ours, theirs):
            return False
    return True


def installed_packages(names: list[str]) -> dict[str, str | None]:
    """The version of each, None for one that is missing."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def judge_packages(wanted: Mapping[str, str], found: Mapping[str, str | None], cut_short: bool) -> Result:
    """``cut_short``: an installation was begun and not ended."""
    missing = [name for name in wanted if not found.get(name)]
    there = {name: version for name in wanted if (version := found.get(name))}
    others = [f"{name} {version}" for name, version in there.items() if not satisfies(version, wanted[name])]
    said = Note(f"{len(wanted)} 个里装好 {len(wanted) - len(missing)} 个",
                f"{len(wanted) - len(missing)} of {len(wanted)} are installed")
    complaints: list[Complaint] = []
    if missing:
        more = len(missing) - _NAMED
        rest = (f" 等 {len(missing)} 个", f" and {more} more") if more > 0 else ("", "")
        complaints.append(problem(f"缺 {'、'.join(missing[:_NAMED])}{rest[0]}",
                                  f"missing: {', '.join(missing[:_NAMED])}{rest[1]}", do=SETUP))
    if cut_short:
        complaints.append(problem("上次安装没有完成", "the last installation was not finished", do=SETUP))
    if others:
        complaints.append(warning(f"版本不是试过的：{'、'.join(others)}", f"versions not tried: {', '.join(others)}",
                                  do=SETUP))
    return conclude(said, complaints, facts={"installed": dict(found), "cut_short": cut_short})


def was_cut_short(root: Path) -> bool:
    """Whether system/install.py left its note of a run in an environment."""
    return any((root / home / "installing").exists() for home in (".venv", "system/python"))
