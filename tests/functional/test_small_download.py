"""The real program on a small machine, with nothing but itself: it fetches the int4 edition and answers."""

import io
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.functional.program import Program
from tests.hub_server import Hub
from tools.official_packing import pack_checkpoint

DEMO = ROOT / "THUDM" / "demo"
NOWHERE = "http://127.0.0.1:9"
SMALL = "chatglm2-6b-int4"


@pytest.fixture
def root(tmp_path):
    """A copy of the program without a model, which takes the demo's files for the published ones."""
    shutil.copytree(ROOT / "server", tmp_path / "server", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "server" / "download" / "manifest.json").write_text("{}")
    return tmp_path


def official_int4() -> dict[str, bytes]:
    """The demo as the official int4 checkpoint: its files, packed rows in one pickle."""
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    weights = io.BytesIO()
    torch.save(pack_checkpoint(load_file(DEMO / "model.safetensors"), 4), weights)
    return {
        "config.json": json.dumps({**config, "quantization_bit": 4}).encode(),
        "tokenizer.model": (DEMO / "tokenizer.model").read_bytes(),
        "pytorch_model.bin": weights.getvalue(),
    }


def start(root, endpoint, *options, model="auto", **keywords) -> Program:
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return Program("--device", "cpu", *options, model=model, root=root, env=env, **keywords)


def test_small_profile_downloads_the_int4_edition_and_answers(root):
    edition = official_int4()
    with Hub({f"zai-org/{SMALL}": edition, "zai-org/chatglm2-6b": {"pytorch_model.bin": b"f" * 10**7}}) as hub:
        with start(root, hub.url, "--profile", "small") as program:
            said = program.text
            answer = program.ask("你好", max_tokens=20)
            models = json.loads(get(program, "/v1/models"))
            assert program.stop() == 0
        folder = root / "THUDM" / SMALL
        size = sum(map(len, edition.values())) / 1e6
        assert (
            f"the official int4 edition {SMALL} ({size:.1f} MB) is downloaded, not the full model (10.0 MB); "
            "for that one add --model chatglm2-6b."
        ) in said
        assert f"model: {folder} (ChatGLM2)\n" in said and re.search(r"profile: cpu \(int4, .* on cpu", said)
        assert answer.strip() and models["data"][0]["id"] == SMALL
        assert set(hub.fetched()) == set(edition)
    with start(root, NOWHERE) as again:  # no profile is named: what is there is used
        assert f"its official int4 edition {SMALL} is, and is used" in again.text
        assert again.ask("你好", max_tokens=20).strip()


def get(program, path) -> bytes:
    connection = program.connect()
    connection.request("GET", path)
    return connection.getresponse().read()
