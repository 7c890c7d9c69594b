"""Many rows of activations times a weight: decode a slice of the weight, multiply on the library's or our tensor cores.

exact  the slice becomes a matrix of the activation's dtype in the rotated basis, cuBLAS multiplies it with the rotated
       activations. Rounding is that of the same product with an unquantized weight.
int8   the slice becomes int8 units, gemm_int8.py multiplies them with the int8 activations.

Slices bound the memory: the weight of a layer never exists whole, and a slice that was just written is still in the L2
cache of a large GPU when it is read.
"""

from __future__ import annotations

import torch

from hlwq_cuda.kernels.dequantize import dequantize
from hlwq_cuda.kernels.gemm_int8 import gemm_int8
from hlwq_cuda.kernels.plain import Activation

SLICE_BYTES = 32 << 20


def slice_rows(row_bytes: int) -> int:
    """Rows of the weight that are decoded at a time: whole tiles of 256."""
    return max(256, SLICE_BYTES // row_bytes // 256 * 256)


def multiply_exact(
    rotated: torch.Tensor,  # [M, Kp], float16, bfloat16 or float32
    codes: torch.Tensor,
    norms: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,  # [M, N], dtype of `rotated`
    bits: int,
    block_size: int,
) -> None:
    """out = rotated @ weight.T + bias."""
    step = slice_rows(rotated.shape[1] * rotated.element_size())
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        weight = rotated.new_empty((len(codes[part]), rotated.shape[1]))
        dequantize(codes[part], norms[part], table, weight, bits, block_size)
        torch.mm(rotated, weight.T, out=out[:, part])
    if bias is not None:
        out += bias


def multiply_int8(
    activation: Activation,  # int8
    codes: torch.Tensor,
    norms: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,  # [M, N]
    bits: int,
    block_size: int,
) -> None:
    """out = activation @ weight.T + bias, both rounded to int8."""
    width = activation.values.shape[1]
    step = slice_rows(width)
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        units = activation.values.new_empty((len(codes[part]), width))
        dequantize(codes[part], norms[part], table, units, bits, block_size)
        part_bias = None if bias is None else bias[part]
        gemm_int8(activation, units, norms[part], table, part_bias, out[:, part], bits, block_size)
