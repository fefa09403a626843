import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import ROOT
from server.download import SENTENCE, Origin, ensure_model
from server.download.folder import is_begun, missing_files
from server.errors import ModelError, StartupError
from tests.hub_server import Hub

SHARDS = {f"pytorch_model-0000{i}-of-00002.bin": bytes([i]) * 300_000 for i in (1, 2)}
INDEX = {"weight_map": dict(zip(("a.weight", "b.weight", "c.weight"), [*SHARDS, *SHARDS], strict=False))}
MODEL = {
    "config.json": b"{}",
    "tokenizer.model": b"t" * 2000,
    "tokenization_chatglm.py": b"# <|user|>",
    "pytorch_model.bin.index.json": json.dumps(INDEX).encode(),
    "MODEL_LICENSE": b"text",
    **SHARDS,
}
SENTENCE_MODEL = {
    "config.json": b"{}",
    "vocab.txt": b"a\n" * 1000,
    "tokenizer.json": b"{}" * 1000,
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "pytorch_model.bin": b"w" * 5000,
}
V1 = b'{"inner_hidden_size": 16384}'  # a field of ChatGLM-6B alone
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
UNWANTED = {"modeling_chatglm.py": b"import os", "README.md": b"#", "onnx/model.onnx": b"x"}
FIRST, SECOND = SHARDS

SCRIPT = """
import sys
from pathlib import Path
from server.config import parse
from server.download import CHAT, SENTENCE, Origin, ensure_model, manifest
from server.download.folder import DEFAULT_MODEL
from server.errors import StartupError
config = parse(sys.argv[2:])
kind = SENTENCE if "--embedding-model" in sys.argv else CHAT
name = getattr(config, kind.option) or DEFAULT_MODEL
manifest.MANIFEST = Path(sys.argv[1]) / "manifest.json"
origin = Origin(config.source, config.endpoint)
try:
    print("FOLDER", ensure_model(name, kind, origin=origin, root=Path(sys.argv[1]), language="en"))
except StartupError as error:
    print(error.en, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    with Hub({"THUDM/chatglm2-6b": {**MODEL, **UNWANTED}}) as hub:
        yield hub


def start(root: Path, endpoint: str, *argv: str, script: str = SCRIPT) -> subprocess.Popen:
    if not (root / "manifest.json").exists():
        (root / "manifest.json").write_text("{}")  # the real one knows the real files
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CHATGLM_")) and "proxy" not in k.lower()}
    env = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(root / "hf"), "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen([sys.executable, "-c", script, str(root), *argv], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip


def run(root: Path, endpoint: str, *argv: str) -> tuple[int, str, str]:
    process = start(root, endpoint, *argv)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def failure(root: Path, endpoint: str, *argv: str) -> str:
    code, out, err = run(root, endpoint, *argv)
    assert code == 2, out + err
    assert "Traceback" not in err and err.count("\n") == 1, err
    return err


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_fresh_download_then_no_network(hub, tmp_path):
    code, out, err = run(tmp_path, hub.url)
    folder = tmp_path / "THUDM" / "chatglm2-6b"
    assert (code, out.splitlines()[-1]) == (0, f"FOLDER {folder}"), err
    assert files(folder) == MODEL
    assert f"(1/{len(MODEL)})" in out
    asked = len(hub.requests)
    assert run(tmp_path, hub.url)[0] == 0
    assert len(hub.requests) == asked
    assert run(tmp_path, "http://127.0.0.1:9")[0] == 0


def test_completes_what_a_person_put_there(hub, tmp_path):
    folder = tmp_path / "THUDM" / "chatglm2-6b"
    folder.mkdir(parents=True)
    (folder / FIRST).write_bytes(SHARDS[FIRST])
    assert run(tmp_path, hub.url)[0] == 0
    assert FIRST not in hub.fetched()


def test_server_that_stays_broken(hub, tmp_path):
    hub.statuses["/chatglm2-6b"], hub.retry_after = [500] * 99, "0"
    assert "500" in failure(tmp_path, hub.url)


def test_new_name_of_the_organisation(hub, tmp_path):
    hub.repositories = {"zai-org/chatglm2-6b": MODEL}
    assert run(tmp_path, hub.url)[0] == 0
    assert files(tmp_path / "THUDM" / "chatglm2-6b") == MODEL


def test_redirect_to_the_new_name(hub, tmp_path):
    hub.repositories = {"zai-org/chatglm2-6b": MODEL}
    hub.moved = {"THUDM/chatglm2-6b": "zai-org/chatglm2-6b"}
    code, _, err = run(tmp_path, hub.url)
    assert code == 0, err


def test_safetensors_make_pickles_superfluous(hub, tmp_path):
    hub.repositories = {"THUDM/chatglm3-6b": {**MODEL, "model.safetensors": b"s" * 5000}}
    assert run(tmp_path, hub.url, "--model", "chatglm3-6b")[0] == 0
    folder = tmp_path / "THUDM" / "chatglm3-6b"
    assert "model.safetensors" in files(folder) and not set(files(folder)) & set(SHARDS)


FIRST_GENERATION = {
    **{name: content for name, content in MODEL.items() if name != "tokenizer.model"},
    "config.json": V1,
    "ice_text.model": b"i" * 2000,
}


EVERY_MODEL = """
import sys
from pathlib import Path
from server.download import CHAT, Origin, ensure_model, manifest
manifest.MANIFEST = Path(sys.argv[1]) / "manifest.json"
origin = Origin(endpoint=sys.argv[2])
for name in CHAT.repositories:
    print("FOLDER", ensure_model(name, origin=origin, root=Path(sys.argv[1]), language="en"))
"""


def test_every_model_of_the_family_can_be_had(hub, tmp_path):
    names = [
        *("chatglm-6b", "chatglm-6b-int8", "chatglm-6b-int4", "chatglm2-6b", "chatglm2-6b-int4", "chatglm2-6b-32k"),
        *("chatglm2-6b-32k-int4", "chatglm3-6b", "chatglm3-6b-32k", "chatglm3-6b-128k"),
        *("codegeex2-6b", "codegeex2-6b-int4"),
    ]
    models = {name: FIRST_GENERATION if name.startswith("chatglm-") else MODEL for name in names}
    organisations = ("THUDM", "zai-org") * len(names)
    hub.repositories = {
        f"{organisation}/{name}": {**models[name], **UNWANTED}
        for organisation, name in zip(organisations, names, strict=False)
    }
    process = start(tmp_path, hub.url, hub.url, script=EVERY_MODEL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = [line.removeprefix("FOLDER ") for line in out.splitlines() if line.startswith("FOLDER ")]
    assert found == [str(tmp_path / "THUDM" / name) for name in names]
    for name in names:
        assert files(tmp_path / "THUDM" / name) == models[name], name


def test_a_repository_without_the_tokenizer_of_its_generation(hub, tmp_path):
    hub.repositories = {"THUDM/chatglm-6b": {**MODEL, "config.json": V1}}
    said = failure(tmp_path, hub.url, "--model", "chatglm-6b")
    assert "still lacks ice_text.model:" in said


@pytest.mark.parametrize("name", ["text2vec-large-chinese", "GanymedeNil/text2vec-large-chinese"])
def test_sentence_model(name, hub, tmp_path):
    unwanted = {**UNWANTED, "1_Pooling/config.json": b"{}", "onnx/model.safetensors": b"s" * 5000}
    hub.repositories = {"GanymedeNil/text2vec-large-chinese": {**SENTENCE_MODEL, **unwanted}}
    folder = tmp_path / "THUDM" / "text2vec-large-chinese"
    code, out, err = run(tmp_path, hub.url, "--embedding-model", name)
    assert (code, out.splitlines()[-1]) == (0, f"FOLDER {folder}"), err
    assert files(folder) == SENTENCE_MODEL
    assert run(tmp_path, "http://127.0.0.1:9", "--embedding-model", name)[0] == 0


def test_no_server(tmp_path):
    said = failure(tmp_path, "http://127.0.0.1:9")
    for part in ("http://127.0.0.1:9", "HF_ENDPOINT=https://hf-mirror.com", str(tmp_path / "THUDM" / "chatglm2-6b")):
        assert part in said


def test_not_a_hub(hub, tmp_path):
    hub.statuses["/chatglm2-6b"] = [200] * 9
    assert "HF_ENDPOINT" in failure(tmp_path, hub.url)


@pytest.mark.parametrize(("status", "said"), [(404, "has none of"), (403, "HF_TOKEN")])
def test_refusals(hub, tmp_path, status, said):
    hub.statuses["/chatglm2-6b"] = [status] * 9
    if status == 404:
        hub.repositories, hub.statuses = {}, {}
    assert said in failure(tmp_path, hub.url)


def test_disk_that_is_too_small(hub, tmp_path):
    hub.claimed[FIRST] = 10**15
    said = failure(tmp_path, hub.url)
    assert "1000000.20 GB are needed" in said and not hub.fetched()


def test_repository_without_weights(hub, tmp_path):
    hub.repositories = {"THUDM/chatglm2-6b": {k: v for k, v in MODEL.items() if k != SECOND}}
    said = failure(tmp_path, hub.url)
    assert SECOND in said and "still lacks" in said and FIRST not in hub.fetched()


# without a network


def fill(folder: Path, **changes: bytes | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**MODEL, **changes}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["chatglm2-6b", "THUDM/chatglm2-6b", "zai-org/chatglm2-6b"])
def test_filled_folder_is_taken_under_every_name(name, tmp_path):
    folder = fill(tmp_path / "THUDM" / "chatglm2-6b")
    assert ensure_model(name, root=tmp_path, origin=Origin(endpoint="http://127.0.0.1:9")) == folder


def test_demo_is_a_bare_name(tmp_path):
    folder = fill(tmp_path / "THUDM" / "demo")
    assert ensure_model("demo", root=tmp_path) == folder


def test_folder_anywhere(tmp_path):
    folder = fill(tmp_path / "我的 模型")
    assert ensure_model(str(folder), root=tmp_path / "elsewhere") == folder


def test_a_path_from_the_current_folder(tmp_path, monkeypatch):
    fill(tmp_path / "sub" / "mine")
    monkeypatch.chdir(tmp_path)
    assert ensure_model("sub/mine", root=tmp_path / "elsewhere") == tmp_path / "sub" / "mine"
    assert ensure_model("./sub/mine", root=tmp_path / "elsewhere") == tmp_path / "sub" / "mine"


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, []),
        ({"MODEL_LICENSE": None}, []),
        ({"config.json": None}, ["config.json"]),
        ({"tokenizer.model": None}, ["tokenizer.model"]),
        ({"tokenizer.model": None, "ice_text.model": b"i" * 2000}, ["tokenizer.model"]),
        ({"config.json": V1}, ["ice_text.model"]),
        ({"config.json": V1, "ice_text.model": POINTER}, ["ice_text.model"]),
        ({"config.json": V1, "tokenizer.model": None, "ice_text.model": b"i" * 2000}, []),
        ({"config.json": None, "tokenizer.model": None}, ["config.json", "tokenizer.model or ice_text.model"]),
        ({"config.json": None, "tokenizer.model": None, "ice_text.model": b"i" * 2000}, ["config.json"]),
        ({"config.json": b"[]"}, []),
        ({SECOND: None}, [SECOND]),
        ({FIRST: POINTER}, [FIRST]),
        ({"pytorch_model.bin.index.json": b"{"}, ["pytorch_model.bin.index.json"]),
        ({"pytorch_model.bin.index.json": b"{", "model.safetensors": b"s" * 2000}, ["pytorch_model.bin.index.json"]),
        ({"pytorch_model.bin.index.json": None, "model.safetensors": b"s" * 2000, SECOND: None}, []),
        ({"pytorch_model.bin.index.json": None, FIRST: None, SECOND: None},
         ["model.safetensors or pytorch_model.bin"]),
        ({"pytorch_model.bin.index.json": None, FIRST: None, SECOND: None, "model.safetensors": b"short"},
         ["model.safetensors"]),
    ],
)
def test_missing_files(changes, missing, tmp_path):
    assert missing_files(fill(tmp_path / "m", **changes)) == missing


@pytest.mark.parametrize(
    ("there", "begun"),
    [([], False), (["config.json", "tokenizer.model", "pytorch_model.bin.index.json"], False), ([SECOND], True)],
)
def test_a_download_is_begun_by_a_file_of_weights(there, begun, tmp_path):
    for name in there:
        (tmp_path / name).write_bytes(MODEL[name])
    assert is_begun(tmp_path) is begun
    (tmp_path / FIRST).write_bytes(POINTER)
    assert is_begun(tmp_path) is begun


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, []),
        ({"vocab.txt": None}, []),
        ({"tokenizer.json": None}, []),
        ({"tokenizer.json": None, "vocab.txt": None}, ["tokenizer.json or vocab.txt or sentencepiece.bpe.model"]),
        ({"tokenizer.json": None, "vocab.txt": None, "sentencepiece.bpe.model": b"s" * 2000}, []),
        ({"tokenizer.json": POINTER, "vocab.txt": None}, ["tokenizer.json"]),
        ({"pytorch_model.bin": None}, ["model.safetensors or pytorch_model.bin"]),
    ],
)
def test_missing_files_of_a_sentence_model(changes, missing, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name, content in {**SENTENCE_MODEL, **changes}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    assert missing_files(folder, SENTENCE) == missing


def test_own_folder_that_lacks_files(tmp_path):
    folder = fill(tmp_path / "mine", **{SECOND: None})
    with pytest.raises(ModelError, match=SECOND):
        ensure_model(str(folder), root=tmp_path)


NO_WEIGHTS = {"pytorch_model.bin.index.json": None, FIRST: None, SECOND: None}


@pytest.mark.parametrize(
    ("changes", "en", "zh"),
    [
        ({SECOND: None}, f"lacks {SECOND}: put it there.", f"缺少 {SECOND}：请把文件放齐。"),
        ({FIRST: None, SECOND: None}, f"lacks {FIRST}, {SECOND}: put them there.", f"缺少 {FIRST}、{SECOND}："),
        (NO_WEIGHTS, "lacks model.safetensors or pytorch_model.bin: put",
         "缺少 model.safetensors 或 pytorch_model.bin："),
        ({**NO_WEIGHTS, "model.safetensors": POINTER},
         "has only Git LFS pointers in place of model.safetensors: run git lfs pull there",
         "model.safetensors 只是 Git LFS 的指针，不是文件本身：请在那里执行 git lfs pull"),
        ({"config.json": V1}, "lacks ice_text.model: put it there.", "缺少 ice_text.model：请把文件放齐。"),
        ({FIRST: b"", "tokenizer.model": None},
         f"lacks tokenizer.model and has only a damaged {FIRST}: download them again.", f"{FIRST} 不完整：请重新下载"),
    ],
)  # fmt: skip
def test_own_folder_says_what_is_wrong_with_each_file(changes, en, zh, tmp_path):
    folder = fill(tmp_path / "mine", **changes)
    with pytest.raises(ModelError) as caught:
        ensure_model(str(folder), root=tmp_path)
    assert en in caught.value.en and zh in caught.value.zh


def test_file_in_place_of_its_folder(tmp_path):
    folder = fill(tmp_path / "mine")
    with pytest.raises(StartupError) as caught:
        ensure_model(str(folder / "config.json"), root=tmp_path)
    assert f"--model {folder}." in caught.value.en and f"--model {folder}。" in caught.value.zh


def test_the_option_that_is_named_is_the_one_that_was_given(tmp_path):
    file = fill(tmp_path / "mine") / "config.json"
    with pytest.raises(StartupError, match="write --embedding-model ") as caught:
        ensure_model(str(file), SENTENCE, root=tmp_path)
    assert caught.value.param == "embedding_model"
    (tmp_path / "THUDM" / "demo").mkdir(parents=True)
    with pytest.raises(StartupError, match=r"no sentence model .*Did you mean text2vec-large-chinese\?") as caught:
        ensure_model("text2vec-large", SENTENCE, root=tmp_path)
    assert "demo" not in caught.value.en
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json or vocab"):
        ensure_model(str(file.parent), SENTENCE, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("chatglm2-6", "chatglm2-6b"), ("THUDM/chatglm2_6b", "chatglm2-6b"), ("dem", "demo"),
                       ("C:\\models\\my-tuned", "my-tuned2"), ("ChatGLM2-6B", "chatglm2-6b"),
                       ("chatglm-6b-int4-qe", "chatglm-6b-int4"), ("CodeGeeX2", "codegeex2-6b")],
)  # fmt: skip
def test_unknown_name(name, near, tmp_path):
    fill(tmp_path / "THUDM" / "demo")
    fill(tmp_path / "THUDM" / "my-tuned2")
    with pytest.raises(StartupError) as caught:
        ensure_model(name, root=tmp_path)
    assert f"Did you mean {near}?" in caught.value.en and caught.value.param == "model"
