"""The zip: what is in it, and from unpacking to the first answer."""

import hashlib
import json
import re
import shutil
import time
import zipfile
from itertools import pairwise

import pytest

from server.converted import sha256
from tests.conftest import ROOT
from tests.models.reference import complete_folder
from tests.wheels import make_wheel
from tests.windows.bundle import Running
from tests.windows.conftest import CUDA, NASTY, figures, unpack
from tools import build_bundle, bundle_python

TOP = "chatglm-portable/"
MODEL = "THUDM/chatglm2-6b/"


@pytest.fixture(scope="module")
def manifest(archive):
    return _manifest(archive)


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


def test_same_inputs_give_the_same_bytes(manifest, cuda_archive, tools, tmp_path):
    """The bundle for CUDA, which is the quicker one to build; the other has the same files and PyTorch."""
    assert build_bundle.main([*CUDA, "--out", str(tmp_path), "--cache", str(tools)]) == 0
    assert sha256(tmp_path / cuda_archive.name) == sha256(cuda_archive)
    files = _manifest(cuda_archive)["files"]
    assert not [name for name in files if "/torch-" in name or name.endswith("/installed.json")]
    assert files.items() < manifest["files"].items()
    more = manifest["files"].keys() - files.keys()
    assert all("site-packages/torch" in name or name.endswith(("installed.json", "/torch.txt")) for name in more)


@pytest.fixture(scope="module")
def full_archive(tools, tmp_path_factory):
    """With a wheel of PyTorch for CUDA, a tiny one of the right name, and a model, of random weights."""
    folder = tmp_path_factory.mktemp("full")
    model = complete_folder("small-chatglm2", folder).rename(folder / "chatglm2-6b")
    (model / "MODEL_LICENSE").write_text("The ChatGLM2-6B License")
    (model / "pytorch_model.bin.part").write_text("left behind")
    make_wheel(folder / "wheels", "torch", "2.13.0+cu126")
    (wheel,) = (folder / "wheels").iterdir()
    wheel = wheel.rename(folder / "torch-2.13.0+cu126-cp311-cp311-win_amd64.whl")
    options = [*CUDA, "--torch", str(wheel), "--with-model", str(model), "--out", str(folder / "out")]
    assert build_bundle.main([*options, "--cache", str(tools)]) == 0
    (made,) = (folder / "out").iterdir()
    return made


def test_bundle_with_pytorch_and_a_model_inside(full_archive):
    assert re.fullmatch(r"chatglm-portable-[\d.]+-cu126-chatglm2-6b\.zip", full_archive.name)
    manifest = _manifest(full_archive)
    names = manifest["files"].keys()
    assert any("/torch-2.13.0+cu126.dist-info/" in name for name in names)
    assert "system/python/installed.json" in names, "a start installs nothing"
    assert manifest["build"] == "cu126" and manifest["model"] == "chatglm2-6b"
    model = {name.rpartition("/")[2] for name in names if name.startswith(MODEL)}
    assert model == {"config.json", "model.safetensors", "tokenizer.model", "MODEL_LICENSE"}
    with zipfile.ZipFile(full_archive) as packed:
        assert f"(<../{MODEL}MODEL_LICENSE>)" in packed.read(TOP + "licences/README.md").decode()


def test_model_inside_answers_by_a_double_click_without_a_network(bundle, full_archive, port):
    """Its files in the bundle that is unpacked already, which has the real PyTorch."""
    with zipfile.ZipFile(full_archive) as packed:
        packed.extractall(bundle.root.parent, [name for name in packed.namelist() if name.startswith(TOP + MODEL)])
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    try:
        with Running(bundle, "start_small_vram.bat", "--port", str(port), model="", env=nowhere) as server:
            *_, last = server.events("你好", answer_prefix="你", max_length=64)
            assert last["response"].startswith("你") and re.search(r"chatglm2-6b\b.*ChatGLM2", server.text, re.DOTALL)
            assert (bundle.root / MODEL / "MODEL_LICENSE").is_file()
    finally:
        shutil.rmtree(bundle.root / MODEL)


def test_program_of_python_without_a_good_signature_is_refused(tools, rig, tmp_path):
    files = bundle_python.unpack(bundle_python.obtain("copy", tools), tmp_path / "python")
    kept = tmp_path / "two"
    kept.mkdir()
    (kept / "python.exe").write_bytes(files["python.exe"])
    assert bundle_python.check_signatures(kept) == 1
    changed = bytearray(files["_ssl.pyd"])
    changed[5000] ^= 1
    (kept / "_ssl.pyd").write_bytes(changed)
    with pytest.raises(SystemExit, match=r"_ssl\.pyd bears no good signature"):
        bundle_python.check_signatures(kept)


def _manifest(archive) -> dict:
    with zipfile.ZipFile(archive) as packed:
        return json.loads(packed.read(TOP + "manifest.json"))
