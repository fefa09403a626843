"""A ChatGLM2 checkpoint as llama.cpp's file format GGUF."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from server.errors import ModelError
from server.models.checkpoint import weight_files

_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# official names to llama.cpp's (src/models/chatglm.cpp); matrices keep their layout
_NAMES = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")


def write_gguf(checkpoint: Path, path: Path, gguf_package: Path) -> None:
    """Write a ChatGLM2 folder (safetensors) as float16 GGUF, tensor by tensor.

    Raises ModelError for a tensor that ChatGLM2 has not.
    """
    sys.path.append(str(gguf_package))
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "chatglm")
    _add_sizes(writer, config, checkpoint.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    pieces = SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    _add_vocabulary(writer, pieces, config["padded_vocab_size"], gguf.TokenType)
    for name, shape, _ in _tensors(checkpoint):
        dtype = _dtype(shape)
        writer.add_tensor_info(_gguf_name(name, checkpoint), shape, torch.empty(0, dtype=dtype).numpy().dtype,
                               torch.Size(shape).numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, read in _tensors(checkpoint):
        writer.write_tensor_data(read().to(_dtype(shape)).numpy())
    writer.close()


def _add_sizes(writer: Any, config: dict[str, Any], name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["ffn_hidden_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["multi_query_group_num"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_dimension_count(config["kv_channels"] // 2)
    writer.add_rope_freq_base(10000.0)


def _add_vocabulary(writer: Any, pieces: SentencePieceProcessor, size: int, kinds: Any) -> None:
    tests = {kinds.UNKNOWN: pieces.is_unknown, kinds.CONTROL: pieces.is_control, kinds.BYTE: pieces.is_byte,
             kinds.UNUSED: pieces.is_unused}  # fmt: skip
    known = range(pieces.get_piece_size())
    tokens = [pieces.id_to_piece(i) for i in known]
    types = [next((kind for kind, test in tests.items() if test(i)), kinds.NORMAL) for i in known]
    special = _SPECIAL[: size - len(known)]
    padding = range(len(known) + len(special), size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("chatglm-spm")
    writer.add_token_list([*tokens, *special, *(f"[PAD{i}]" for i in padding)])
    writer.add_token_scores([*map(pieces.get_score, known), *[0.0] * (size - len(known))])
    writer.add_token_types([*types, *[kinds.CONTROL] * len(special), *[kinds.UNUSED] * len(padding)])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_bos_token(False)


def _tensors(checkpoint: Path) -> Iterator[tuple[str, list[int], Any]]:
    """Name, shape and what reads it, in the order of the files; no rotary table, which llama.cpp computes."""
    for path in weight_files(checkpoint):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                if "inv_freq" not in name:
                    yield name, file.get_slice(name).get_shape(), lambda file=file, name=name: file.get_tensor(name)


def _dtype(shape: list[int]) -> torch.dtype:
    """Norms and biases in float32, as llama.cpp adds them."""
    return torch.float32 if len(shape) == 1 else torch.float16


def _gguf_name(name: str, checkpoint: Path) -> str:
    stem, kind = name.rsplit(".", 1)
    layer = _LAYER.fullmatch(stem)
    known = _NAMES.get(layer[2] if layer else stem)
    if known is None:
        raise ModelError(f"{checkpoint} 里有 ChatGLM2 没有的张量 {name}：请给一个 ChatGLM2 的文件夹。",
                         f"{checkpoint} has a tensor {name} that ChatGLM2 has not: give a folder of ChatGLM2.")
    return f"blk.{layer[1]}.{known}.{kind}" if layer else f"{known}.{kind}"
