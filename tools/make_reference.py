"""Make the tiny checkpoints of tests/data/reference and their expected results.

    .venv/bin/python tools/make_reference.py            (needs transformers; the results are deterministic)

The judge is transformers' own GlmForCausalLM, which shares no code with server/. The folders have the layout of an
official checkpoint (config.json, model.safetensors with the official tensor names) and beside it vectors.safetensors
and vectors.json, which tests/models/test_oracle.py reads.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import GlmConfig, GlmForCausalLM

TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "reference"
SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 36,
    "padded_vocab_size": 64,
    "seq_length": 256,
}
FIXED = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name: (family, seed, what differs from SIZES)
REFERENCES = {
    "tiny-chatglm2": ("chatglm2", 1, {}),
    "tiny-chatglm2-32k": ("chatglm2", 2, {"rope_ratio": 16, "num_attention_heads": 4, "ffn_hidden_size": 40}),
    "tiny-chatglm3-32k": ("chatglm3", 3, {"rope_ratio": 50, "multi_query_group_num": 1, "num_attention_heads": 3}),
}
# one row, an odd chunk, and more rows than any block of a kernel is likely to have
PROMPT_LENGTHS = (1, 7, 67)
DECODED = 5


def make_config(changes: dict) -> dict:
    return {**FIXED, **SIZES, **changes}


def make_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random float16 tensors under the official names, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    width = config["num_attention_heads"] * config["kv_channels"]
    fused = width + 2 * config["multi_query_group_num"] * config["kv_channels"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (fused, hidden),
        "self_attention.query_key_value.bias": (fused,),
        "self_attention.dense.weight": (hidden, width),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
    }
    shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for i in range(config["num_layers"]):
        shapes |= {f"transformer.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return 1 + 0.3 * values if len(shape) == 1 else values * (2 / shape[-1] ** 0.5)

    return {name: draw(shape).half() for name, shape in shapes.items()}


def build_judge(config: dict, family: str, weights: dict[str, torch.Tensor]) -> GlmForCausalLM:
    """transformers' GLM in float32 with an official checkpoint's configuration and weights."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ratio = config.get("rope_ratio", 1)
    if family == "chatglm2" and ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio)}
    elif ratio != 1:
        rope["rope_theta"] *= ratio
    judge = GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["multi_query_group_num"],
            head_dim=config["kv_channels"],
            rms_norm_eps=config["layernorm_epsilon"],
            attention_bias=config["add_qkv_bias"],
            max_position_embeddings=config["seq_length"],
            rope_parameters=rope,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    judge.load_state_dict(_glm_names(config, weights))
    return judge.float().eval()


def _glm_names(config: dict, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    groups = config["multi_query_group_num"] * config["kv_channels"]
    parts = [config["num_attention_heads"] * config["kv_channels"], groups, groups]
    renamed = {
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
        "transformer.encoder.layers": "model.layers",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    result = {}
    for name, tensor in weights.items():
        if name.endswith("inv_freq"):
            continue
        for official, glm in renamed.items():
            name = name.replace(official, glm)
        if ".query_key_value." in name:
            for part, rows in zip("qkv", tensor.float().split(parts), strict=True):
                result[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
        else:
            result[name] = tensor.float()
    return result


@torch.inference_mode()
def judge_logits(judge: GlmForCausalLM, ids: list[int]) -> torch.Tensor:
    """[n, vocab]; the whole sequence at once, without a cache."""
    return judge(torch.tensor([ids]), use_cache=False).logits[0]


def judge_greedy(judge: GlmForCausalLM, ids: list[int], count: int) -> tuple[list[int], float]:
    """Greedy ids, and the smallest distance between the best and the second logit on the way."""
    answer, margin = [], float("inf")
    for _ in range(count):
        best = judge_logits(judge, ids + answer)[-1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        answer.append(int(best.indices[0]))
    return answer, margin


@torch.inference_mode()
def judge_cache(judge: GlmForCausalLM, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [layers, n, groups, head_dim]."""
    layers = judge(torch.tensor([ids]), use_cache=True).past_key_values.layers
    stacked = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    keys, values = (tensor.transpose(1, 2).contiguous() for tensor in stacked)
    return keys, values


def make_case(judge: GlmForCausalLM, vocab: int, length: int, generator: torch.Generator) -> tuple[dict, dict]:
    ids = torch.randint(3, vocab, (length + DECODED,), generator=generator).tolist()
    logits = judge_logits(judge, ids)
    greedy, margin = judge_greedy(judge, ids[:length], 32)
    if margin < 2e-3:
        raise SystemExit(f"the greedy answer hangs on {margin}: choose another seed")
    keys, values = judge_cache(judge, ids)
    case = {"input_ids": ids[:length], "decode_ids": ids[length:], "greedy_32": greedy, "greedy_min_margin": margin}
    tensors = {
        "prefill_logits": logits[:length].clone(),
        "decode_logits": logits[length:].clone(),
        "key_cache_after_decode": keys,
        "value_cache_after_decode": values,
    }
    return case, tensors


def write_reference(name: str, family: str, seed: int, changes: dict) -> None:
    config = make_config(changes)
    weights = make_weights(config, seed)
    judge = build_judge(config, family, weights)
    generator = torch.Generator().manual_seed(seed)
    cases, tensors = [], {}
    for i, length in enumerate(PROMPT_LENGTHS):
        case, results = make_case(judge, config["padded_vocab_size"], length, generator)
        cases.append({"name": f"case{i}", **case})
        tensors |= {f"case{i}.{key}": tensor for key, tensor in results.items()}
    chunked = cases[-1]["input_ids"][:15]
    tensors["chunked.logits"] = judge_logits(judge, chunked)
    vectors = {
        "meta": {
            "family": family,
            "seed": seed,
            "source": "transformers GlmForCausalLM, float32, tools/make_reference.py",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cases": cases,
        "chunked": {"input_ids": chunked, "chunks": [7, 5, 3]},
        "eos_stop": eos_stop(cases[1]),
    }
    folder = TARGET / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "vectors.safetensors")
    for file, content in (("config.json", config), ("vectors.json", vectors)):
        (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def eos_stop(case: dict) -> dict:
    """The fifth greedy id declared an end token."""
    eos = case["greedy_32"][4]
    expected = case["greedy_32"][: case["greedy_32"].index(eos) + 1]
    return {"input_ids": case["input_ids"], "eos_token_id": [eos], "output_ids_including_eos": expected}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (family, seed, changes) in REFERENCES.items():
        write_reference(name, family, seed, changes)
        print(TARGET / name)
