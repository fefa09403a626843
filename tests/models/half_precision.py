"""How far a checkpoint's logits in half precision are from its stored float32 ones: ours, and another network's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.models.reference import Reference, load_reference
from tools.official_packing import unpack_checkpoint
from tools.plain_networks import plain_network
from tools.reference_checkpoints import stored_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OFFICIAL_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # in half_logits.safetensors


class Distance(NamedTuple):
    """From the float32 logits [T, vocab] of all prompts, in units of their standard deviation."""

    largest: float
    rms: float
    kl: float  # mean KL divergence of the next token's distribution, nats

    @classmethod
    def between(cls, logits: torch.Tensor, exact: torch.Tensor) -> Distance:
        difference = (logits.float() - exact) / exact.std()
        p, q = exact.log_softmax(-1), logits.float().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        return cls(float(difference.abs().max()), float(difference.square().mean().sqrt()), float(kl))


def prompts(ref: Reference) -> dict[str, list[int]]:
    """The prompts whose logits are stored, by the name of those."""
    cases = {f"case{i}.prefill_logits": case["input_ids"] for i, case in enumerate(ref.vectors.get("cases", []))}
    return {name: ids for name, ids in cases.items() if name in ref.tensor_names}


def stored_logits(ref: Reference) -> torch.Tensor:
    return torch.cat([ref.tensors[name] for name in prompts(ref)])


def our_distance(ref: Reference, dtype: torch.dtype) -> Distance:
    ours = load_reference(ref.folder, ref.bits, dtype)
    logits = [ours.conversation().feed(ids)[0] for ids in prompts(ref).values()]
    return Distance.between(torch.cat(logits), stored_logits(ref))


@torch.inference_mode()
def plain_distance(ref: Reference, dtype: torch.dtype) -> Distance:
    network = plain_reference(ref).to(dtype)
    logits = [network(torch.tensor(ids)) for ids in prompts(ref).values()]
    return Distance.between(torch.cat(logits), stored_logits(ref))


def official_distance(ref: Reference, dtype: torch.dtype) -> Distance | None:
    """Of the official code's own half precision, where a folder holds that."""
    if not (ref.folder / "half_logits.safetensors").exists():
        return None
    stored = load_file(ref.folder / "half_logits.safetensors")
    names = [f"{name}.{OFFICIAL_NAMES[dtype]}" for name in prompts(ref)]
    return Distance.between(torch.cat([stored[name] for name in names]), stored_logits(ref))


def plain_reference(ref: Reference) -> torch.nn.Module:
    """tools/plain_networks.py with a folder's weights, in float32."""
    weights = stored_weights(ref.model)
    if "ptuning" in ref.adapter:
        weights |= stored_weights(ref.folder)
    if bits := ref.config.get("quantization_bit"):
        weights = unpack_checkpoint(weights, bits)
    network = plain_network(ref.config, ref.family.name)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    if "lora" in ref.adapter:
        network = PeftModel.from_pretrained(network, str(ref.folder)).merge_and_unload()
    return network.eval()
