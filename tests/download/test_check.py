"""Folders that people fill by hand: what is right stays, what is not is fetched, and nothing is hashed twice."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from server.config import ROOT
from server.download import check, folder, manifest
from server.download.folder import CHAT
from tests.conftest import ROOT as REPOSITORY_ROOT
from tests.download.conftest import (
    FIRST,
    MODEL,
    NAME,
    NOWHERE,
    ON_MODELSCOPE,
    REPOSITORY,
    SECOND,
    SHARDS,
    contents,
    fill,
    folder_of,
    get,
    publish,
    sha256,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3000000\n"
DAMAGED = b"\0" + SHARDS[FIRST][1:]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were hashed to check them."""
    names: list[str] = []
    really = check.hash_file

    def hash_file(path, *others):
        names.append(path.name)
        return really(path, *others)

    monkeypatch.setattr(check, "hash_file", hash_file)
    return names


def test_only_what_is_missing_is_fetched(servers, program, hashed):
    (hub,) = servers(1)
    fill(folder_of(program), {name: content for name, content in MODEL.items() if name != SECOND})
    assert contents(get(program, hub.url)) == MODEL
    assert hub.fetched() == [SECOND] and sorted(hashed) == sorted([FIRST, "tokenizer.model"])


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (DAMAGED, ""),  # as large as the right one
        (SHARDS[FIRST] + b"more", ""),
        (POINTER, ""),
        (b"<html>please log in</html>" * 100, ""),
        (SHARDS[FIRST][:1_500_000], "bytes=1500000-"),  # a copy that broke off
        (DAMAGED[:1_500_000], "bytes=1500000-"),  # and one of which that is not true
    ],
    ids=["damaged", "too long", "pointer", "page", "begun", "damaged and begun"],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_is_broken_is_fetched(there, asked, complete, servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {**MODEL, FIRST: there})
    if not complete:
        (folder_of(program) / SECOND).unlink()
    assert contents(get(program, hub.url, thorough=True)) == MODEL
    assert hub.ranges(FIRST)[0] == asked and {*hub.fetched()} == {FIRST, *([] if complete else [SECOND])}


def test_a_broken_file_stays_until_the_right_one_is_there(servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {**MODEL, FIRST: DAMAGED})
    hub.statuses[FIRST] = [500] * 9
    with pytest.raises(Exception, match="was not downloaded to its end"):
        get(program, hub.url, thorough=True)
    assert contents(folder_of(program))[FIRST] == DAMAGED


def test_a_complete_folder_is_only_looked_into_if_that_is_asked_for(program, hashed):
    """Whoever trains a model in this folder must not get the published one back at the next start."""
    publish(program, SHARDS)
    fill(folder_of(program), {**MODEL, FIRST: DAMAGED})
    get(program, NOWHERE)
    assert hashed == [] and contents(folder_of(program))[FIRST] == DAMAGED


@pytest.mark.parametrize(
    ("name", "content", "stays"),
    [("config.json", b'{"num_layers": 28, "seq_length": 4096}', True), ("config.json", b'{"num_layers"', False),
     ("config.json", POINTER, False), ("MODEL_LICENSE", b"in other words", True), ("MODEL_LICENSE", b" ", False)],
)  # fmt: skip
@pytest.mark.parametrize("site", ["", "modelscope="])  # which knows the hashes of these files too
def test_texts_that_people_edit(name, content, stays, site, servers, program):
    (hub,) = servers(1)
    published = {**MODEL, "MODEL_LICENSE": b"as written"}
    hub.repositories = {REPOSITORY: published, ON_MODELSCOPE: published}
    fill(folder_of(program), {name: content})
    there = contents(get(program, f"{site}{hub.url}"))
    assert there[name] == (content if stays else published[name])


def test_nothing_is_hashed_twice(servers, program, hashed):
    (hub,) = servers(1)
    get(program, hub.url)
    for _ in range(2):
        get(program, NOWHERE, thorough=True)  # what was hashed while it came need not be read again
        assert hashed == []
    os.utime(folder_of(program) / FIRST, (time.time(), 5))
    get(program, NOWHERE, thorough=True)
    get(program, NOWHERE, thorough=True)
    assert hashed == [FIRST]


def test_what_was_changed_since_is_found_without_the_network(servers, program):
    (hub,) = servers(1)
    get(program, hub.url)
    hub.requests.clear()
    (folder_of(program) / FIRST).write_bytes(DAMAGED)
    assert contents(get(program, hub.url, thorough=True)) == MODEL
    assert hub.fetched() == [FIRST]


def test_a_damaged_record_is_no_record(servers, program, hashed):
    (hub,) = servers(1)
    get(program, hub.url)
    for text in ("{", "[]", f'{{"{FIRST}": 3}}'):
        (folder_of(program) / ".download" / "verified.json").write_text(text)
        hashed.clear()
        get(program, hub.url, thorough=True)
        assert FIRST in hashed


def test_the_published_hashes_do_without_the_network(program, hashed, capsys):
    publish(program, {name: content for name, content in MODEL.items() if not name.endswith(".json")})
    fill(folder_of(program), MODEL)
    get(program, NOWHERE, thorough=True)
    assert sorted(hashed) == sorted([FIRST, SECOND, "tokenizer.model"])
    assert "checking the files that are there (6.5 MB)" in capsys.readouterr().out


def test_a_folder_that_nobody_can_check(program, capsys):
    fill(folder_of(program), MODEL)
    get(program, NOWHERE, thorough=True)
    assert "no source answers that knows their checksums" in capsys.readouterr().out


def test_weights_in_the_other_format_will_do(servers, program):
    (hub,) = servers(1)
    hub.repositories = {REPOSITORY: {**MODEL, "model.safetensors": b"s" * 5000}}
    fill(folder_of(program), MODEL)
    assert contents(get(program, hub.url, thorough=True)) == MODEL and not hub.fetched()
    (folder_of(program) / FIRST).unlink()
    assert contents(get(program, hub.url)) == MODEL and hub.fetched() == [FIRST]  # nor is another format begun


def test_converted_pickles_are_not_fetched_again(servers, program):
    (hub,) = servers(1)
    publish(program, SHARDS)
    converted = {"config.json": b"{}", "tokenizer.model": MODEL["tokenizer.model"], "model.safetensors": b"s" * 5000}
    fill(folder_of(program), converted)
    assert contents(get(program, hub.url, thorough=True)) == converted


def test_two_programs_at_once_fetch_everything_once(servers, program):
    (hub,) = servers(1)
    hub.rate = 4e6
    script = f"""
from pathlib import Path
from server.download import Origin, ensure_model, manifest
manifest.MANIFEST = Path({str(program)!r}) / "manifest.json"
ensure_model({NAME!r}, origin=Origin(({hub.url!r},)), root=Path({str(program)!r}), language="en")
"""
    command = [sys.executable, "-c", script]
    programs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in programs]
    assert [process.returncode for process in programs] == [0, 0]
    assert contents(folder_of(program)) == MODEL
    assert sorted(hub.fetched()) == sorted(MODEL) and sum("waiting for it" in text for text in said) == 1


def test_the_real_manifest(monkeypatch):
    monkeypatch.setattr(manifest, "MANIFEST", ROOT / "server" / "download" / "manifest.json")
    models = json.loads(manifest.MANIFEST.read_text(encoding="utf-8"))
    assert {*models} <= {*CHAT.repositories}
    for model in models:
        for name, known in manifest.known_files(model).items():
            assert len(known.sha256) == 64 and int(known.sha256, 16) and known.size != 0
            assert name.startswith("pytorch_model") or name in CHAT.tokenizers
    known = manifest.known_files("chatglm2-6b")
    assert len(known) == 8 and len({file.sha256 for file in known.values()}) == 8
    assert manifest.known_files("chatglm2-6b-int4")["pytorch_model.bin"].size == 3_923_712_365
    assert manifest.known_files("demo") == {}


@pytest.mark.parametrize(
    ("model", "place"),
    [("chatglm-6b", "chatglm-tokenizer/ice_text.model"), ("chatglm2-6b", "chatglm2-tokenizer/tokenizer.model")],
)
def test_the_real_manifest_knows_the_real_tokenizers(model, place, monkeypatch):
    path = REPOSITORY_ROOT.parent / "shared" / "data" / place
    if not path.is_file():
        pytest.skip(f"no {path}")
    monkeypatch.setattr(manifest, "MANIFEST", ROOT / "server" / "download" / "manifest.json")
    known, content = manifest.known_files(model)[path.name], path.read_bytes()
    assert known == (len(content), sha256(content))


def test_the_real_manifest_leaves_no_fact_out():
    path = REPOSITORY_ROOT.parent / "shared" / "users.md"
    if not path.is_file():
        pytest.skip(f"no {path}")
    text = path.read_text(encoding="utf-8")
    models = json.loads((ROOT / "server" / "download" / "manifest.json").read_text(encoding="utf-8")).values()
    known = [file for files in models for file in files.values()]
    hashes, sizes = re.findall(r"\b[0-9a-f]{64}\b", text), re.findall(r"\(([\d,]{9,}) B\)", text)
    assert hashes and {*hashes} <= {file["sha256"] for file in known}
    assert sizes and {int(size.replace(",", "")) for size in sizes} <= {file["size"] for file in known}


def test_a_part_is_the_beginning_of_a_download(program):
    there = fill(folder_of(program), {"config.json": b"{}"})
    assert not folder.is_begun(there)
    fill(there, {f"{FIRST}.part": b"p" * 5000})
    assert folder.is_begun(there)
