"""tests/models/test_oracle.py on other folders: odd shapes, unknown names, parts missing, wrong results."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.models.families import families
from tests.conftest import ROOT
from tools.official_packing import pack_checkpoint, unpack_checkpoint
from tools.reference_checkpoints import BLOCK, FIRST, make_weights
from tools.reference_judges import PlainJudge, greedy

FIRST_IDS = {"bos_token_id": 54, "eos_token_id": 55, "mask_token_id": 50, "gmask_token_id": 51, "vocab_size": 60}
PROJECTED = {"pre_seq_len": 5, "prefix_projection": True}
WIDE = {"kv_channels": 12, "num_attention_heads": 3, "multi_query_group_num": 3, "ffn_hidden_size": 37}
# name: (family, what vectors.json calls it, what differs from BLOCK or FIRST, length of the longest prompt)
FOLDERS = {
    "odd-glm1-projection": (
        "chatglm",
        "chatglm1",
        {"num_layers": 1, "num_attention_heads": 2, "hidden_size": 24, **PROJECTED},
        30,
    ),
    "odd-glm1-int8-qe": ("chatglm", "glm-first", {"quantization_bit": 8, "quantization_embeddings": True}, 9),
    "odd-glm1-int4-ptuning": ("chatglm", "chatglm1", {"quantization_bit": 4, "pre_seq_len": 2}, 9),
    "odd-glm2-long": ("chatglm2", "chatglm2", {**WIDE, "num_layers": 1, "add_qkv_bias": False, "seq_length": 512}, 400),
    "odd-glm2-32k-int8-ptuning": (
        "chatglm2",
        "chatglm2",
        {**WIDE, "quantization_bit": 8, "rope_ratio": 2, **PROJECTED},
        9,
    ),
    "odd-chatglm3-int4-ptuning": ("chatglm3", "chatglm3", {"quantization_bit": 4, "rope_ratio": 3, **PROJECTED}, 9),
    "odd-codegeex2-int4": ("codegeex2", "codegeex2", {"quantization_bit": 4, "torch_dtype": "bfloat16"}, 9),
    "odd-glm2-nameless": ("chatglm2", None, {"hidden_size": 20}, 9),
}


def write_folder(folder, family, name, changes, longest):
    """A few parts of the layout, with other numbers than usual."""
    config = {**FIRST, **FIRST_IDS, **changes} if family == "chatglm" else {**BLOCK, **changes}
    stored = full = make_weights(config, family, seed=len(folder.name))
    if bits := config.get("quantization_bit"):
        stored = pack_checkpoint(full, bits, embeddings=config.get("quantization_embeddings", False))
        full = unpack_checkpoint(stored, bits)
    judge = PlainJudge(config, family, full)
    end = [51, 54] if family == "chatglm" else []
    rows = [[3 + (7 * i) % 45 for i in range(length - 2)] + (end or [9, 4]) for length in (longest, 3, 6)]
    decoded = [7, 8]
    logits = [judge.logits(row + decoded) for row in rows]
    tensors = {"case0.prefill_logits": logits[0][:-2], "case1.prefill_logits": logits[1][:-2]}
    tensors |= {"case1.decode_logits": logits[1][-2:], "batch.step0_logits": torch.stack([x[-2] for x in logits])}
    width = len(rows[0])
    vectors = {
        "meta": {"family": name} if name else {},
        "cases": [
            {"input_ids": rows[0], "greedy_7": greedy(judge, rows[0], 7)[0]},
            {"input_ids": rows[1], "decode_ids": decoded},
        ],
        "batch": {
            "input_ids": [[0] * (width - len(row)) + row for row in rows],
            "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
            "steps": [{"input_ids": [[7]] * 3}],
        },
    }
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors")
    save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, folder / "vectors.safetensors")
    for file, content in (("config.json", config), ("vectors.json", vectors)):
        (folder / file).write_text(json.dumps(content), encoding="utf-8")


def run_oracle(root, *files):
    """The tests of ``files`` on the folders under ``root`` alone; the exit code and what pytest printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "odd", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "ORACLE_DIR": str(root)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_any_folder_of_the_layout_is_compared(tmp_path):
    for name, what in FOLDERS.items():
        write_folder(tmp_path / "models" / name, *what)
    files = ("tests/models/test_oracle.py", "tests/models/test_half_precision.py", "tests/models/test_judge.py")
    code, text = run_oracle(tmp_path, *files, "tests/engine/test_reference.py", "-rA")
    assert code == 0, text
    assert "SKIPPED" not in text
    for name, (*_, changes, _) in FOLDERS.items():
        bits = changes.get("quantization_bit")
        precision = f"official-int{bits}" if bits else "float32"
        for check in ("prefill", "decode", "greedy", "batch", *(["codes"] if bits else [])):
            assert f"PASSED tests/models/test_oracle.py::test_reference[{name}-{precision}-{check}]" in text
        assert f"test_greedy_ids_through_the_engine[{name}]" in text
    table = text.partition("largest differences")[2]
    assert all(precision in table for precision in ("float32", "official int8", "official int4", "bfloat16", "float16"))


def test_wrong_results_are_named(tmp_path):
    folder = tmp_path / "models" / "odd-glm2-wrong"
    write_folder(folder, "chatglm2", "chatglm2", {}, 9)
    tensors = load_file(folder / "vectors.safetensors")
    tensors["case0.prefill_logits"][4, 11] += 1e-3
    save_file(tensors, folder / "vectors.safetensors")
    vectors = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))
    vectors["cases"][0]["greedy_7"][3] += 1
    (folder / "vectors.json").write_text(json.dumps(vectors), encoding="utf-8")
    code, text = run_oracle(tmp_path, "tests/models/test_oracle.py")
    assert code == 1
    assert f"ChatGLM2, float32, {folder}: case0.prefill_logits differs by 1.00e-03 at [4, 11], allowed 1e-04" in text
    assert "case0, greedy is" in text and "first at 3" in text


@pytest.mark.parametrize("name", ["unknown", None])
def test_an_unknown_network_fails(tmp_path, name):
    """It is not skipped, and the message says which fields were looked at."""
    folder = tmp_path / "models" / "odd-network"
    write_folder(folder, "chatglm2", name, {}, 9)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 24}))
    code, text = run_oracle(tmp_path, "tests/models/test_oracle.py")
    assert code == 1
    assert " skipped" not in text
    assert str(folder / "config.json") in text and all(family.name in text for family in families())


def test_an_empty_folder_fails(tmp_path):
    folder = tmp_path / "models" / "odd-glm2-empty"
    write_folder(folder, "chatglm2", "chatglm2", {}, 9)
    (folder / "vectors.safetensors").unlink()
    (folder / "vectors.json").write_text("{}")
    code, text = run_oracle(tmp_path, "tests/models/test_oracle.py")
    assert code == 1
    assert "hold nothing that could be compared" in text
