"""The zip: what is in it, and from unpacking to the first answer."""

import hashlib
import json
import re
import time
import zipfile
from itertools import pairwise

import pytest

from tests.conftest import ROOT
from tests.wheels import make_wheel
from tests.windows.bundle import Running
from tests.windows.conftest import NASTY, figures, unpack
from tools import build_bundle

TOP = "chatglm-portable/"


@pytest.fixture(scope="module")
def manifest(archive):
    with zipfile.ZipFile(archive) as packed:
        return json.loads(packed.read(TOP + "manifest.json"))


def test_from_unpacking_to_the_first_answer(rig, archive, port):
    """On a Chinese Windows without the VC++ runtime, by a double-click, with nothing in any cache."""
    started = time.monotonic()
    bundle = unpack(rig, archive, NASTY)
    unpacked = time.monotonic()
    with Running(bundle, "开启API服务.bat", "--port", str(port)) as server:
        texts = [event["response"] for event in server.events("你好", answer_prefix="你")]
        answered = time.monotonic()
        assert texts[0].startswith("你") and len(texts) > 5 and "演示模型" in texts[-1]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert "已就绪" in server.text, "the user reads Chinese"
    figures["unpacked in"] = f"{unpacked - started:.0f} s (by Python's zipfile)"
    figures["from double-click to the answer's end"] = f"{answered - unpacked:.0f} s"


def test_every_file_is_what_the_manifest_says(archive, manifest):
    with zipfile.ZipFile(archive) as packed:
        names = {item.filename.removeprefix(TOP) for item in packed.infolist()}
        assert names == {*manifest["files"], "manifest.json"}
        for name, digest in manifest["files"].items():
            assert hashlib.sha256(packed.read(TOP + name)).hexdigest() == digest, name


def test_nothing_of_the_building_machine_is_inside(archive, manifest):
    """No Linux libraries, byte code or programs without a signature, nor paths of this machine in records."""
    odd = re.compile(r".*\.(so|pyc|whl)(\.\d+)*|.*/Scripts/.*|(tests|tools|benchmarks|\.ci)/.*")
    assert not [name for name in manifest["files"] if odd.fullmatch(name)]
    programs = {name.rpartition("/")[0] for name in manifest["files"] if name.endswith(".exe")}
    # pip makes launchers of those that it has
    assert programs == {"system/python", "system/python/Lib/site-packages/pip/_vendor/distlib"}
    with zipfile.ZipFile(archive) as packed:
        for name in manifest["files"]:
            if name.endswith("/RECORD"):
                assert str(ROOT).encode() not in packed.read(TOP + name)


def test_paths_leave_room_for_the_users_folder(manifest):
    assert manifest["longest_path"] <= 150
    assert manifest["longest_path"] == max(map(len, manifest["files"]))


def test_every_package_of_the_lock_is_inside_with_its_licence(archive, manifest):
    pinned = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "system" / "windows-lock.txt").read_text(), re.MULTILINE)
    inside = {}
    for name in manifest["files"]:
        if found := re.fullmatch(r".*/site-packages/([\w.]+)-([^-/]+)\.dist-info/METADATA", name):
            inside[found[1].lower().replace("_", "-").replace(".", "-")] = found[2]
    assert inside == dict(pinned)
    with zipfile.ZipFile(archive) as packed:
        table = packed.read(TOP + "licences/README.md").decode()
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= len(pinned) + 3
    for row in rows:
        assert row[2].strip(), row  # a licence is named
        for path in re.findall(r"\(<([^>]+)>\)", row[3]):
            assert path.removeprefix("../") in manifest["files"] or f"licences/{path}" in manifest["files"], path


def test_same_inputs_give_the_same_bytes(archive, tools, tmp_path):
    assert build_bundle.main(["--python", "copy", "--out", str(tmp_path), "--cache", str(tools)]) == 0
    assert _sha256(tmp_path / archive.name) == _sha256(archive)


def test_bundle_for_cuda(archive, tools, tmp_path):
    """Without PyTorch, and with a wheel of it: here a tiny one of the right name."""
    build = ["--build", "cu126", "--python", "copy", "--out", str(tmp_path), "--cache", str(tools)]
    assert build_bundle.main(build) == 0
    assert _inside(tmp_path) == {"torch": False, "installed.json": False}
    make_wheel(tmp_path, "torch", "2.13.0+cu126")
    (wheel,) = tmp_path.glob("torch-*.whl")
    wheel = wheel.rename(wheel.with_name("torch-2.13.0+cu126-cp311-cp311-win_amd64.whl"))
    assert build_bundle.main([*build, "--torch", str(wheel)]) == 0
    assert _inside(tmp_path) == {"torch": True, "installed.json": True}


def _inside(folder) -> dict[str, bool]:
    """Whether the CUDA bundle has PyTorch, and the note by which a start installs nothing."""
    (archive,) = folder.glob("chatglm-portable-*-cu126.zip")
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    return {"torch": any("/torch-2.13.0" in name for name in names),
            "installed.json": TOP + "system/python/installed.json" in names}  # fmt: skip


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
