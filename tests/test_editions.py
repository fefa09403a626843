"""A machine that computes with 4 bits is offered the official int4 edition: what is taken, and what is said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from server.config import Config
from server.download.editions import INT4, SHAPES, Choice, Editions, choose_edition, find_editions
from server.download.folder import CHAT, DEFAULT_MODEL
from server.errors import StartupError
from server.footprint import ModelShape
from tests.hub_server import Hub
from tests.oracle import oracle_file
from tests.test_download import FIRST, FIRST_GENERATION, MODEL, SECOND, SHARDS, files, start
from tests.test_profiles import CHATGLM2_6B, machine

INT4_MODEL = {
    "config.json": b'{"quantization_bit": 4}',
    "tokenizer.model": b"t" * 2000,
    "pytorch_model.bin": b"4" * 123_456,
}
NOWHERE = "http://127.0.0.1:9"
FULL, SMALL = "chatglm2-6b", "chatglm2-6b-int4"
# of the editions' files together, as the hub lists them
FULL_SIZE, SMALL_SIZE = (f"{sum(map(len, model.values())) / 1e6:.1f} MB" for model in (MODEL, INT4_MODEL))
ON_CPU = ("--device", "cpu")

SCRIPT = """
import sys
from pathlib import Path
from server.config import parse
from server.download import ensure_edition, manifest
from server.errors import StartupError
manifest.MANIFEST = Path(sys.argv[1]) / "manifest.json"
config = parse(sys.argv[2:])
try:
    print("FOLDER", ensure_edition(config, Path(sys.argv[1])).name)
except StartupError as error:
    print(error.text(config.language), file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def hub():
    with Hub({f"THUDM/{FULL}": MODEL, f"THUDM/{SMALL}": INT4_MODEL}) as hub:
        yield hub


def get(root: Path, endpoint: str, *argv: str, language: str = "en") -> tuple[str, str]:
    """The name of the folder that is used, and what was said before."""
    process = start(root, endpoint, *ON_CPU, "--language", language, *argv, script=SCRIPT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    said, folder = re.fullmatch(r"(.*)FOLDER (\S+)\n", out, re.DOTALL).groups()
    return folder, said


def fill(root: Path, name: str, model: dict[str, bytes]) -> Path:
    folder = root / "THUDM" / name
    folder.mkdir(parents=True)
    for file, content in model.items():
        (folder / file).write_bytes(content)
    return folder


# with a hub


@pytest.mark.parametrize("argv", [["--profile", "small"], ["-q", "4"], ["--profile", "medium", "-q", "4"]], ids=str)
def test_default_model_in_4_bits_is_the_int4_edition(argv, hub, tmp_path):
    folder, said = get(tmp_path, hub.url, *argv)
    assert folder == SMALL and files(tmp_path / "THUDM" / SMALL) == INT4_MODEL
    assert said.startswith(
        f"4 bits are used here, so the official int4 edition {SMALL} ({SMALL_SIZE}) is downloaded, not the full model "
        f"({FULL_SIZE}); for that one add --model {FULL}.\n"
    )
    asked = len(hub.requests)
    for endpoint in (hub.url, NOWHERE):  # the second start makes the same choice, without the network
        folder, said = get(tmp_path, endpoint, *argv)
        assert folder == SMALL and said.count("\n") == 1
    assert len(hub.requests) == asked and not (tmp_path / "THUDM" / FULL).exists()


def test_in_chinese(hub, tmp_path):
    _, said = get(tmp_path, hub.url, "--profile", "small", language="zh")
    assert said.startswith(
        f"这里用 4 位运行，所以下载官方的 int4 版 {SMALL}（{SMALL_SIZE}），不下载完整版（{FULL_SIZE}）；"
        f"要完整版请加 --model {FULL}。\n"
    )
    _, said = get(tmp_path, NOWHERE, "--profile", "small", language="zh")
    assert said == f"没有 {FULL}，用已有的官方 int4 版 {SMALL}；要下载完整版请加 --model {FULL}。\n"


@pytest.mark.parametrize("name", [FULL, DEFAULT_MODEL, f"zai-org/{FULL}"])
def test_a_model_that_is_named_is_downloaded_as_named(name, hub, tmp_path):
    folder, said = get(tmp_path, hub.url, "--profile", "small", "--model", name)
    assert folder == FULL and files(tmp_path / "THUDM" / FULL) == MODEL
    assert said.startswith(
        f"4 bits are used here: the official int4 edition ({SMALL_SIZE}) would do, smaller than the full model "
        f"({FULL_SIZE}); for that one use --model {SMALL}.\n"
    )
    assert get(tmp_path, NOWHERE, "--profile", "small", "--model", name) == (FULL, "")
    assert get(tmp_path, NOWHERE, "--profile", "small") == (FULL, "")  # a complete full model is always used


@pytest.mark.parametrize(
    ("full", "small", "model"),
    [("chatglm-6b", "chatglm-6b-int4", FIRST_GENERATION), ("chatglm2-6b-32k", "chatglm2-6b-32k-int4", MODEL),
     ("codegeex2-6b", "codegeex2-6b-int4", MODEL)],
)  # fmt: skip
def test_other_models_are_named_and_have_editions_too(full, small, model, hub, tmp_path):
    hub.repositories = {f"THUDM/{full}": model, f"zai-org/{small}": INT4_MODEL}
    folder, said = get(tmp_path, hub.url, "-q", "4", "--model", full, language="zh")
    assert folder == full and files(tmp_path / "THUDM" / full) == model
    assert f"官方的 int4 版（{SMALL_SIZE}）就够了" in said and f"要它请改用 --model {small}。" in said


def test_more_bits_download_the_full_model(hub, tmp_path):
    fill(tmp_path, SMALL, INT4_MODEL)
    folder, said = get(tmp_path, hub.url, "--profile", "medium")
    assert folder == FULL and said.startswith("Downloading")


def test_a_hub_that_does_not_know_the_other_edition(hub, tmp_path):
    del hub.repositories[f"THUDM/{FULL}"]
    folder, said = get(tmp_path, hub.url, "-q", "4")
    assert folder == SMALL and f"{SMALL} ({SMALL_SIZE}) is downloaded, not the full model; for" in said


def test_a_half_finished_full_model_is_gone_on_with(hub, tmp_path):
    folder = fill(tmp_path, FULL, {FIRST: SHARDS[FIRST]})
    name, said = get(tmp_path, hub.url, "--profile", "small")
    assert name == FULL and files(folder) == MODEL
    assert SECOND in hub.fetched() and FIRST not in hub.fetched()
    assert f"use --model {SMALL}" in said


def test_a_download_that_was_killed_makes_the_same_choice_again(hub, tmp_path):
    hub.stall["pytorch_model.bin"] = 50_000
    process = start(tmp_path, hub.url, *ON_CPU, "-q", "4", script=SCRIPT)
    assert hub.stalled.wait(30)
    process.kill()
    process.communicate()
    hub.stall.clear()
    assert get(tmp_path, hub.url, "-q", "4")[0] == SMALL
    assert files(tmp_path / "THUDM" / SMALL) == INT4_MODEL and not (tmp_path / "THUDM" / FULL).exists()


def test_a_disk_that_is_too_small_for_the_named_model_hears_of_the_other_one(hub, tmp_path):
    hub.claimed[FIRST] = 10**15
    process = start(tmp_path, hub.url, *ON_CPU, "-q", "4", "--model", FULL, script=SCRIPT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "are needed" in err and f"--model {SMALL}" in out


# without one


def editions(has_small: bool = False, is_begun: bool = False) -> Editions:
    return Editions(FULL, SMALL, ModelShape.from_config(CHATGLM2_6B), has_small, is_begun)


@pytest.mark.parametrize(
    ("hardware", "config", "name"),
    [
        (machine(6), Config(), SMALL),
        (machine(8), Config(), SMALL),
        (machine(10), Config(), FULL),
        (machine(24), Config(), FULL),
        (machine(24), Config(profile="small"), SMALL),
        (machine(24), Config(quantize=4), SMALL),
        (machine(6), Config(profile="large"), FULL),
        (machine(6), Config(quantize=8), FULL),
        (machine(ram=6), Config(), SMALL),
        (machine(ram=6), Config(profile="cpu"), SMALL),
        (machine(ram=9), Config(), FULL),
        (machine(ram=32), Config(), FULL),
        (machine(3, ram=6), Config(), SMALL),
        (machine(3, ram=32), Config(), FULL),
        (machine(3), Config(profile="small"), SMALL),  # neither edition fits: the smaller download, with a warning
    ],
    ids=str,
)
def test_what_is_downloaded_where_nothing_is_there(hardware, config, name):
    assert choose_edition(editions(), hardware, config).name == name
    choice = choose_edition(editions(), hardware, replace(config, model=FULL))
    assert choice.name == FULL and bool(choice.said) == (name == SMALL)


@pytest.mark.parametrize(
    ("config", "name"),
    [(Config(), SMALL), (Config(profile="small"), SMALL), (Config(profile="cpu"), SMALL), (Config(quantize=4), SMALL),
     (Config(profile="medium"), FULL), (Config(profile="large"), FULL), (Config(quantize=16), FULL),
     (Config(quantize=8), FULL), (Config(model=FULL), FULL)],
    ids=str,
)  # fmt: skip
def test_an_int4_edition_that_is_there_saves_a_download(config, name):
    for hardware in (machine(24), machine(ram=64)):
        assert choose_edition(editions(has_small=True), hardware, config).name == name


def test_what_is_begun_is_gone_on_with():
    for has_small in (False, True):
        assert choose_edition(editions(has_small, is_begun=True), machine(6), Config()).name == FULL
    assert choose_edition(editions(is_begun=True), machine(24), Config()) == Choice(FULL)


def test_lora_is_merged_into_the_full_model():
    for has_small in (False, True):
        for model in (None, FULL):
            config = Config(model=model, lora=Path("adapter"))
            assert choose_edition(editions(has_small), machine(6), config) == Choice(FULL)
    assert choose_edition(editions(), machine(6), Config(model=FULL)).said  # which without an adapter is recommended


@pytest.mark.parametrize(
    ("hardware", "config"),
    [(machine(5.2), Config()), (machine(5.2), Config(profile="small")), (machine(ram=5.2), Config()),
     (machine(3, ram=5.2), Config())],
    ids=str,
)  # fmt: skip
def test_an_edition_that_does_not_fit_where_the_full_model_does(hardware, config):
    """Its output matrix has 16 bits, so that it takes 0.35 GiB more than the full model in 4 bits."""
    choice = choose_edition(editions(), hardware, config)
    assert choice.name == FULL and "more memory than is free" in choice.said.en
    assert choose_edition(editions(), hardware, replace(config, model=FULL)) == Choice(FULL)


def test_a_machine_for_neither_hears_it_before_the_download():
    with pytest.raises(StartupError, match="Not enough memory"):
        choose_edition(editions(), machine(3, ram=4), Config())


def test_only_a_folder_of_ours_has_editions(tmp_path):
    assert find_editions(FULL, tmp_path) == editions()
    assert find_editions("chatglm3-6b", tmp_path) is None
    assert find_editions(SMALL, tmp_path) is None
    own = tmp_path / "mine" / FULL
    own.mkdir(parents=True)
    assert find_editions(str(own), tmp_path) is None
    fill(tmp_path, SMALL, INT4_MODEL)
    folder = fill(tmp_path, FULL, {FIRST: SHARDS[FIRST]})
    assert find_editions(DEFAULT_MODEL, tmp_path) == editions(has_small=True, is_begun=True)
    for file, content in MODEL.items():
        (folder / file).write_bytes(content)
    assert find_editions(FULL, tmp_path) is None


def test_every_published_model_has_a_shape():
    assert set(SHAPES) == set(CHAT.repositories)
    assert {name for name in SHAPES if name.endswith("-int4")} == set(INT4.values())
    for name, shape in SHAPES.items():
        bits = re.search(r"-int(\d)", name)
        assert shape.stored_bits == (int(bits[1]) if bits else 16)
        assert shape.causal_prompt == (not name.startswith("chatglm-6b"))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_official_config_json(name):
    file = {"chatglm2-6b": "chatglm2-6b-first-release"}.get(name, name)
    config = json.loads(oracle_file("configs", f"{file}.json").read_text(encoding="utf-8"))
    assert SHAPES[name] == ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("chatglm-6b-int4", ["-q", "8"], "stored in 4 bits, -q 8"),
        ("chatglm-6b-int8", ["-q", "4"], "stored in 8 bits, -q 4"),
        (SMALL, ["-q", "16"], "stored in 4 bits, -q 16"),
        ("chatglm3-6b", ["--max-length", "9000"], "this model knows 8192 tokens"),
        ("chatglm-6b", ["--max-length", "4096"], "this model knows 2048 tokens"),
    ],
    ids=str,
)
def test_what_is_impossible_is_refused_before_the_download(model, options, said, hub, tmp_path):
    process = start(tmp_path, hub.url, *ON_CPU, "--language", "en", *options, "--model", model, script=SCRIPT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and said in err, out + err
    assert not hub.requests
