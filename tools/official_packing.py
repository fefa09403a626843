"""The official int8 and int4 checkpoints, made and unpacked once more to judge server/quant: nothing of it is shared.

The rule of ``quantization.py`` in THUDM/chatglm2-6b-int4 and THUDM/chatglm-6b-int4: one scale per row, no zero point.
"""

import torch
from torch import Tensor

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
SHARED = ("transformer.word_embeddings.weight", "lm_head.weight")  # of ChatGLM-6B with quantization_embeddings


def pack_checkpoint(weights: dict[str, Tensor], bits: int, *, embeddings: bool = False) -> dict[str, Tensor]:
    """Every layer's four matrices as ``weight`` (codes) and ``weight_scale``; the rest as it is.

    ``embeddings``: also ChatGLM-6B's word embeddings, whose codes and scale the output layer shares, as
    chatglm-6b-int4-qe has them.
    """
    packed = {}
    for name, tensor in weights.items():
        owner = name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith(".weight") and ".layers." in name and owner in LINEARS:
            packed[name], packed[name + "_scale"] = pack_matrix(tensor, bits)
        elif embeddings and name in SHARED:
            packed[name], packed[name + "_scale"] = pack_matrix(weights[SHARED[0]], bits)
        else:
            packed[name] = tensor
    return packed


def unpack_checkpoint(packed: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """All weights in float32, as the official code computes on a CPU after ``.float()``."""
    weights = {name: tensor.float() for name, tensor in packed.items() if not name.endswith("_scale")}
    for name in [name for name in packed if name.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        weights[weight] = unpack_matrix(packed[weight], packed[name], bits)
    return weights


def pack_matrix(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] or [out, in / 2], and scales [out] in the weight's dtype, which all is computed in."""
    scale = weight.abs().amax(dim=1) / (127 if bits == 8 else 7)
    codes = (weight / scale.unsqueeze(1)).round().nan_to_num(0).to(torch.int16)  # 0 / 0 in a row of zeros
    if bits == 4:
        high, low = codes[:, 0::2], codes[:, 1::2]
        codes = high * 16 + low % 16
    return codes.to(torch.int8), scale


def unpack_matrix(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """float32 [out, in]."""
    values = codes.to(torch.int16)
    if bits == 4:
        high = values.div(16, rounding_mode="floor")
        low = (values + 8) % 16 - 8  # the signed nibble
        values = torch.stack([high, low], dim=2).flatten(1)
    return values.float() * scale.float().unsqueeze(1)
