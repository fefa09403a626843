"""The README's commands work as written, and the architecture map shows the code that is there."""

import re
import shlex
import subprocess

import pytest

from server.config import parse
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    return {path for path in listed.stdout.decode().split("\0") if path and (ROOT / path).exists()}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_two_commands_open_the_readme():
    assert commands()[:2] == ["./run.sh --model demo", "./run.sh test"]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("./run.sh")])
def test_commands_are_accepted(command):
    words = shlex.split(command)
    assert (ROOT / words[0]).is_file()
    if words[1:] != ["test"]:
        parse(words[1:], env={})


def test_the_configuration_file_in_the_text_is_read(tmp_path):
    """As a user types it: Windows' paths are what they look like."""
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "config.toml").write_text(block, encoding="utf-8")
    config = parse([], env={}, root=tmp_path)
    assert config.model == r"D:\模型\chatglm-6b"
    assert str(config.ptuning).endswith(r"D:\训练\output\checkpoint-3000")


def test_options_in_the_text_exist():
    options = set(re.findall(r"(--[a-z][a-z-]+)", README))
    known = set(re.findall(r"(--[a-z][a-z-]+)", _help()))
    assert options and options <= known | {"--help"}


def _help() -> str:
    from server.config import ROWS
    from server.help_page import help_text

    return help_text("run.sh", "serve", ROWS, "en")


def test_addresses_in_the_text_are_served():
    from server.api.routing import by_path

    named = set(re.findall(r"(?:GET|POST) (/[\w/-]*)", README))
    assert named and named <= set(by_path())


def test_files_in_the_text_exist():
    named = re.findall(r"`([^`\s]+\.(?:bat|sh|md))`", README) + re.findall(r"\]\(([^)]+)\)", README)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_map_names_every_module_and_nothing_else():
    there = tracked("server/*.py", "server/**/*.py", "tools/*.py", "benchmarks/*.py", "system/*.py")
    there = {p for p in there if not p.endswith("__init__.py")}
    named = set(re.findall(r"`((?:server|tools|benchmarks|system)/[^`]+\.py)`", MAP))
    assert named == there


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    called = [line for line in script.splitlines() if line.strip() and not line.startswith(("#", "set ", "cd "))]
    assert called == ["./run.sh test", "exec ./run.sh test --windows"]
