"""What was trained beside a model and is given in a folder of its own: P-tuning v2 prefixes, and LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from server.config import Config
from server.errors import ModelError
from server.footprint import ModelShape
from server.option_types import flag

# names of the files that each folder must hold: one of every row
_PTUNING = (("model*.safetensors", "pytorch_model*.bin"),)
_LORA = (("adapter_config.json",), ("adapter_model.safetensors", "adapter_model.bin"))


def check_adapters(config: Config) -> None:
    """Raises ModelError for a folder that is not there or lacks files, before a model is downloaded for it."""
    _check("ptuning", config.ptuning, _PTUNING, "lora", _LORA)
    _check("lora", config.lora, _LORA, "ptuning", _PTUNING)


def with_prefix(shape: ModelShape, ptuning: Path | None) -> ModelShape:
    """The memory of a model with the P-tuning checkpoint's prefix; without a config.json there, as the model says."""
    try:
        config = json.loads((ptuning / "config.json").read_text(encoding="utf-8")) if ptuning else {}
        return replace(shape, prefix=int(config["pre_seq_len"]))
    except (OSError, ValueError, KeyError, TypeError):
        return shape  # a damaged file is the loader's to report


def _check(
    option: str, folder: Path | None, rows: tuple[tuple[str, ...], ...], other: str, other_rows: tuple
) -> None:
    if folder is None or _lacking(folder, rows) is None:
        return
    written = flag(option)
    if folder.is_file():
        raise ModelError(
            f"{folder} 是一个文件，{written} 要的是它所在的文件夹：请写 {written} {folder.parent}。",
            f"{folder} is a file, {written} wants the folder that it is in: write {written} {folder.parent}.",
            param=option,
        )
    if not folder.is_dir():
        raise ModelError(
            f"没有文件夹 {folder}：请检查 {written} 给的路径。",
            f"There is no folder {folder}: check the path that {written} gives.",
            param=option,
        )
    names = _lacking(folder, rows)
    if _lacking(folder, other_rows) is None:
        zh, en = f"请用 {flag(other)}", f"use {flag(other)} for it"
    else:
        zh = f"请检查 {written} 给的路径，或把文件放齐"
        en = f"check the path that {written} gives, or put the file there"
    raise ModelError(
        f"文件夹 {folder} 里没有 {' 或 '.join(names)}：{zh}。",
        f"The folder {folder} has no {' or '.join(names)}: {en}.",
        param=option,
    )


def _lacking(folder: Path, rows: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """The first row of which the folder has nothing; None where it has all that is needed."""
    return next((names for names in rows if not any(any(folder.glob(name)) for name in names)), None)
