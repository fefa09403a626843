"""What computes: the Visual C++ runtime, PyTorch, and the CPU kernels."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from server.doctor.children import ChildFailed
from server.doctor.host import SETUP
from server.doctor.plan import PAGE_FILE
from server.doctor.result import Complaint, Result, conclude, problem, warning
from server.profiles import OLDEST_GPU, Note
from system.torch_builds import CUDA_BUILDS

# PyTorch's DLLs ask for these; Python itself brings the first two
RUNTIME = ("vcruntime140.dll", "vcruntime140_1.dll", "msvcp140.dll")
NEWER_RUNTIME = ("msvcp140_atomic_wait.dll", "vcruntime140_threads.dll")  # asked for by later PyTorch versions
GET_RUNTIME = ("运行 setup_offline.bat，或安装 https://aka.ms/vs/17/release/vc_redist.x64.exe",
               "run setup_offline.bat, or install https://aka.ms/vs/17/release/vc_redist.x64.exe")  # fmt: skip
_SHOWN = 200  # characters of an error


def find_runtime(env: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Where each DLL is that a program of this Python would load: beside python.exe, or the system's."""
    system = Path(env.get("SystemRoot", r"C:\Windows"), "System32")
    folders = [Path(sys.executable).parent, Path(sys.base_prefix), system]
    return {name: find_file(name, folders) for name in (*RUNTIME, *NEWER_RUNTIME)}


def find_file(name: str, folders: Iterable[Path]) -> str | None:
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def judge_runtime(found: Mapping[str, str | None]) -> Result:
    missing = [name for name in RUNTIME if not found[name]]
    newer = [name for name in NEWER_RUNTIME if not found[name]]
    there = len(found) - len(missing) - len(newer)
    said = Note(f"{len(found)} 个 DLL 里有 {there} 个", f"{there} of {len(found)} DLLs are there")
    complaints: list[Complaint] = []
    if missing:
        complaints.append(problem(f"缺 {'、'.join(missing)}，PyTorch 会报错 126（c10.dll）",
                                  f"missing: {', '.join(missing)}; PyTorch fails with error 126 (c10.dll)",
                                  do=GET_RUNTIME))
    if newer:
        complaints.append(warning(f"缺较新的 {'、'.join(newer)}", f"missing, as older runtimes lack them: "
                                  f"{', '.join(newer)}", do=GET_RUNTIME))
    return conclude(said, complaints, facts=dict(found))


def judge_torch(found: Mapping[str, Any] | ChildFailed, has_gpu: bool) -> Result:
    """``found``: what ``child.look_at_torch`` returned, or how its process ended."""
    if isinstance(found, ChildFailed):
        facts = {"error": str(found), "output": found.output}
        complaint = problem(f"加载 PyTorch 的进程没有正常结束（{found}）",
                            f"the process that loaded PyTorch did not end well ({found})",
                            do=SETUP)
        return conclude(None, [complaint], facts=facts)
    if "version" not in found:
        return conclude(None, [_import_complaint(found)], facts=found)
    build = f"CUDA {found['cuda']}" if found["cuda"] else "CPU"
    said = Note(f"{found['version']}，{build} 版", f"{found['version']}, built for {build}")
    return conclude(said, _torch_complaints(found, has_gpu), facts=found)


def _import_complaint(found: Mapping[str, Any]) -> Complaint:
    error = str(found["error"])
    shown = error[:_SHOWN]
    if found.get("kind") == "ModuleNotFoundError":
        return problem(f"没有装好（{shown}）", f"not installed ({shown})", do=SETUP)
    if "WinError 1455" in error:
        return problem(f"页面文件太小（{shown}）", f"the page file is too small ({shown})", do=PAGE_FILE)
    if re.search(r"WinError (126|127|1114)\b", error):
        return problem(f"加载 DLL 失败，多半缺 VC++ 运行库（{shown}）",
                       f"a DLL does not load, mostly for lack of the VC++ runtime ({shown})", do=GET_RUNTIME)
    if re.search(r"WinError (225|1260|4551)\b", error):  # a virus, a policy, Smart App Control
        return problem(f"被杀毒软件或系统策略拦住了（{shown}）", f"a virus scanner or a policy stops it ({shown})",
                       do=("把本程序的文件夹加进杀毒软件的信任名单，再" + SETUP[0],
                           "let the virus scanner trust this program's folder, then " + SETUP[1]))  # fmt: skip
    return problem(f"加载失败（{shown}）", f"does not load ({shown})", do=SETUP)


def _torch_complaints(found: Mapping[str, Any], has_gpu: bool) -> list[Complaint]:
    if "error" in found:
        return [problem(f"算错了（{found['error']}）", f"it computes wrongly ({found['error']})", do=SETUP)]
    if not has_gpu:
        return []
    if not found["cuda"]:
        return [warning("有 NVIDIA 显卡，但装的是 CPU 版，显卡用不上",
                        "there is an NVIDIA GPU, but this build is for the CPU and does not use it",
                        do=("更新显卡驱动，" + SETUP[0], "update the driver, " + SETUP[1]))]  # fmt: skip
    if found.get("cuda_error"):
        major = found["cuda"].split(".")[0]
        driver = next((d for d, capability in CUDA_BUILDS.values() if capability == OLDEST_GPU.get(major)), None)
        needs = (f"，驱动至少要 {driver}", f"; the driver must be {driver} or later") if driver else ("", "")
        shown = found["cuda_error"][:_SHOWN]
        return [problem(f"显卡用不了（{shown}）{needs[0]}", f"it cannot use the GPU ({shown}){needs[1]}",
                        do=("更新显卡驱动并重启", "update the GPU's driver and restart"))]  # fmt: skip
    return []


def judge_kernels(loaded: Mapping[str, Any] | ChildFailed, compiler: list[str] | None, on_gpu: bool) -> Result:
    """``loaded``: what ``child.look_at_kernels`` returned; ``on_gpu``: the profile does not need them."""
    failed = isinstance(loaded, ChildFailed) or "error" in loaded
    facts = {"library": None if failed else loaded["library"], "compiler": compiler,
             "state": "none", "error": str(loaded if isinstance(loaded, ChildFailed) else loaded.get("error", ""))}
    command = f'"{sys.executable}" -m pip install ziglang'
    install = (f"安装 C 编译器再启动，例如运行 {command}", f"install a C compiler, with {command} say, and start again")
    if facts["library"]:
        facts["state"] = "compiled"
        return conclude(Note(f"已编译：{facts['library']}", f"compiled: {facts['library']}"), facts=facts)
    if compiler:
        facts["state"] = "can be compiled"
        said = Note(f"第一次启动时用 {' '.join(compiler)} 编译", f"to be compiled at the first start with "
                    f"{' '.join(compiler)}")  # fmt: skip
        bad = [warning(f"已有的库加载不了（{facts['error']}）", f"the library that is there does not load "
                       f"({facts['error']})", do=("不用管，会重新编译", "nothing: it is compiled again"))] * failed
        return conclude(said, bad, facts=facts)
    if on_gpu:
        return conclude(Note("没有，用显卡时不需要", "none, and not needed on a GPU"), facts=facts)
    return conclude(None, [warning("没有编译好的，也没有 C 编译器：用 PyTorch 计算，慢几十倍",
                                   "none, and no C compiler: PyTorch computes, dozens of times slower", do=install)],
                    facts=facts)  # fmt: skip
