"""Many rows of activations times a weight on int8 tensor cores: mode int8 above the few rows of gemm.py.

    y[m, n] = scale[m] * step[n] * sum over k of values[m, k] * units[n, k] + bias[n]

Hopper's int8 tensor cores are twice as fast as those for bf16, but a scale a block of 128 costs more than that gains:
the sums of every block would pass through float32 (1.0 to 1.2 times bf16's time on an H100). So both operands have one
scale a row here: activations the largest rotated magnitude of their row, and the weight, whose norms differ from block
to block, is decoded to multiples of step[n] = (largest norm of the row) * (largest centroid) / 127. What both roundings
cost in quality stands in docs/measurements.md, beside what the mode costs in a decode step.

A slice of the weight is decoded to int8 at a time, as in prefill.py. The product is Triton's: tiles by the tensor
memory accelerator where the GPU has one, sums in int32, which K up to 133,000 cannot overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.dequantize import dequantize_int8
from hlwq_cuda.kernels.prefill import slice_rows
from hlwq_cuda.kernels.rotate import quantize_rows


class Tile(NamedTuple):
    """How a product is cut up."""

    rows: int  # of activations
    outputs: int
    width: int  # of K, in one step
    warps: int
    stages: int


def pick(rows: int, outputs: int, processors: int, capability: tuple[int, int]) -> Tile:
    """The tile for [M, N] = [`rows`, `outputs`] on a GPU of so many multiprocessors and this compute capability.

    On an H100 the large tile is best where there is one for every multiprocessor (docs/measurements.md).
    """
    if capability[0] not in (9, 10):
        return Tile(128, 128, 64, 8, 3)  # 48 KB of shared memory
    large = Tile(128, 256, 128, 8, 4)  # 192 KB
    tiles = integers.cdiv(rows, large.rows) * integers.cdiv(outputs, large.outputs)
    return large if tiles >= processors else Tile(64, 128, 128, 4, 4)


def multiply(
    x: torch.Tensor,  # [M, K], float16, bfloat16 or float32
    codes: torch.Tensor,  # int32 [N, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    bias: torch.Tensor | None,  # [N]
    out: torch.Tensor,  # [M, N], any floating dtype
    bits: int,
    block_size: int,
    tile: Tile,
    launch: dict,
) -> None:
    """out = x @ weight.T + bias."""
    values, scales = quantize_rows(x, block_size, launch)
    step = slice_rows(values.shape[1])
    slices = zip(codes.split(step), norms.split(step), out.split(step, 1), strict=True)
    for number, (part, part_norms, part_out) in enumerate(slices):
        units = values.new_empty((part.shape[0], values.shape[1]))
        steps = scales.new_empty(part.shape[0])
        dequantize_int8(part, part_norms, table, units, steps, bits, block_size)
        part_bias = None if bias is None else bias[number * step : (number + 1) * step]
        product(values, units, scales, steps, part_bias, part_out, tile)


def product(
    values: torch.Tensor,  # int8 [M, K]
    units: torch.Tensor,  # int8 [N, K]
    scales: torch.Tensor,  # float32 [M]
    steps: torch.Tensor,  # float32 [N]
    bias: torch.Tensor | None,  # [N]
    out: torch.Tensor,  # [M, N], its last stride 1
    tile: Tile,
) -> None:
    """out = scales * values @ units.T * steps + bias."""
    (rows, width), outputs = values.shape, units.shape[0]
    grid = (integers.cdiv(rows, tile.rows) * integers.cdiv(outputs, tile.outputs),)
    product_kernel[grid](
        TensorDescriptor.from_tensor(values, [tile.rows, tile.width]),
        TensorDescriptor.from_tensor(units, [tile.outputs, tile.width]),
        scales,
        steps,
        out if bias is None else bias,
        out,
        rows,
        outputs,
        out.stride(0),
        K=width,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        WIDTH=tile.width,
        HAS_BIAS=bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


_GROUP = tl.constexpr(8)  # tiles of rows that share tiles of the weight while these are in the cache


@triton.jit
def product_kernel(
    values,  # descriptor of int8 [M, K], tiles [ROWS, WIDTH]; zeros beyond the edges
    units,  # descriptor of int8 [N, K], tiles [OUTPUTS, WIDTH]
    scales,  # float32 [M]
    steps,  # float32 [N]
    bias,  # [N], or unused
    out,  # [M, N]
    M,
    N,
    stride,  # of a row of `out`
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row_tiles = tl.cdiv(M, ROWS)
    in_group = _GROUP * tl.cdiv(N, OUTPUTS)
    first = tl.program_id(0) // in_group * _GROUP
    size = tl.minimum(row_tiles - first, _GROUP)
    m = (first + tl.program_id(0) % in_group % size) * ROWS
    n = tl.program_id(0) % in_group // size * OUTPUTS
    sums = tl.zeros((ROWS, OUTPUTS), tl.int32)
    for k in range(0, K, WIDTH):
        sums = tl.dot(values.load([m, k]), units.load([n, k]).T, sums, out_dtype=tl.int32)
    row = m + tl.arange(0, ROWS)
    output = n + tl.arange(0, OUTPUTS)
    y = sums.to(tl.float32) * tl.load(scales + row, mask=row < M, other=0.0)[:, None]
    y *= tl.load(steps + output, mask=output < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + output, mask=output < N, other=0.0).to(tl.float32)[None, :]
    at = row[:, None].to(tl.int64) * stride + output[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (output < N)[None, :])
