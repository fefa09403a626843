"""The reference back end: plain torch, any device, any floating dtype. Others are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from server.kernels import quantize
from server.kernels.ops import DecoderLayer, QuantWeight

# values of a weight that are unpacked at once: small beside a model, large enough for the matrix product
_BLOCK_VALUES = 1 << 22


def dequantize(weight: QuantWeight, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of the matrix that a QuantWeight stands for, [rows, in_features] in ``dtype``; products in float32."""
    codes, scales = weight.codes[rows], weight.scales[rows]
    if weight.bits == 4:
        places = torch.stack([(codes >> 4) & 15, codes & 15], dim=-1)
        codes = weight.table.to(codes.device)[places.int()]
    grouped = codes.view(*scales.shape, weight.group_size).float()
    values = grouped.mul_(scales.unsqueeze(-1)).flatten(1)
    return values[:, : weight.in_features].to(dtype)


class TorchOps:
    """See ``kernels.ops.Ops`` for what every operation means."""

    name = "torch"
    storage = None
    dense_bits = 16

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (weight * (x32 * scale)).to(x.dtype)

    def rotary_interleaved(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        pairs = x[..., : 2 * cos_sin.shape[1]].unflatten(-1, (-1, 2))
        cos, sin = cos_sin.unsqueeze(1).unbind(-1)
        even, odd = pairs.float().unbind(-1)
        pairs.copy_(torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1))
        return x

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, context: int = 0
    ) -> torch.Tensor:
        (n, heads, _), (groups, length, _) = query.shape, key.shape
        key, value = key.to(query.dtype), value.to(query.dtype)
        grouped = query.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, H/G, n, d]
        if n == 1:
            # the group's query heads become rows, so that keys and values are read once for all of them
            out = F.scaled_dot_product_attention(grouped.transpose(1, 2), key.unsqueeze(1), value.unsqueeze(1))
            return out.reshape(1, -1)
        shared = (groups, heads // groups, length, -1)
        out = F.scaled_dot_product_attention(
            grouped,
            key.unsqueeze(1).expand(shared),
            value.unsqueeze(1).expand(shared),
            **_mask(n, length, context, query.device),
        )
        return out.permute(2, 0, 1, 3).reshape(n, -1)

    def quantize(self, weight: torch.Tensor, bits: int) -> QuantWeight:
        return quantize.quantize(weight, bits)

    def prepare(self, weight: QuantWeight) -> QuantWeight:
        return weight

    def quant_linear(self, x: torch.Tensor, weight: QuantWeight, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.out_features)
        if x.shape[0] == 0:
            return out
        step = max(1, _BLOCK_VALUES // weight.in_features)
        for start in range(0, weight.out_features, step):
            rows = slice(start, start + step)
            out[:, rows] = F.linear(x, dequantize(weight, x.dtype, rows), None if bias is None else bias[rows])
        return out

    def decoder(self, layers: Sequence[DecoderLayer]) -> None:
        return None


def _mask(n: int, length: int, context: int, device: torch.device) -> dict:
    """How to tell scaled_dot_product_attention which keys a row sees; a mask is made only where it needs one."""
    if context >= length:
        return {}
    if context == 0 and n == length:
        return {"is_causal": True}
    visible = torch.ones(n, length, dtype=torch.bool, device=device).tril_(length - n)
    visible[:, :context] = True
    return {"attn_mask": visible}
