"""Reading the options of ``server.options`` from the command line, the environment and the configuration file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from server.errors import StartupError
from server.help_page import COMMANDS, help_text
from server.i18n import system_language
from server.option_types import flag, variable
from server.options import COMMAND, ROOT, ROWS, VERSION, Config


class Source(NamedTuple):
    """Where values were given; relative paths start at ``base``."""

    zh: str
    en: str
    base: Path
    label: Callable[[str], str]  # field name -> how this source spells it


def split_command(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command that is asked for, and its options."""
    return (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("serve", argv)


def parse(
    argv: Sequence[str], *, env: Mapping[str, str] = os.environ, root: Path = ROOT, program: str = "python -m server"
) -> Config:
    """Options from ``argv`` (without the program's name), ``env`` and ``root``/config.toml.

    On the command line only the command's own options are known; environment and file are the same for all commands.
    ``language`` of the result is "zh" or "en". ``--help`` and ``--version`` print and raise SystemExit(0); everything
    that is wrong is a StartupError that names the place it came from.
    """
    on_argv = Source("命令行", "on the command line", Path.cwd(), flag)
    in_env = Source("环境变量", "in the environment", Path.cwd(), lambda name: variable(ROWS[name]))
    command, options = split_command(argv)
    rows = {name: row for name, row in ROWS.items() if command in row.metadata["commands"]}
    typed = _read_argv(options, rows, on_argv)
    if page := typed.pop("page", None):
        shown = help_text(program, command, rows, language_of(argv, env))
        print(shown if page == "help" else f"chatglm-portable {VERSION}")
        raise SystemExit(0)
    # read before the file: on Python 3.10 that needs a package which may not be installed yet
    given = {name: _cast(name, raw, in_env) for name, raw in _read_env(env, in_env).items()}
    given |= {name: _cast(name, raw, on_argv) for name, raw in typed.items()}
    if "config" not in given and (root / "config.toml").is_file():
        given["config"] = root / "config.toml"
    values = {"chat_log": root / "chatlog.log"}
    if command == "chat":
        values["log_level"] = "warning"  # its screen is for the conversation
    if path := given.get("config"):
        in_file = Source(f"文件 {path} ", f"in {path}", path.parent, str)
        values |= {name: _cast(name, raw, in_file) for name, raw in _read_file(path, in_file).items()}
    config = Config(**(values | given))
    language = system_language(env) if config.language == "auto" else config.language
    return dataclasses.replace(config, language=language)


def language_of(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> str:
    """The language for what is said before, or instead of, a Config."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        value = following if word == "--language" else word.removeprefix("--language=")
        if word.startswith("--language") and value in ("zh", "en"):
            return value
    return system_language(env)


def _read_argv(argv: Sequence[str], rows: Mapping[str, dataclasses.Field], source: Source) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("-h", "--help", dest="page", action="store_const", const="help")
    parser.add_argument("--version", dest="page", action="store_const", const="version")
    for name, row in rows.items():
        kind, spellings = row.metadata["kind"], (flag(name), *row.metadata["other"])
        if kind.bare is None:
            parser.add_argument(*spellings, dest=name)
        else:
            parser.add_argument(*spellings, dest=name, action="store_const", const=kind.bare)
        if kind.negated is not None:
            parser.add_argument("--no-" + flag(name)[2:], dest=name, action="store_const", const=kind.negated)
    if "verify" in rows:
        parser.add_argument("model", nargs="?")  # the command download takes the model without --model too
    try:
        typed, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:  # with rows like these: a value is missing, or a flag was given one
        raise _bad_use(error.argument_name.split("/")[0]) from None
    if rest:
        spelled = [*COMMANDS, *(spelling for action in parser._actions for spelling in action.option_strings)]
        raise _unknown(rest[0], rest[0].split("=")[0], spelled, source)
    return vars(typed)


def _bad_use(spelling: str) -> StartupError:
    if spelling in {flag(name) for name, row in ROWS.items() if row.metadata["kind"].bare is None}:
        return StartupError(f"{spelling} 后面缺一个值：用 --help 查看用法。", f"{spelling} needs a value: see --help.")
    return StartupError(f"{spelling} 后面不能带值：用 --help 查看用法。", f"{spelling} takes no value: see --help.")


def _read_env(env: Mapping[str, str], source: Source) -> dict[str, str]:
    known = {variable(row): name for name, row in ROWS.items()}
    for key in env:
        if key.startswith("CHATGLM_") and key not in known and key != COMMAND:
            raise _unknown(key, key, known, source)
    return {name: env[key] for key, name in known.items() if env.get(key)}


def _read_file(path: Path, source: Source) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Notepad writes a BOM
    except OSError as error:
        raise StartupError(f"配置文件 {path} 读不了（{error.strerror}）：请检查 --config 给的路径。",
                           f"Cannot read the configuration file {path} ({error.strerror}): check --config.") from None
    except UnicodeDecodeError:
        raise StartupError(f"配置文件 {path} 不是 UTF-8 编码：请用 UTF-8 另存。",
                           f"The configuration file {path} is not UTF-8: save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise StartupError(f"配置文件 {path} 不是正确的 TOML（{error}）：Windows 路径请用单引号括起来。",
                           f"{path} is not valid TOML ({error}): put Windows paths in single quotes.") from None
    given = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in ROWS or name == "config":
            raise _unknown(key, name, ROWS, source)
        given[name] = value
    return given


def _cast(name: str, raw: Any, source: Source) -> Any:
    kind = ROWS[name].metadata["kind"]
    if isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        raw = ",".join(raw)
    shown = str(raw).lower() if isinstance(raw, bool) else str(raw)
    try:
        return kind.cast(shown, source.base)
    except (ValueError, KeyError):
        label = source.label(name)
        raise StartupError(f"{source.zh}里的 {label} 不能是 {shown!r}，允许的是：{kind.zh}。",
                           f"{label} {source.en} cannot be {shown!r}; allowed: {kind.en}.", param=name) from None


def _unknown(written: str, looked_up: str, valid: Iterable[str], source: Source) -> StartupError:
    near = difflib.get_close_matches(looked_up, valid, n=1)
    zh, en = (f"是不是 {near[0]}？", f" Did you mean {near[0]}?") if near else ("", "")
    return StartupError(f"{source.zh}里的 {written} 不认识：{zh}用 --help 可以看到全部选项。",
                        f"Unknown option {written} {source.en}.{en} --help lists them all.", param=written)
