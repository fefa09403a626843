"""What else has to know of models whose originals were deleted: the downloads, the doctor, the choice of a profile."""

import shutil

import pytest

from server import prune as module
from server.config import Config
from server.converted import kept
from server.doctor.machine import Machine, Model
from server.doctor.model import check_model_files
from server.doctor.result import State
from server.download import ensure_edition
from server.download.pruned import choose_for, wants_originals
from server.errors import StartupError
from server.footprint import ModelShape
from server.hardware import Hardware
from server.models import loader
from server.profiles import choose
from tests.hub_server import Hub
from tests.models.reference import OWN
from tests.pruning import DEMO, needs_compiler, pickled_demo, pickles, prune, run, without_hub

NAME = "chatglm2-6b"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return without_hub(tmp_path, monkeypatch)


@pytest.fixture
def mine(root):
    return pickled_demo(root / "我的 模型")


@needs_compiler
@pytest.mark.parametrize("kernels", [True, False])
def test_who_asks_for_nothing_gets_what_was_kept_and_who_asks_does_not(root, mine, monkeypatch, kernels):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    assert module.prune(Config(model=str(mine), quantize=4, device="cpu", language="en"), root) == 0
    here = Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=kernels)
    shape = ModelShape.from_folder(mine)
    chosen = choose_for(mine, here, shape, Config(model=str(mine)))
    if kernels:
        assert (chosen.bits, chosen.kernels) == (4, True)
    else:
        assert chosen == choose(here, shape, Config(model=str(mine)))
    lora = {"quantize": 4, "lora": OWN / "small-chatglm2-lora"}
    for asked in ({"quantize": 16}, {"profile": "large"}, {"dtype": "bfloat16"}, lora):
        config = Config(model=str(mine), device="cpu", **asked)
        chosen = choose_for(mine, here, shape, config)
        assert chosen == choose(here, shape, config)
        assert wants_originals(mine, here, config), asked


@needs_compiler
def test_other_weights_in_the_folder_count_and_not_what_was_kept(root, mine):
    assert prune(root, str(mine), "-q", "4", "--device", "cpu")[0] == 0 and kept(mine)
    shutil.copy(DEMO / "model.safetensors", mine)  # that the kept file was not made of
    assert not kept(mine)


@pytest.fixture
def published(root):
    """The folder of a published model, and a hub that has it."""
    folder = pickled_demo(root / "THUDM" / NAME)
    with Hub({f"THUDM/{NAME}": {path.name: path.read_bytes() for path in folder.iterdir()}}) as hub:
        yield folder, hub


def download(root, *argv):
    code, out, _ = run(root, *argv)
    return code, out


@pytest.mark.parametrize("options", [(), pytest.param(("-q", "4", "--device", "cpu"), marks=needs_compiler)], ids=str)
def test_pruned_originals_are_not_missing(root, published, options):
    folder, hub = published
    code, _, err = prune(root, NAME, *options, "--source", hub.url)
    assert code == 0 and not pickles(folder), err
    assert download(root, NAME, *options, "--source", hub.url)[0] == 0
    assert not pickles(folder) and not hub.fetched()
    code, out = download(root, NAME, "--verify", "--source", NOWHERE)
    name = "quantized/cpu-int4.safetensors" if options else "model.safetensors"
    assert code == 0 and f"  {name}  ok" in out and "pytorch_model" not in out.replace(".bin.index.json", "")
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out = download(root, NAME, "--verify", "--source", NOWHERE)
    assert code == 1 and f"  {name}  broken" in out and f"{path} was made here: delete it" in out


@needs_compiler
def test_other_bits_download_the_originals_again(root, published, capsys):
    folder, hub = published
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", hub.url)
    assert not pickles(folder)
    config = {"model": NAME, "device": "cpu", "language": "en", "source": (hub.url,)}
    ensure_edition(Config(quantize=4, **config), root)
    assert not pickles(folder)
    ensure_edition(Config(quantize=8, **config), root)
    assert len(pickles(folder)) == 3 and "downloaded again" in capsys.readouterr().out
    assert not kept(folder)


@needs_compiler
def test_a_lora_takes_the_originals_too(root, published):
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", published[1].url)
    config = Config(model=NAME, quantize=4, device="cpu", lora=root, language="en", source=(NOWHERE,))
    with pytest.raises(StartupError, match="Could not download"):
        ensure_edition(config, root)


@needs_compiler
def test_the_doctor_knows_what_was_pruned(root, published):
    folder, hub = published
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", hub.url)
    here = Machine(Config(model=NAME), root=root)
    here.hardware = lambda: Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=True)
    assert here.model() == Model(folder, []) and here.profile()[0].bits == 4
    result = check_model_files(here.model(), here.config, root, None, {})
    assert result.state is State.OK and "converted quantized/cpu-int4.safetensors" in result.finding.en
    here = Machine(Config(model=NAME, quantize=8), root=root)
    here.hardware = lambda: Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=True)
    assert here.model().missing == sorted(f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3))
