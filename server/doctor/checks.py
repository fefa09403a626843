"""The table of checks: what each looks at and who judges it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.converted import quantized_file
from server.doctor import graphics, host, model, network, plan, port, runtime
from server.doctor.children import ChildFailed, ask
from server.doctor.machine import GPU_SECONDS, TORCH_SECONDS, Machine
from server.doctor.place import judge_disk, judge_place, read_disk, read_place
from server.doctor.result import SECONDS, Check, Result, conclude, problem
from server.download.folder import repositories
from server.download.manifest import known_files
from server.errors import ServerError, StartupError
from server.kernels.build import find_compiler
from server.memory import read_memory
from server.profiles import ITEM_BYTES, Note

NOT_NEEDED = Note("这个系统不需要", "not needed on this system")
LATER = GPU_SECONDS + SECONDS  # what has to wait for the look at the GPUs


def all_checks(machine: Machine, settings: ServerError | None) -> list[Check]:
    """In the order of the page; ``settings`` is what is wrong with config.toml or the environment, if anything is."""
    here = machine
    return [
        Check("system", Note("系统", "system"), lambda: host.judge_system(host.read_system())),
        Check("python", Note("Python", "Python"), lambda: host.judge_python(host.read_python(here.root, here.env))),
        Check("packages", Note("依赖包", "packages"), lambda: _packages(here)),
        Check("folder", Note("文件夹", "folder"), lambda: judge_place(read_place(here.root, here.env))),
        Check("settings", Note("设置", "settings"), lambda: _settings(here, settings)),
        Check("vcruntime", Note("运行库", "VC++"), _runtime),
        Check("gpu", Note("显卡", "GPU"), lambda: _gpus(here), GPU_SECONDS),
        Check("torch", Note("PyTorch", "PyTorch"), lambda: _torch(here), TORCH_SECONDS),
        Check("memory", Note("内存", "memory"), lambda: plan.judge_memory(read_memory())),
        Check("disk", Note("磁盘", "disk"), lambda: _disk(here), LATER),
        Check("model", Note("模型文件", "model"), lambda: _model(here), LATER),
        Check("profile", Note("档位", "profile"), lambda: _profile(here), LATER),
        Check("needs", Note("预计占用", "needs"), lambda: _needs(here), LATER),
        Check("kernels", Note("内核", "kernels"), lambda: _kernels(here), LATER),
        Check("port", Note("端口", "port"), lambda: port.judge_port(here.port())),
        Check("proxy", Note("代理", "proxy"), lambda: network.judge_proxies(network.read_proxies())),
        Check("lan", Note("局域网", "LAN"), lambda: _lan(here)),
    ]


def _packages(here: Machine) -> Result:
    wanted = host.wanted_packages((here.root / "requirements.txt").read_text(encoding="utf-8"))
    return host.judge_packages(wanted, host.installed_packages(list(wanted)), host.was_cut_short(here.root))


def _settings(here: Machine, wrong: ServerError | None) -> Result:
    if wrong:
        do = ("改正它；其余检查按默认设置进行", "correct it; the other checks go by the defaults")
        return conclude(None, [problem(wrong.zh, wrong.en, do=do)], facts={"file": None})
    file, default = here.config.config, Note("没有 config.toml，用默认设置", "the defaults, there is no config.toml")
    return conclude(Note(str(file), str(file)) if file else default, facts={"file": str(file) if file else None})


def _runtime() -> Result:
    return runtime.judge_runtime(runtime.find_runtime()) if sys.platform == "win32" else conclude(NOT_NEEDED)


def _gpus(here: Machine) -> Result:
    return graphics.judge_gpus(here.gpus(), graphics.find_adapters(), here.env, bool(shutil.which("nvidia-smi")))


def _torch(here: Machine) -> Result:
    found: Mapping[str, Any] | ChildFailed
    try:
        found = here.torch()
    except ChildFailed as failure:
        found = failure
    return runtime.judge_torch(found, bool(here.hardware().gpus))


def _disk(here: Machine) -> Result:
    """The sizes are 0 where the model or its shape cannot be known: the checks of the model say why."""
    missing, kept, folder = 0, 0, here.root
    try:
        folder, lacking = here.model()
        profile, shape = here.profile()
        missing = _left_to_download(here) if lacking else 0
        if profile.kernels and not quantized_file(folder, profile.bits).is_file():
            kept = shape.weight_bytes(profile.bits, 2)
    except Exception:
        pass
    return judge_disk(read_disk(folder, missing, kept))


def _left_to_download(here: Machine) -> int:
    """Bytes of the weights as they are published (codes without padding, everything else in 16 bits) that are not
    there yet, nor in the part of a download that was broken off."""
    shape, folder = here.shape(), here.model().folder
    plain = shape.output + shape.rest - (shape.output if shape.tied else 0)
    weights = {path for pattern in model.WEIGHTS for end in ("", ".part") for path in folder.glob(pattern + end)}
    there = sum(path.stat().st_size for path in weights)
    return max(0, shape.layers * shape.stored_bits // 8 + plain * 2 - there)


def _model(here: Machine) -> Result:
    found = here.model()
    size = _left_to_download(here) if found.missing else None
    return model.check_model_files(found, here.config, here.root, size, _published(here, found.folder))


def _published(here: Machine, folder: Path) -> model.Published:
    """Sizes and sums from the download's manifest; of our own folders alone."""
    if not repositories(folder, here.root):
        return {}
    return {file: (known.size, known.sha256) for file, known in known_files(folder.name).items()}


def _profile(here: Machine) -> Result:
    try:
        found = plan.judge_profile(here.profile()[0])
    except StartupError as error:  # nothing fits
        found = conclude(None, [problem(error.zh, error.en, do=None)])
    return plan.beside_itself(found) if here.port().ours else found


def _needs(here: Machine) -> Result:
    profile, shape = here.profile()
    weights = shape.weight_bytes(profile.bits, 2 if profile.kernels else ITEM_BYTES[profile.dtype])
    found = plan.judge_needs(profile, weights, here.hardware(), read_memory())
    return plan.beside_itself(found) if here.port().ours else found


def _kernels(here: Machine) -> Result:
    loaded: Mapping[str, Any] | ChildFailed
    try:
        loaded = ask("kernels", SECONDS)
    except ChildFailed as failure:
        loaded = failure
    try:
        on_gpu = here.profile()[0].device != "cpu"
    except Exception:  # that check says it
        on_gpu = False
    return runtime.judge_kernels(loaded, find_compiler(), on_gpu)


def _lan(here: Machine) -> Result:
    return network.judge_lan(network.find_addresses(), here.config.host, here.config.port)
