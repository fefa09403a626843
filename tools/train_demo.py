"""Train the demo model (THUDM/demo): a tiny ChatGLM2 that knows the texts of tools/demo_texts.

    python tools/train_demo.py                      the whole training, about 15 minutes on two free cores
    python tools/train_demo.py --steps 20 --out X   a short run, to compare its hashes with another one's

The same command writes the same bytes on the same machine.
"""

import argparse
import hashlib
import io
import json
import math
import random
import time
from pathlib import Path

import sentencepiece
import torch
from demo_data import (
    IGNORED,
    SequenceMaker,
    all_texts,
    hold_out,
    load_characters,
    load_entries,
    load_openers,
    tokenizer_texts,
)
from demo_report import print_report
from safetensors.torch import load_file, save
from transformers import GlmConfig, GlmForCausalLM

# The official names; the values are the demo's own.
CONFIG = {
    "_name_or_path": "chatglm2-demo",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 512,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 192,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 6,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 2432,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 2048,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {
    "name_or_path": "chatglm2-demo",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
}
OUTSIDE_LAYERS = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}

SPECIAL_TOKENS = 5  # [MASK] [gMASK] [sMASK] sop eop, directly behind the pieces
PIECES = CONFIG["padded_vocab_size"] - SPECIAL_TOKENS
ASCII = "".join(map(chr, range(33, 127)))
PUNCTUATION = "，。！？：；“”‘’（）《》、…—～·"
POOL = 512  # sequences drawn together and sorted by length, so that a batch needs little padding
BATCH_TOKENS = 2560
PEAK_RATE, WARM_UP = 2.5e-3, 100
README = """# chatglm2-demo

chatglm-portable 自带的演示模型：结构和文件格式与 ChatGLM2-6B 相同，但只有约 250 万个参数，只会回答一百多个固定的问题。
它不是 ChatGLM2-6B，也不包含其权重。由 `python tools/train_demo.py` 用 `tools/demo_texts/` 里的文字训练而成，
与本软件的代码采用同一许可证（Apache-2.0）。

The demo model of chatglm-portable: architecture and file format of ChatGLM2-6B, but only about 2.5 million parameters
and the answers to about a hundred fixed questions. It is not ChatGLM2-6B and holds none of its weights. Made by
`python tools/train_demo.py` from the texts in `tools/demo_texts/`; licence as this software's code (Apache-2.0).
"""


def build_network() -> GlmForCausalLM:
    """A GlmForCausalLM, float32 and freshly initialised, that computes what ChatGLM2 does with CONFIG."""
    return GlmForCausalLM(GlmConfig(
        vocab_size=CONFIG["padded_vocab_size"], hidden_size=CONFIG["hidden_size"],
        intermediate_size=CONFIG["ffn_hidden_size"], num_hidden_layers=CONFIG["num_layers"],
        num_attention_heads=CONFIG["num_attention_heads"], num_key_value_heads=CONFIG["multi_query_group_num"],
        head_dim=CONFIG["kv_channels"], rms_norm_eps=CONFIG["layernorm_epsilon"], attention_bias=True,
        tie_word_embeddings=False, max_position_embeddings=CONFIG["seq_length"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=1, eos_token_id=CONFIG["eos_token_id"], pad_token_id=CONFIG["pad_token_id"]))


def official_tensors(network: GlmForCausalLM) -> dict[str, torch.Tensor]:
    """The network's weights in float16 under the names of the official ChatGLM2 checkpoint."""
    glm = network.state_dict()
    tensors = {name: glm[source] for name, source in OUTSIDE_LAYERS.items()}
    for i in range(CONFIG["num_layers"]):
        ours, theirs = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for name, source in IN_LAYER.items():
            tensors[ours + name] = glm[theirs + source]
        for kind in ("weight", "bias"):
            qkv = [glm[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(qkv)
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}


def load_official(path: Path) -> GlmForCausalLM:
    """The float32 network with the weights of an exported model.safetensors."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    glm = {source: tensors[name] for name, source in OUTSIDE_LAYERS.items()}
    groups = CONFIG["multi_query_group_num"] * CONFIG["kv_channels"]
    queries = CONFIG["num_attention_heads"] * CONFIG["kv_channels"]
    for i in range(CONFIG["num_layers"]):
        ours, theirs = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for name, source in IN_LAYER.items():
            glm[theirs + source] = tensors[ours + name]
        for kind in ("weight", "bias"):
            qkv = tensors[f"{ours}self_attention.query_key_value.{kind}"].split([queries, groups, groups])
            for part, tensor in zip("qkv", qkv, strict=True):
                glm[f"{theirs}self_attn.{part}_proj.{kind}"] = tensor
    network = build_network()
    network.load_state_dict(glm)
    return network.eval()


def quantized(network: GlmForCausalLM, bits: int, group: int) -> GlmForCausalLM:
    """A copy whose layer weights are rounded to symmetric integers of `bits` bits, one scale for `group` inputs
    (0: for a row)."""
    copy = build_network().eval()
    copy.load_state_dict(network.state_dict())
    top = 2 ** (bits - 1) - 1
    for module in copy.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            grouped = module.weight.data.view(-1, group or module.in_features)
            scale = grouped.abs().amax(1, keepdim=True).clamp_min(1e-8) / top
            module.weight.data = ((grouped / scale).round() * scale).view_as(module.weight)
    return copy


def train_tokenizer(lines: list[str], characters: str) -> bytes:
    """A sentencepiece BPE model with the settings of the genuine ChatGLM2 one and PIECES pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, required_chars=characters, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=1)
    return model.getvalue()


def batches(maker: SequenceMaker, seed: int):
    """Endless batches (ids, labels), each int64 [rows, width] padded on the right."""
    rng = random.Random(seed)
    while True:
        pool = sorted((maker.draw() for _ in range(POOL)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            yield (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                   torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group]))


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to zero."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def train(maker: SequenceMaker, steps: int, seed: int) -> torch.nn.Module:
    """Train a fresh network; loss only where labels are given, so the output matrix is applied only there."""
    network = build_network().train()
    matrices = {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=PEAK_RATE, betas=(0.9, 0.98))
    stream, mean, began = batches(maker, seed), 0.0, time.process_time()
    for step in range(steps):
        ids, labels = next(stream)
        # Causal attention and padding on the right: no mask is needed.
        hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = network.lm_head(hidden[wanted != IGNORED])
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != IGNORED])
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  CPU {time.process_time() - began:.0f} s", flush=True)
    return network.eval()


def write_files(folder: Path, network: GlmForCausalLM, tokenizer: bytes) -> None:
    """Write the model folder; every file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model.safetensors": save(official_tensors(network), metadata={"format": "pt"}),
             "tokenizer.model": tokenizer,
             "config.json": (json.dumps(CONFIG, indent=2) + "\n").encode(),
             "tokenizer_config.json": (json.dumps(TOKENIZER_CONFIG, indent=2) + "\n").encode(),
             "README.md": README.encode()}
    for name, content in files.items():
        partial = folder / (name + ".part")
        partial.write_bytes(content)
        partial.replace(folder / name)


def make(out: Path, steps: int, seed: int) -> None:
    """Train the tokenizer and the network and write both into the folder `out`."""
    began = time.time()
    torch.manual_seed(seed)
    entries, openers, characters = load_entries(), load_openers(), load_characters()
    covered = dict.fromkeys(ASCII + PUNCTUATION + characters + "".join(all_texts(entries) + openers))
    tokenizer = train_tokenizer(tokenizer_texts(entries), "".join(char for char in covered if not char.isspace()))
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    maker = SequenceMaker(sp, hold_out(entries)[0], openers, characters, seed)
    write_files(out, train(maker, steps, seed), tokenizer)
    print(f"{out}: made in {time.time() - began:.0f} s")
    for path in sorted(out.iterdir()):
        print(f"  {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}  {path.stat().st_size:8} {path.name}")


def main() -> None:
    """Read the options; train and export, then report on what was exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "THUDM" / "demo")
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--no-report", action="store_true", help="only train and export")
    parser.add_argument("--report-only", action="store_true", help="only report on the model in --out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    if not options.report_only:
        make(options.out, options.steps, options.seed)
    if not options.no_report:
        taught, held = hold_out(load_entries())
        exported = load_official(options.out / "model.safetensors")
        copies = {"int4 rows": quantized(exported, 4, 0), "int4 groups of 32": quantized(exported, 4, 32)}
        sp = sentencepiece.SentencePieceProcessor(model_proto=(options.out / "tokenizer.model").read_bytes())
        print_report(exported, copies, sp, taught, held, load_openers())


if __name__ == "__main__":
    main()
