"""The page that --help prints, made from the rows of the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path

from server.option_types import FILE, FOLDER, flag, variable

COMMANDS = {  # the first one is meant where none is named
    "serve": ("启动 API 服务（默认）", "serve the HTTP API (the default)"),
    "chat": ("在终端里对话", "chat in the terminal"),
    "download": ("下载或补全一个模型：download [模型]", "download or complete a model: download [model]"),
    "spool": ("处理一个文件夹里的请求文件", "answer request files in a folder"),
    "doctor": ("检查这台机器，说明哪里有问题、怎么办", "check this machine: what is wrong, and what to do"),
}


def help_text(program: str, command: str, rows: Mapping[str, Field], language: str) -> str:
    """The page that --help prints: the commands, and two lines for each option of one of them."""
    zh = language == "zh"
    separator = "；" if zh else "; "
    lines = [f"用法：{program} [命令] [选项]" if zh else f"usage: {program} [command] [options]"]
    lines += [f"  {name:8} {words[0] if zh else words[1]}" for name, words in COMMANDS.items()]
    if program.endswith("run.sh"):
        lines.append("  test     运行全部测试" if zh else "  test     run the tests")
    lines += ["", f"{command} 的选项：" if zh else f"options of {command}:"]
    for name, row in rows.items():
        kind = row.metadata["kind"]
        spellings = ", ".join((*row.metadata["other"], flag(name)))
        negated = f", --no-{flag(name)[2:]}" if kind.negated is not None else ""
        default, default_word = _shown_default(row, zh), "默认" if zh else "default"
        lines.append(f"  {spellings} {kind.metavar}".rstrip() + negated)
        lines.append(f"      {row.metadata[language]} [{default_word} {default}{separator}{variable(row)}]")
    lines += ["", "  -h, --help", "      显示本页" if zh else "      show this page"]
    lines += ["  --version", "      显示版本号" if zh else "      show the version"]
    return "\n".join(lines)


def _shown_default(row: Field, zh: bool) -> str:
    value = row.default
    if value is None and row.metadata["kind"] not in (FILE, FOLDER):
        return "auto"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None or value is False or value == "":
        return "无" if zh else "off"
    return str(value)
