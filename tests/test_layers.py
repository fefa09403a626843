"""Who may import whom (docs/architecture.md says why), and that the cheap modules stay cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SERVER = ROOT / "server"
FILES = sorted(SERVER.rglob("*.py"))
START = {"config", "options", "option_types", "help_page", "i18n"}
START |= {"profiles", "footprint", "hardware", "memory", "download"}

PYDANTIC = {"pydantic", "pydantic_core", "annotated_types"}

# own packages and third parties that each part may import; "server" modules are named by their first part
ALLOWED = {
    "core": ({"errors"}, set()),
    "errors": (set(), set()),
    "i18n": ({"errors"}, set()),
    "config": ({"core", "errors", *START}, {"tomli"}),
    "options": ({"option_types", "help_page"}, set()),
    "option_types": (set(), set()),
    "help_page": ({"option_types"}, set()),
    "footprint": ({"core", "errors", *START}, set()),
    "profiles": ({"core", "errors", *START}, set()),
    "adapters": ({"core", "errors", *START}, set()),
    "hardware": ({"core", "errors", "kernels", *START}, {"psutil", "pynvml"}),
    "memory": (set(), {"psutil"}),
    "download": ({"core", "errors", "file_lock", "converted", *START}, {"huggingface_hub", "httpx2", "tqdm"}),
    "kernels": ({"kernels"}, {"torch", "numpy"}),
    "quant": ({"quant", "kernels", "converted", "converting"}, {"torch", "numpy", "safetensors", "xxhash"}),
    "models": (
        {"models", "kernels", "core", "errors", "converted", "converting", "file_lock"},
        {"torch", "numpy", "sentencepiece"},
    ),
    "engine": ({"engine", "models", "quant", "kernels", "config", "core", "errors"}, {"torch", "numpy"}),
    "api": ({"api", "core", "errors"}, {"flask", "flask_cors", "waitress", "werkzeug", *PYDANTIC}),
    "file_lock": (set(), set()),
    "converted": ({"file_lock"}, {"xxhash"}),
    "converting": ({"converted"}, {"torch", "xxhash"}),
    "spool": ({"spool", "file_lock", "core", "errors"}, set()),
    "assembly": (
        {"config", "profiles", "adapters", "hardware", "download", "engine", "models", "kernels", "core", "errors"},
        {"torch", "tqdm"},
    ),
    "serve": (
        {"assembly", "config", "profiles", "hardware", "download", "api", "spool", "running", "core", "errors"},
        {"waitress"},
    ),
    "prune": (
        {"assembly", "adapters", "models", "converted", "converting", "file_lock", "core", "errors", *START},
        {"torch"},
    ),
    "running": (set(), set()),
    "logfile": (set(), set()),
    "chat": ({"chat", "assembly", "config", "core", "errors"}, {"prompt_toolkit"}),
    # "system" is the project's folder of that name, whose modules need no packages either
    "doctor": (
        {"doctor", "adapters", "converted", "running", "logfile", "kernels", "models", "core", "errors", *START},
        {"psutil", "system"},
    ),
    "__main__": ({"serve", "chat", "download", "prune", "doctor", "config", "i18n", "errors", "logfile"}, set()),
}


def part(path: Path) -> str:
    return path.relative_to(SERVER).parts[0].removesuffix(".py")


def imports(path: Path):
    """(line, module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def allowed_for(path: Path):
    own, third = ALLOWED[part(path)]
    if path.name == "embedder.py":  # sentence models are of many kinds, and transformers knows them all
        return own, third | {"transformers"}
    if path.parent.name == "doctor" and path.name == "child.py":  # runs in a process of its own
        return own, third | {"torch"}
    # the one place where a checkpoint's weights become quantized layers
    return (own | {"quant"}, third) if path.name in ("filler.py", "loader.py") else (own, third)


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own, third = allowed_for(path)
    for line, module in imports(path):
        assert not module.startswith("."), f"{path}:{line}: relative import"
        top, *rest = module.split(".")
        if top == "server":
            assert rest and (rest[0] in own), f"{path}:{line}: {part(path)} must not import {module}"
        else:
            assert top in sys.stdlib_module_names or top in third, f"{path}:{line}: {part(path)} must not import {top}"


def test_no_module_bears_a_name_of_the_standard_library():
    """The embedded Python may put server/ itself on the path."""
    for path in FILES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        assert name.startswith("__") or name not in sys.stdlib_module_names, path


def test_nobody_imports_tools_or_tests():
    for path in FILES:
        assert not any(module.split(".")[0] in {"tools", "tests", "benchmarks"} for _, module in imports(path)), path


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("server.core", {"torch", "flask", "pydantic"}),
        ("server.__main__", {"torch", "flask", "transformers", "huggingface_hub"}),
        ("server.config", {"torch", "flask", "huggingface_hub"}),
        ("server.profiles", {"torch"}),
        ("server.hardware", {"torch"}),
        ("server.download", {"torch", "huggingface_hub", "httpx2"}),
        ("server.download.command", {"torch", "flask", "huggingface_hub", "httpx2"}),
        ("server.api.app", {"torch", "transformers", "sentencepiece"}),
        ("server.engine.local", {"flask", "transformers", "waitress"}),
        ("server.engine.embedder", {"flask", "transformers", "huggingface_hub"}),
        ("server.spool.loop", {"torch", "flask", "pydantic"}),
        ("server.prune", {"torch", "flask", "transformers", "huggingface_hub"}),
        ("server.converted", {"torch", "numpy", "xxhash"}),
        ("server.assembly", {"torch", "transformers", "huggingface_hub"}),
        ("server.serve", {"torch", "flask", "transformers", "huggingface_hub"}),
        ("server.doctor", {"torch", "numpy", "psutil", "pydantic", "flask", "tqdm", "huggingface_hub"}),
        ("server.chat", {"torch", "flask", "prompt_toolkit", "huggingface_hub"}),
        ("server.chat.remote", {"torch", "flask", "pydantic"}),
        ("server.chat.terminal", {"torch", "flask", "pydantic"}),
    ],
)
def test_importing_stays_cheap(module, unwanted):
    code = f"import sys, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
