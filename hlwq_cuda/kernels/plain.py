"""Every operation in plain torch: the body on machines without a GPU, and what the kernels' tests compare with.

The arithmetic is that of the kernels (format.md step 5): rotate the activation, never the weight; then
y = sum over blocks of norm * scale * dot(entry, value), where `entry` is a centroid rounded to fp16 or int8 and
(`value`, `scale`) are the rotated activation in fp16 or int8 with one scale a block. Sums are float32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from hlwq_cuda.kernels.layout import CHUNK, unpack_codes
from hlwq_cuda.kernels.tables import float_entries


class Activation(NamedTuple):
    """Rotated activations as the matrix kernels read them. `rotated = values * scales * sqrt(B)`, block by block."""

    values: torch.Tensor  # fp16 or int8 [M, Kp]
    scales: torch.Tensor  # float32 [M, Kp / B]; holds both factors 1 / sqrt(B): of the rotation and of the centroids
    half_sums: torch.Tensor  # float32 [M, Kp / 32]: sum(values) / 2 of each chunk, for int8 entries (tables.py)
    # float32 [M, Kp / B], after an RMSNorm that leaves its factor 1 / sqrt(sum + eps) to the product (norm.py)
    mean_squares: torch.Tensor | None = None
    eps: float = 0.0


def rotate(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., K] -> x @ H_B of every block, zeros appended to whole blocks: [..., Kp], dtype of x."""
    return (_sums(x, block_size) * block_size**-0.5).flatten(-2).to(x.dtype)


def quantize_activation(x: torch.Tensor, block_size: int, mode: str) -> Activation:
    """Rotate [M, K] and scale every block: to int8 by its largest magnitude, or to fp16 by a power of two.

    The power of two costs no accuracy and keeps bf16 activations of any size, and sums of products, inside fp16.
    """
    sums = _sums(x, block_size)
    largest = sums.abs().amax(-1, keepdim=True)
    if mode == "int8":
        scales = torch.where(largest > 0, largest, 1.0) / 127
        values = torch.round(sums / scales).to(torch.int8)
    else:
        scales = torch.exp2(torch.frexp(largest).exponent.float())
        values = (sums / scales).to(torch.float16)
    half_sums = values.float().unflatten(-1, (-1, CHUNK)).sum(-1) / 2
    return Activation(values.flatten(-2), (scales / block_size).flatten(-2), half_sums.flatten(-2))


def decode(codes, norms, table, bits: int, block_size: int, mode: str = "exact") -> torch.Tensor:
    """norm * centroid in the rotated basis, without the factor 1 / sqrt(B): float32 [..., N, Kp]."""
    values = float_entries(table, bits, mode)[unpack_codes(codes, bits).int()]
    return (values.unflatten(-1, (-1, block_size)) * norms.float()[..., None]).flatten(-2)


def linear(
    x, codes, norms, table, bias, bits: int, block_size: int, in_features: int, mode: str, kernel: str
) -> torch.Tensor:
    """[..., K] -> [..., N]; see ops.linear. kernel: what ops.pick returned, for its rounding."""
    rows = x.reshape(-1, in_features)
    if kernel == "prefill_int8":
        (values, scales), (units, steps) = quantize_rows(rows, block_size), decode_int8(codes, norms, table, bits)
        out = (values.float() * scales[:, None]) @ (units.float() * (steps * block_size**-0.5)[:, None]).T
    else:
        activation = quantize_activation(rows, block_size, mode)
        out = multiply(activation, codes, norms, table, bits, block_size, mode)
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_rows(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate [M, K]; int8 [M, Kp] and one scale a row, float32 [M]: rotated = values * scale."""
    sums = _sums(x, block_size).flatten(-2)
    scales = sums.abs().amax(-1).clamp_min(1e-20) / 127
    return torch.round(sums / scales[:, None]).to(torch.int8), scales * block_size**-0.5


def decode_int8(codes, norms, table, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """norm * centroid in the rotated basis, without 1 / sqrt(B): int8 [N, Kp] and one step a row, float32 [N]."""
    entries = float_entries(table, bits, "exact")
    steps = norms.float().amax(-1) * entries[-1] / 127
    factors = norms.float() * torch.where(steps > 0, 1 / steps, 0.0)[:, None]
    values = entries[unpack_codes(codes, bits).int()].unflatten(-1, (norms.shape[-1], -1)) * factors[..., None]
    return torch.round(values).flatten(-2).to(torch.int8), steps


def multiply(activation: Activation, codes, norms, table, bits: int, block_size: int, mode: str) -> torch.Tensor:
    """Activations as kernels read them [M, Kp] times the weight: float32 [M, N]."""
    blocks = activation.values.float().unflatten(-1, (-1, block_size)) * activation.scales[..., None]
    out = blocks.flatten(-2) @ decode(codes, norms, table, bits, block_size, mode).T
    if activation.mean_squares is not None:
        out *= torch.rsqrt(activation.mean_squares.sum(-1, keepdim=True) + activation.eps)
    return out


def dequantize(codes, norms, table, bits: int, block_size: int, in_features: int, dtype) -> torch.Tensor:
    """The weight [..., N, K]; see ops.dequantize."""
    rotated = decode(codes, norms, table, bits, block_size) * block_size**-0.5
    return rotate(rotated, block_size)[..., :in_features].to(dtype)


def embedding(ids, codes, norms, table, bits: int, block_size: int, in_features: int, dtype) -> torch.Tensor:
    """Rows of the weight: [...] -> [..., K]; see ops.embedding."""
    return dequantize(codes[ids], norms[ids], table, bits, block_size, in_features, dtype)


def _sums(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every block times the Hadamard matrix of +1 and -1: float32 [..., Kp / B, B]."""
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block_size))
    return x.unflatten(-1, (-1, block_size)) @ _hadamard(block_size).to(x.device)


@cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
