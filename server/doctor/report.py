"""The results as JSON, and everything for a bug report in a zip that names nobody."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from server.config import VERSION, Config
from server.doctor.mask import Mask, this_user
from server.doctor.result import State
from server.doctor.running import Outcome
from server.doctor.screen import Page
from server.errors import StartupError
from server.logfile import NAMES

_MOST = 2**16  # bytes of a file that is packed, from its end
FORMAT = 1  # of the JSON; a key is never given another meaning without another number
_SETTINGS = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY",
    "ALL_PROXY", "PYTHONPATH", "PYTHONHOME", "PYTHONUTF8", "OMP_NUM_THREADS", "LANG",
)  # fmt: skip
ABOUT_LOGS = """\
server.log, server.old.log: what the server wrote about its starts, where it has been started here. If its window showed
an error that is not in them, please copy it into the report.
server.log、server.old.log：服务每次启动的记录（启动过才有）。窗口里的报错不在里面时，请把它复制到报告里。

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


def write_zip(outcomes: Sequence[Outcome], config: Config, root: Path) -> Path:
    """Beside the program, or where it can be written; raises StartupError where it cannot be anywhere."""
    packed, problem = _pack(outcomes, config, root), None
    for find in (lambda: root, Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        try:
            return _write(find() / f"doctor-{datetime.now():%Y%m%d-%H%M%S-%f}.zip", packed)
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            problem = error
    raise StartupError(f"诊断结果打包失败（{problem}）：请清理磁盘后再试。",
                       f"The results could not be packed ({problem}): free some disk space and try again.")


def _write(path: Path, packed: bytes) -> Path:
    file = path.open("xb")
    try:
        with file:
            file.write(packed)
    except OSError:  # half of it is of no use
        path.unlink()
        raise
    return path


def _pack(outcomes: Sequence[Outcome], config: Config, root: Path) -> bytes:
    mask, packed = this_user(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, write in _files(outcomes, config, root).items():
            try:
                text = write(mask)
            except Exception:  # a damaged package, a file of another user: the other files are worth having
                text = mask(traceback.format_exc())
            # escaped: what is no character, as in names of files that Linux takes as bytes
            file.writestr(name, text.encode("utf-8", "backslashreplace"))
    return packed.getvalue()


def _files(outcomes: Sequence[Outcome], config: Config, root: Path) -> dict[str, Callable[[Mask], str]]:
    """What is in the zip: name -> its text, with names and keys taken out."""
    document = as_json(outcomes, config)
    found: dict[str, Callable[[Mask], str]] = {
        "doctor.json": lambda mask: json.dumps(_nameless(document, mask), ensure_ascii=False, indent=1),
        "doctor.txt": lambda mask: mask(_page(outcomes, config)),
        "settings.txt": lambda mask: mask(_settings(config)),
        "packages.txt": lambda mask: mask(_packages()),
        "logs.txt": lambda mask: ABOUT_LOGS + mask(_chat_log_size(config)),
    }
    copied = {f"{home.name}-{name}.txt": home / name for home in (root / ".venv", root / "system" / "python")
              for name in ("installed.json", "installing")}  # fmt: skip
    if config.config:
        copied["config.toml"] = config.config
    copied |= {name: root / name for name in NAMES}
    for name, path in copied.items():
        if os.path.isfile(path):  # unlike pathlib's it raises nothing where a folder may not be read
            found[name] = lambda mask, path=path: mask(_end(path))
    return found


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST))
        return file.read(_MOST).decode("utf-8", errors="replace")


def _nameless(document: dict[str, Any], mask: Mask) -> dict[str, Any]:
    """What docs/doctor.md promises stays as it is, even where the user is called "memory"."""
    checks = []
    for check in document["checks"]:
        facts = {key: mask.everything(value) for key, value in check["facts"].items()}
        said = {key: mask.everything(check[key]) for key in ("finding", "advice")}
        checks.append({**check, **said, "facts": facts})
    return {**document, "checks": checks}


def _page(outcomes: Sequence[Outcome], config: Config) -> str:
    page = Page(("zh", "en") if config.language == "zh" else ("en", "zh"), 120)
    fine = (line for outcome in outcomes for line in page.fine(outcome))
    return "\n".join([page.head(), *fine, *page.summary(outcomes)]) + "\n"


def _settings(config: Config) -> str:
    """The options, and those variables of the environment that matter; no others."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("CHATGLM_")}
    spelled = (*_SETTINGS, *(name.lower() for name in _SETTINGS))
    known = {name: os.environ[name] for name in spelled if name in os.environ}
    lines = [f"Python {sys.version}", ""]
    lines += [f"{name} = {value}" for name, value in vars(config).items()]
    return "\n".join([*lines, "", *(f"{name}={value}" for name, value in sorted((ours | known).items()))]) + "\n"


def _packages() -> str:
    names = []
    for found in importlib.metadata.distributions():
        try:
            names.append(f"{found.metadata['Name']} {found.version}")
        except Exception as error:  # what a broken installation leaves
            names.append(f"{found}: {error!r}")
    return "\n".join(sorted(set(names), key=str.lower)) + "\n"


def _chat_log_size(config: Config) -> str:
    path = config.chat_log
    if path is None or not os.path.isfile(path):
        return ""
    return f"{path.name} ({path.stat().st_size} bytes) was left out. 没有打包。\n"
