"""``python -m server download``: get a model without starting it, or check the one that is there."""

from __future__ import annotations

import threading
from pathlib import Path

from server.config import ROOT, Config
from server.download import failures, interrupts, web
from server.download.check import Expected, Record, State, check_converted, check_files, converted_name
from server.download.editions import ensure_edition
from server.download.fetch import Origin, ensure_model
from server.download.folder import (
    CHAT,
    DEFAULT_MODEL,
    SENTENCE,
    ModelKind,
    converted_files,
    is_superfluous,
    locate,
    missing_files,
    repositories,
)
from server.download.manifest import known_files
from server.download.plan import is_weights, largest, make_plan
from server.download.probing import find_suppliers

_WORDS = {
    State.RIGHT: ("完好", "ok"),
    State.ABSENT: ("缺少", "missing"),
    State.BROKEN: ("损坏", "broken"),
    State.UNKNOWN: ("没有可比的校验和", "no checksum to compare with"),
}


def download(config: Config, root: Path = ROOT) -> int:
    """Complete the folder of a model, or with ``verify`` only check it; returns the exit code.

    Raises StartupError as ``ensure_model`` does, Interrupted for Ctrl+C.
    """
    name = config.model or DEFAULT_MODEL
    kind = SENTENCE if _is_of(SENTENCE, name) else CHAT
    if config.verify:
        return _verify(config, locate(name, root, kind, foreign=True), kind, root)
    if kind is CHAT:
        folder = ensure_edition(config, root, thorough=True)
    else:
        origin = Origin(config.source, config.endpoint)
        folder = ensure_model(name, kind, origin=origin, root=root, language=config.language, thorough=True)
    ours = folder.resolve().parent == (root / "THUDM").resolve()
    start = f"--{kind.option.replace('_', '-')} {folder.name if ours else folder}"
    _say(config, f"模型完整：{folder}。启动时写 {start}。", f"The model is complete: {folder}. To start it: {start}.")
    return 0


def _is_of(kind: ModelKind, name: str) -> bool:
    return Path(name).name in kind.repositories


def _say(config: Config, zh: str, en: str) -> None:
    print(zh if config.language == "zh" else en, flush=True)


def _verify(config: Config, folder: Path, kind: ModelKind, root: Path) -> int:
    """Every file is hashed again; 1 if one is missing or wrong."""
    command = f"download {config.model or DEFAULT_MODEL}"
    if not folder.is_dir():
        _say(config, f"还没有 {folder}：执行 {command} 下载。", f"There is no {folder} yet: {command} fetches it.")
        return 1
    states = interrupts.run(lambda stop: _check(config, folder, kind, root, stop))
    for name, state in sorted(states.items()):
        _say(config, *(f"  {name}  {word}" for word in _WORDS[state]))
    wrong = [name for name, state in states.items() if state in (State.ABSENT, State.BROKEN)]
    if not wrong:
        if State.UNKNOWN in states.values():
            _say(config, f"{folder} 没有发现问题，但有些文件没有可比的校验和。",
                 f"Nothing wrong was found in {folder}, but some files have no checksum to compare with.")  # fmt: skip
        else:
            _say(config, f"{folder} 完好。", f"{folder} is complete and right.")
        return 0
    made = [file.path for file in converted_files(folder) if converted_name(file) in wrong]
    for path in made:
        _say(config, f"{path} 是这里转换的，坏了就删掉它。", f"{path} was made here: delete it, since it is broken.")
    _say(config, f"{folder} 有 {len(wrong)} 个文件缺少或损坏：执行 {command} 只下载这些。",
         f"{folder} has {len(wrong)} files that are missing or broken: {command} fetches just those.")  # fmt: skip
    return 1


def _check(config: Config, folder: Path, kind: ModelKind, root: Path, stop: threading.Event) -> dict[str, State]:
    """What each file is, by the manifest, by what was downloaded, and only if those leave any out by a source."""
    expected = _expected(folder)
    if any(sha256 is None for name, (_, sha256) in expected.items() if is_weights(name)):
        expected = {**expected, **_listed(config, folder, kind, root, stop)}
    expected = {name: what for name, what in expected.items()
                if not is_superfluous(folder, name)}  # fmt: skip
    with failures.disk_failures(folder):
        states = check_files(folder, expected, stop, zh=config.language == "zh", again=True)
        states |= check_converted(folder, stop)
    return states | dict.fromkeys(missing_files(folder, kind), State.ABSENT)


def _expected(folder: Path) -> Expected:
    """Size and SHA-256 that files should have; every file of weights is in it."""
    record = Record(folder)
    ours = [file.path.name for file in converted_files(folder)]
    there = [path.name for path in folder.iterdir() if record.published(path.name) or is_weights(path.name)]
    there = [name for name in there if name not in ours]
    known = {name: (file.size, file.sha256) for name, file in known_files(folder.name).items()}
    return {"config.json": (None, None)} | {name: (None, record.published(name)) for name in there} | known


def _listed(config: Config, folder: Path, kind: ModelKind, root: Path, stop: threading.Event) -> Expected:
    """The same as the sources say; nothing where none answers or the folder is the user's own."""
    names = repositories(folder, root, kind, anywhere=True)
    if not names:
        return {}
    with web.open_client() as client:
        sources = Origin(config.source, config.endpoint).sources()
        suppliers, _ = find_suppliers(sources, names, client, lambda listing: largest(listing, kind), stop)
    if not suppliers:
        return {}
    plan = make_plan(suppliers, known_files(folder.name), kind, folder)
    return {file.name: (file.size, file.sha256) for file in plan}
