"""What was trained beside a model and is given in a folder of its own: P-tuning v2 prefixes, and LoRA."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from server.config import Config
from server.download.folder import is_begun, missing_files
from server.errors import ModelError
from server.footprint import ModelShape
from server.option_types import flag

# names of the files that each folder must hold: one of every row
_PTUNING = (("model*.safetensors", "pytorch_model*.bin"),)
_LORA = (("adapter_config.json",), ("adapter_model.safetensors", "adapter_model.bin"))


def check_adapters(config: Config) -> None:
    """Raises ModelError for a folder that is not there or lacks files, before a model is downloaded for it."""
    _check("ptuning", config.ptuning, _PTUNING)
    _check("lora", config.lora, _LORA)


def check_model(folder: Path) -> None:
    """Raises ModelError where the folder given as the model is an adapter's: it names the option for that.

    A whole model with an adapter's files beside its own passes.
    """
    if _lacking(folder, _LORA) is None and missing_files(folder):
        raise _no_model(folder, "lora", "LoRA", "a LoRA adapter")
    if _is_prefix_alone(folder):
        raise _no_model(folder, "ptuning", "P-Tuning 训练出的 checkpoint", "a P-Tuning checkpoint")


def with_prefix(shape: ModelShape, ptuning: Path | None) -> ModelShape:
    """The memory of a model with the P-tuning checkpoint's prefix; without a config.json there, as the model says."""
    try:
        return replace(shape, prefix=int(_prefix_length(ptuning))) if ptuning else shape
    except (ValueError, TypeError):
        return shape  # a damaged file is the loader's to report


def _prefix_length(folder: Path) -> object:
    """What config.json says of it; None where there is none, or none that can be read."""
    try:
        return json.loads((folder / "config.json").read_bytes()).get("pre_seq_len")
    except (OSError, ValueError, AttributeError):
        return None


def _is_prefix_alone(folder: Path) -> bool:
    """Whether the weights of a model with a prefix are too few to be all of it."""
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    if not _prefix_length(folder) or not is_begun(folder) or not any(file.is_file() for file in files):
        return False
    shape = ModelShape.from_folder(folder)
    size = sum(file.stat().st_size for file in files if file.is_file())
    return size < shape.weight_bytes(shape.stored_bits, 2) // 2


def _no_model(folder: Path, option: str, zh: str, en: str) -> ModelError:
    written = flag(option)
    return ModelError(
        f"{folder} 是 {zh}，不是完整的模型：请用 --model 指定训练时用的原模型，再加 {written} {folder}。",
        f"{folder} is {en} and no whole model: name the model that it was trained on with --model, and add {written} "
        f"{folder}.",
        param="model",
    )


def _check(option: str, folder: Path | None, rows: tuple[tuple[str, ...], ...]) -> None:
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
    if better := _fitting(folder, option, rows):
        zh, en = f"请写 {better}", f"write {better}"
    else:
        zh = f"请检查 {written} 给的路径，或把文件放齐"
        en = f"check the path that {written} gives, or put the file there"
    raise ModelError(
        f"文件夹 {folder} 里没有 {' 或 '.join(names)}：{zh}。",
        f"The folder {folder} has no {' or '.join(names)}: {en}.",
        param=option,
    )


def _fitting(folder: Path, option: str, rows: tuple[tuple[str, ...], ...]) -> str:
    """The option that this folder is for, or its sub-folder that this option is for, of several the latest; or ""."""
    if option != "lora" and _lacking(folder, _LORA) is None:
        return f"--lora {folder}"
    if option != "ptuning" and _lacking(folder, _PTUNING) is None:
        return f"--ptuning {folder}" if _prefix_length(folder) else f"--model {folder}"
    inside = [path for path in folder.iterdir() if path.is_dir() and _lacking(path, rows) is None]
    return f"{flag(option)} {max(inside, key=_steps)}" if inside else ""


def _steps(folder: Path) -> tuple[int, str]:
    """Orders the checkpoints of one training: checkpoint-500 comes before checkpoint-3000."""
    numbers = re.findall(r"\d+", folder.name)
    return int(numbers[-1]) if numbers else -1, folder.name


def _lacking(folder: Path, rows: tuple[tuple[str, ...], ...]) -> tuple[str, ...] | None:
    """The first row of which the folder has nothing; None where it has all that is needed."""
    return next((names for names in rows if not any(any(folder.glob(name)) for name in names)), None)
