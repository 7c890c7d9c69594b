"""Many rows (prefill) in int8: tensor-core product of int8 activations and int8 weights, rescaled once a block.

    y[m, n] = step * sum over blocks of norm[n] * scale[m] * (dot(units, values[m]) + half_sum[m]) + bias[n]

The weight is decoded to int8 units first (dequantize.py), a slice of rows at a time: one byte a weight, half of what a
bf16 weight costs to write and to read. int8 tensor cores multiply at twice the bf16 rate; the rescale of every block of
128 (convert, multiply, fused multiply-add) takes about as long as its product, and can overlap with another one's.
The half sums, which int8 units need at 4 and 5 bits (tables.py), enter as one more small product at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import decode, mma
from hlwq_cuda.kernels.plain import Activation


def gemm_int8(
    activation: Activation,  # int8, M rows
    units: torch.Tensor,  # int8 [N, Kp]: dequantize.py
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    bias: torch.Tensor | None,  # [N]
    out: torch.Tensor,  # [M, N], columns side by side; rows may be further apart
    bits: int,
    block_size: int,
    tile: tuple[int, int] = (128, 128),
    warps: int = 8,
    stages: int = 3,
) -> None:
    """out = activation @ weight.T + bias."""
    rows, outputs = out.shape
    has_offsets = mma.is_offset(bits, True)
    offsets = activation.scales
    if has_offsets:
        offsets = offsets * activation.half_sums.unflatten(-1, (-1, block_size // 32)).sum(-1)
    step = table[decode.table_words(bits, "int8").stop :]
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(outputs, tile[1]),)
    gemm_int8_kernel[grid](
        activation.values,
        activation.scales,
        offsets,
        units,
        norms,
        step.view(torch.float32),
        out if bias is None else bias,
        out,
        rows,
        outputs,
        out.stride(0),
        K_BLOCKS=norms.shape[1],
        B=block_size,
        BM=tile[0],
        BN=tile[1],
        GROUP=8,
        HAS_OFFSETS=has_offsets,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def gemm_int8_kernel(
    values,  # int8 [M, Kp]
    scales,  # f32 [M, Kp / B]
    offsets,  # f32 [M, Kp / B]: scale * half sum of the block; HAS_OFFSETS only
    units,  # int8 [N, Kp]
    norms,  # fp16 [N, Kp / B]
    step,  # f32, its first element
    bias,  # [N] or unused
    y,  # [M, row_stride >= N]
    M,
    N,
    row_stride,
    K_BLOCKS: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # tiles in columns of GROUP row tiles: neighbors in time share weights and activations in the L2 cache
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group, place = tl.program_id(0) // (GROUP * column_tiles), tl.program_id(0) % (GROUP * column_tiles)
    rows_in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
    m = (group * GROUP + place % rows_in_group) * BM + tl.arange(0, BM)
    n = place // rows_in_group * BN + tl.arange(0, BN)
    m_in, n_in = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    k = tl.arange(0, B)
    value_at = values + m_in[:, None] * (K_BLOCKS * B) + k[None, :]
    unit_at = units + n_in[None, :] * (K_BLOCKS * B) + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(K_BLOCKS):
        dots = tl.dot(tl.load(value_at), tl.load(unit_at))
        scale = tl.load(scales + m_in * K_BLOCKS + block)
        norm = tl.load(norms + n_in * K_BLOCKS + block).to(tl.float32)
        acc += dots.to(tl.float32) * (scale[:, None] * norm[None, :])
        value_at += B
        unit_at += B
    if HAS_OFFSETS:
        for first in range(0, K_BLOCKS, 32):
            b = first + tl.arange(0, 32)
            offset = tl.load(offsets + m_in[:, None] * K_BLOCKS + b[None, :], mask=b[None, :] < K_BLOCKS, other=0.0)
            norm = tl.load(norms + n_in[None, :] * K_BLOCKS + b[:, None], mask=b[:, None] < K_BLOCKS, other=0.0)
            acc = tl.dot(offset, norm.to(tl.float32), acc)  # tf32: the offsets are about 1 % of the sums
    acc *= tl.load(step)
    if HAS_BIAS:
        acc += tl.load(bias + n_in).to(tl.float32)[None, :]
    out = y + m[:, None].to(tl.int64) * row_stride + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
