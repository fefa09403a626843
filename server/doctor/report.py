"""The results as JSON, and everything for a bug report in a zip that names nobody."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from server.config import VERSION, Config
from server.doctor.result import State
from server.doctor.running import Outcome
from server.doctor.screen import Page
from server.errors import StartupError

FORMAT = 1  # of the JSON; a key is never given another meaning without another number
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"(?<=//)[^/@\s]+@"), "***@"),  # user and password of an address
    (re.compile(r"\b(?:sk|hf|ms|pk|ghp|github_pat)[-_][\w-]{8,}"), "***"),
    (re.compile(r"(?i)(\bbearer\s+)\S+"), r"\1***"),
    (re.compile(r"(?im)^(\s*[\w.-]*(?:key|token|secret|password)[\w.-]*\s*[=:]\s*).+$"), r"\1***"),
)
_SETTINGS = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY",
    "ALL_PROXY", "PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "OMP_NUM_THREADS", "LANG",
)  # fmt: skip
NO_LOGS = """\
The server writes its log to its console alone; there is no log file to pack. If the console showed an error, please
copy it into the report.
服务的日志只显示在它的窗口里，没有日志文件可以打包。如果窗口里有报错，请把它复制到报告里。

Chats are never packed. 聊天内容从不打包。
"""


def as_json(outcomes: Sequence[Outcome], config: Config) -> dict[str, Any]:
    """The document of ``--json``; docs/doctor.md describes its keys."""
    states = [outcome.result.state for outcome in outcomes]
    return {
        "format": FORMAT,
        "program": VERSION,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "language": config.language,
        "state": max(states, key=lambda state: state.rank).value,
        "counts": {state.value: states.count(state) for state in State},
        "checks": [
            {
                "id": check.id,
                "title": check.title._asdict(),
                "state": result.state.value,
                "finding": result.finding._asdict(),
                "advice": result.advice._asdict() if result.advice else None,
                "facts": dict(result.facts),
                "seconds": seconds,
            }
            for check, result, seconds in outcomes
        ],
    }


class Mask:
    """Takes out of a text what tells who the user is, and what opens doors."""

    def __init__(self, env: Mapping[str, str] = os.environ, home: Path | None = None, names: Sequence[str] = ()):
        found = {*names, env.get("USERNAME", ""), env.get("USER", ""), env.get("LOGNAME", "")}
        home = home or Path.home()
        self._homes = sorted({str(home), home.as_posix(), str(home).replace("\\", "\\\\")}, key=len, reverse=True)
        found.add(home.name)
        host = {platform.node(), env.get("COMPUTERNAME", ""), env.get("USERDOMAIN", "")}
        self._people = [(name, "<user>") for name in found if name] + [(name, "<computer>") for name in host if name]
        self._values = [value for name, value in env.items() if _SECRET_NAME.search(name) and len(value) >= 8]

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "***")
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
        for home in self._homes:
            text = re.sub(re.escape(home) + r"(?![\w.-])", "<home>", text, flags=re.IGNORECASE)
        for name, instead in sorted(self._people, key=lambda pair: -len(pair[0])):
            text = _as_name(name).sub(instead, text)
        return text


def _as_name(name: str) -> re.Pattern[str]:
    """The name where it can only be one: a short one as a folder, a longer one as a word, a Chinese one anywhere."""
    plain = re.escape(name)
    if not name.isascii():
        return re.compile(plain)
    if len(name) < 4:
        return re.compile(rf"(?<=[\\/]){plain}(?=[\\/\s\"']|$)", re.IGNORECASE)
    return re.compile(rf"(?<![A-Za-z0-9]){plain}(?![A-Za-z0-9])", re.IGNORECASE)


def write_zip(outcomes: Sequence[Outcome], config: Config, root: Path) -> Path:
    """Beside the program, or where it can be written; raises StartupError where it cannot be anywhere."""
    mask, name = Mask(names=_login()), f"doctor-{datetime.now():%Y%m%d-%H%M%S}.zip"
    texts = {file: mask(text) for file, text in _texts(outcomes, config, root).items()}
    problem = None
    for folder in (root, Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        path = folder / name
        try:
            with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as file:
                for inside, text in texts.items():
                    file.writestr(inside, text)
            return path
        except OSError as error:
            problem = error
    raise StartupError(f"诊断结果打包失败（{problem}）：请清理磁盘后再试。",
                       f"The results could not be packed ({problem}): free some disk space and try again.")


def _login() -> tuple[str, ...]:
    try:
        return (getpass.getuser(),)
    except (OSError, KeyError, ImportError):  # a user id without a name
        return ()


def _texts(outcomes: Sequence[Outcome], config: Config, root: Path) -> dict[str, str]:
    """The files of the zip before names and keys are taken out."""
    page = Page(config.language, 120)
    screen = [page.head(), *(line for outcome in outcomes for line in page.lines(outcome)), page.summary(outcomes)]
    texts = {
        "doctor.json": json.dumps(as_json(outcomes, config), ensure_ascii=False, indent=1),
        "doctor.txt": "\n".join(screen) + "\n",
        "settings.txt": _settings(config),
        "packages.txt": _packages(),
        "logs.txt": NO_LOGS + _chat_log_size(config),
    }
    for home in (root / ".venv", root / "system" / "python"):
        for name in ("installed.json", "installing"):
            if (home / name).is_file():
                texts[f"{home.name}-{name}.txt"] = (home / name).read_text(encoding="utf-8", errors="replace")
    if config.config and config.config.is_file():
        texts["config.toml"] = config.config.read_text(encoding="utf-8", errors="replace")
    return texts


def _settings(config: Config) -> str:
    """The options, and those variables of the environment that matter; no others."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("CHATGLM_")}
    spelled = (*_SETTINGS, *(name.lower() for name in _SETTINGS))
    known = {name: os.environ[name] for name in spelled if name in os.environ}
    lines = [f"Python {sys.version}", f"{platform.platform()}", ""]
    lines += [f"{name} = {value}" for name, value in vars(config).items()]
    return "\n".join([*lines, "", *(f"{name}={value}" for name, value in sorted((ours | known).items()))]) + "\n"


def _packages() -> str:
    installed = {f"{found.metadata['Name']} {found.version}" for found in importlib.metadata.distributions()}
    return "\n".join(sorted(installed, key=str.lower)) + "\n"


def _chat_log_size(config: Config) -> str:
    path = config.chat_log
    if path is None or not path.is_file():
        return ""
    return f"{path.name} ({path.stat().st_size} bytes) was left out. 没有打包。\n"
