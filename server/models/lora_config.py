"""What a LoRA adapter's configuration file says; whatever could change the result unnoticed is refused.

The fields are those of PEFT's LoraConfig: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ModelError
from server.models.files import read_json

CONFIG_FILE = "adapter_config.json"

# kinds of initialization that leave the base model's weights as they are (the others learn what is left of them)
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_READ = {
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
}
# concern training, or say where the adapter comes from
_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}


def refused(path: Path, zh: str, en: str) -> ModelError:
    """``zh`` and ``en`` say what is wrong with a file of an adapter."""
    return ModelError(
        f"LoRA 文件 {path} {zh}；请检查 --lora，换成为这个模型训练的 LoRA。",
        f"The LoRA file {path} {en}; check --lora: it takes an adapter that was trained for this model.",
        param="lora",
    )


@dataclass(frozen=True)
class LoraConfig:
    """How strongly each module's matrices count; patterns are regular expressions for ends of module names."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilized: bool  # rsLoRA
    magnitudes: bool  # DoRA
    targets: str | tuple[str, ...] | None  # a regular expression for whole names, ends of names, or not known

    @classmethod
    def read(cls, path: Path) -> LoraConfig:
        """Raises ModelError naming the file and the field for what is no LoRA, or one that cannot be merged exactly."""
        config = read_json(path)
        _check(path, "peft_type", config.get("peft_type"), config.get("peft_type") == "LORA", '"LORA"')
        for name in sorted(config.keys() - _READ - _NO_EFFECT):
            _check(path, name, config[name], not config[name], "false 或 null", "false or null")
        initialization = config.get("init_lora_weights")
        _check(path, "init_lora_weights", initialization, initialization in _INITIALIZATIONS, "true（保存时先转换）",
               "true (convert the adapter when it is saved)")
        _check(path, "bias", config.get("bias"), config.get("bias", "none") in ("none", "all", "lora_only"),
               '"none"、"all" 或 "lora_only"', '"none", "all" or "lora_only"')
        self = cls(
            rank=config.get("r"),
            alpha=config.get("lora_alpha"),
            ranks=config.get("rank_pattern") or {},
            alphas=config.get("alpha_pattern") or {},
            stabilized=bool(config.get("use_rslora")),
            magnitudes=bool(config.get("use_dora")),
            targets=_targets(config),
        )
        self._check_numbers(path)
        return self

    def _check_numbers(self, path: Path) -> None:
        for name, patterns in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            _check(path, name, patterns, _are_patterns(patterns), "{模块: 数}", "{module: number}")
        for name, rank in (("r", self.rank), *(("rank_pattern", rank) for rank in self.ranks.values())):
            _check(path, name, rank, type(rank) is int and rank > 0, "正整数", "a positive int")
        for name, alpha in (("lora_alpha", self.alpha), *(("alpha_pattern", a) for a in self.alphas.values())):
            _check(path, name, alpha, type(alpha) in (int, float), "数", "a number")

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilized else rank)

    def is_target(self, module: str) -> bool:
        """Whether the adapter says that it changes this module; False where it does not say which ones it changes."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == end or module.endswith("." + end) for end in self.targets or ())


def _targets(config: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    """``target_modules``, where that alone says which modules are changed."""
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules") or targets == "all-linear":
        return None
    if isinstance(targets, str):
        return targets if _is_pattern(targets) else None
    return tuple(targets) if isinstance(targets, list) and all(isinstance(t, str) for t in targets) else None


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (get_pattern_key): the first pattern that is the module's name or an end of it behind a dot."""
    return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


def _are_patterns(patterns: Any) -> bool:
    return isinstance(patterns, dict) and all(_is_pattern(rf"(.*\.)?({key})$") for key in patterns)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check(path: Path, name: str, value: Any, holds: bool, zh: str, en: str = "") -> None:
    if not holds:
        raise refused(
            path,
            f"的 {name} 是 {value!r}，只支持 {zh}",
            f"has {name} = {value!r}, and only {en or zh} is possible",
        )
