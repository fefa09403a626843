"""Disks that are full, become full, or cannot be written."""

import os
import sys
from dataclasses import replace

import pytest

from server.config import parse
from server.download import editions, ensure_edition
from server.download.folder import missing_files
from server.errors import StartupError
from server.footprint import ModelShape
from tests.download.conftest import FIRST, MODEL, NAME, SECOND, SHARDS, contents, fill, folder_of, get
from tests.download.test_transfer import failure
from tests.hub_server import Hub
from tests.test_prune import needs_compiler, pickled_demo, pickles


def test_a_disk_that_is_full(servers, program, monkeypatch):
    monkeypatch.setattr("server.download.fetch.disk_free", lambda path: 205_000_000)
    (hub,) = servers(1)
    said = failure(program, hub.url)
    assert "206.6 MB are needed, 205.0 MB are free" in said and not hub.fetched()
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:3_000_000]})  # what is there need not be counted
    assert contents(get(program, hub.url)) == MODEL


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_becomes_full(servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {})
    (folder_of(program) / f"{SECOND}.part").symlink_to("/dev/full")
    said = failure(program, hub.url)
    assert "The disk with" in said and "is full" in said and (folder_of(program) / FIRST).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows says it differently")
def test_a_folder_that_cannot_be_written(servers, program):
    (hub,) = servers(1)
    (program / "THUDM").write_text("a file")
    said = failure(program, hub.url)
    assert f"Cannot write to {folder_of(program)}" in said
    assert not hub.fetched()


@pytest.mark.parametrize("bits", ["16", pytest.param("4", marks=needs_compiler)])
def test_the_disk_must_have_room_for_the_download_and_what_is_made_of_it(bits, program, monkeypatch):
    model = pickled_demo(program / "published")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    small = ModelShape.from_folder(model)
    monkeypatch.setitem(editions.SHAPES, NAME, small)
    size = sum(map(len, files.values()))
    made = sum(len(files[name]) for name in pickles(model)) if bits == "16" else small.weight_bytes(4, 2)
    argv = ["download", "--prune", NAME, "-q", bits, "--device", "cpu", "--language", "en"]
    config = parse(argv, env={}, root=program)
    with Hub({f"THUDM/{NAME}": files}) as hub:
        monkeypatch.setattr("server.download.fetch.disk_free", lambda path: size + made + 199_999_999)
        with pytest.raises(StartupError, match=rf"are needed, {made / 1e6:.1f} MB of it for --prune, "):
            ensure_edition(replace(config, source=[hub.url]), program, thorough=True)
        assert not hub.fetched()
        monkeypatch.setattr("server.download.fetch.disk_free", lambda path: size + made + 200_000_000)
        assert not missing_files(ensure_edition(replace(config, source=[hub.url]), program, thorough=True))
