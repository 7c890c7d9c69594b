"""Many rows of activations times a weight: decode a slice of the weight, multiply by the library (cuBLAS).

A slice becomes a matrix of the activation's dtype in the rotated basis and is multiplied with rotated activations:
rounding is that of the same product with an unquantized weight. For mode exact, and for int8 where prefill_int8.py does
not serve. Slices bound the memory: of a large weight, an output head say, only a part exists at a time.
"""

from __future__ import annotations

import torch

from hlwq_cuda.kernels.dequantize import dequantize

# H200, M = 512: a whole layer is up to 12 % faster than 64 MB, 32 MB up to 20 % slower. Each layer of an 8B model fits.
SLICE_BYTES = 128 << 20


def slice_rows(row_bytes: int) -> int:
    """Rows of the weight that are decoded at a time: whole tiles of 256."""
    return max(256, SLICE_BYTES // row_bytes // 256 * 256)


def multiply(
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
    for part, part_norms, part_out in zip(codes.split(step), norms.split(step), out.split(step, 1), strict=True):
        weight = rotated.new_empty((part.shape[0], rotated.shape[1]))
        dequantize(part, part_norms, table, weight, bits, block_size)
        torch.mm(rotated, weight.T, out=part_out)
    if bias is not None:
        out += bias
