"""A few rows of activations times a weight (M = 2 to 64).

    y[m, n] = sum over blocks of norm[n] * scale[m] * dot(entries of the block, values[m]) + bias[n]

Two bodies, the same arithmetic. gemm_mma.py decodes into the fragments of tensor-core instructions and is what GPUs
run, for every width, block size and number of rows. The kernel below is its readable twin on `tl.dot`, and fetches the
word of every code anew: Triton's interpreter runs it on a CPU, and the tests compare both with numpy.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import decode, integers, mma
from hlwq_cuda.kernels.layout import CHUNK, PLANES
from hlwq_cuda.kernels.plain import Activation
from hlwq_cuda.kernels.unpack import load_entries

_TILE_ROWS = 8  # activation rows of an mma
_TILE_OUTPUTS = 16  # weight rows of an mma
_GROUP_CHUNKS = 16  # chunks of K that a warp takes at a time


class Config(NamedTuple):
    """How a product is cut up."""

    output_tiles: int  # tiles of 16 weight rows in a thread block
    row_tiles: int  # tiles of 8 activation rows in a thread block
    warps: int  # of a thread block; they split K
    ahead: int  # pieces of activations, 128 of K, in flight


# Multiprocessors -> (N, K, row tiles, int8) -> the best of up to nine configurations.
# H200 (132), 2026-11-23: benchmarks/results/gemm-sweep-h200.json
MEASURED: dict[int, dict[tuple[int, int, int, bool], Config]] = {
    132: {
        (4096, 4096, 1, False): Config(2, 1, 8, 1),
        (4096, 4096, 1, True): Config(2, 1, 4, 4),
        (4096, 4096, 2, False): Config(1, 2, 4, 4),
        (4096, 4096, 2, True): Config(1, 2, 4, 1),
        (4096, 4096, 4, False): Config(2, 4, 8, 1),
        (4096, 4096, 4, True): Config(1, 4, 4, 1),
        (6144, 4096, 1, False): Config(2, 1, 4, 1),
        (6144, 4096, 1, True): Config(2, 1, 4, 4),
        (6144, 4096, 2, False): Config(1, 2, 4, 4),
        (6144, 4096, 2, True): Config(1, 2, 4, 1),
        (6144, 4096, 4, False): Config(2, 4, 4, 1),
        (6144, 4096, 4, True): Config(2, 4, 4, 1),
        (24576, 4096, 1, False): Config(2, 1, 4, 1),
        (24576, 4096, 1, True): Config(2, 1, 2, 1),
        (24576, 4096, 2, False): Config(2, 2, 4, 1),
        (24576, 4096, 2, True): Config(1, 2, 4, 4),
        (24576, 4096, 4, False): Config(2, 4, 4, 1),
        (24576, 4096, 4, True): Config(2, 4, 4, 1),
        (4096, 12288, 1, False): Config(1, 1, 8, 1),
        (4096, 12288, 1, True): Config(1, 1, 8, 1),
        (4096, 12288, 2, False): Config(2, 2, 8, 4),
        (4096, 12288, 2, True): Config(1, 2, 8, 1),
        (4096, 12288, 4, False): Config(2, 4, 8, 1),
        (4096, 12288, 4, True): Config(2, 4, 8, 1),
    }
}


def pick(rows: int, outputs: int, chunks: int, int8: bool, processors: int) -> Config:
    """A configuration for M = `rows`, N = `outputs`, Kp = 32 `chunks`, on a GPU of so many multiprocessors.

    What was measured, else a heuristic from the same measurements: about ten warps a multiprocessor keep the memory
    busy; they split K where N is small, and two tiles of outputs share the activations where there are enough tiles.
    """
    row_tiles = min(mma.MAX_TILES, integers.cdiv(rows, _TILE_ROWS))
    measured = MEASURED.get(processors, {}).get((outputs, chunks * CHUNK, row_tiles, int8))
    if measured:
        return measured
    tiles = integers.cdiv(outputs, _TILE_OUTPUTS)
    output_tiles = 2 if tiles >= processors else 1
    wanted = integers.cdiv(10 * processors * output_tiles, tiles)
    warps = min(8, integers.next_power_of_2(wanted), integers.next_power_of_2(integers.cdiv(chunks, _GROUP_CHUNKS)))
    return Config(output_tiles, row_tiles, max(2, warps), 1)


def gemm(
    activation: Activation,  # M rows
    codes: torch.Tensor,  # int32 [N, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    bias: torch.Tensor | None,  # [N]
    out: torch.Tensor,  # [M, N], any floating dtype
    bits: int,
    block_size: int,
    mode: str,
    config: Config,
    launch: dict,  # PDL, and launch_pdl with it
) -> None:
    """out = activation @ weight.T + bias, on tensor cores."""
    from hlwq_cuda.kernels.gemm_mma import gemm_mma_kernel

    if activation.mean_squares is not None:
        raise ValueError("gemm takes activations that their norm has scaled; only gemv applies its factor")
    (rows, outputs), chunks, int8 = out.shape, norms.shape[1] * block_size // CHUNK, mode == "int8"
    texts, constraints = _texts(bits, int8, config.row_tiles, 128 // block_size)
    words = decode.table_words(bits, mode)
    grid = (
        integers.cdiv(outputs, _TILE_OUTPUTS * config.output_tiles),
        integers.cdiv(rows, _TILE_ROWS * config.row_tiles),
    )
    gemm_mma_kernel[grid](
        codes,
        norms,
        table,
        activation.values.view(torch.int32),
        activation.scales,
        out if bias is None else bias,
        out,
        rows,
        outputs,
        CHUNKS=chunks,
        BITS=bits,
        PLANE_0=PLANES[bits][0],
        PLANE_1=(*PLANES[bits], 0)[1],
        SUB_BLOCKS=128 // block_size,
        INT8=int8,
        BIAS=bias is not None,
        TABLE_AT=words.start,
        TABLE_WORDS=len(words),
        STEP_AT=words.stop,
        TEXTS=texts,
        CONSTRAINTS=constraints,
        R=config.output_tiles,
        TILES=config.row_tiles,
        AHEAD=config.ahead,
        num_warps=config.warps,
        **launch,
    )


@cache
def _texts(bits: int, int8: bool, tiles: int, sub_blocks: int) -> tuple[tuple[str, ...], str]:
    """The PTX of the four pieces of a group, and their constraints, which are the same."""
    pieces = [mma.multiply(mma.Piece(bits, int8, tiles, sub_blocks, index)) for index in range(mma.GROUP)]
    return tuple(text for text, _ in pieces), pieces[0][1]


def gemm_plain(activation, codes, norms, table, bias, out, bits: int, block_size: int, mode: str) -> None:
    """`gemm` by the readable kernel; arguments as there."""
    rows, outputs = out.shape
    grid = (integers.cdiv(rows, 16), integers.cdiv(outputs, 16))
    gemm_kernel[grid](
        activation.values,
        activation.scales,
        activation.half_sums,
        codes,
        norms,
        table,
        out if bias is None else bias,
        out,
        rows,
        outputs,
        BLOCKS=norms.shape[-1],
        B=block_size,
        BITS=bits,
        INT8=mode == "int8",
        STEP_AT=decode.table_words(bits, mode).stop,
        HALF_SUMS=mma.is_offset(bits, mode == "int8"),
        BIAS=bias is not None,
    )


@triton.jit
def gemm_kernel(
    values,  # float16 or int8 [M, BLOCKS * B]
    scales,  # float32 [M, BLOCKS]
    half_sums,  # float32 [M, BLOCKS * B / 32]
    codes,  # int32 [N, BLOCKS * B * BITS / 32]
    norms,  # float16 [N, BLOCKS]
    table,  # int32
    bias,  # [N], or unused
    out,  # [M, N]
    M,
    N,
    BLOCKS: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    INT8: tl.constexpr,
    STEP_AT: tl.constexpr,
    HALF_SUMS: tl.constexpr,
    BIAS: tl.constexpr,
):
    m = (tl.program_id(0) * 16 + tl.arange(0, 16)).to(tl.int64)
    n = (tl.program_id(1) * 16 + tl.arange(0, 16)).to(tl.int64)
    acc = tl.zeros((16, 16), tl.float32)
    for block in range(BLOCKS):
        k = block * B + tl.arange(0, B)
        x = tl.load(values + m[:, None] * (BLOCKS * B) + k[None, :], mask=m[:, None] < M, other=0)
        inside = (n[:, None] < N) & (k[None, :] >= 0)
        w = load_entries(codes, table, n[:, None], k[None, :], inside, BLOCKS * B * BITS // 32, BITS, INT8)
        # int8 units and activations are exact in fp16, and so are their sums in float32
        sums = tl.dot(x.to(tl.float16), tl.trans(w.to(tl.float16)))
        if HALF_SUMS:
            chunk = block * (B // 32) + tl.arange(0, B // 32)
            at = half_sums + m[:, None] * (BLOCKS * B // 32) + chunk[None, :]
            sums += tl.sum(tl.load(at, mask=m[:, None] < M, other=0.0), 1)[:, None]
        scale = tl.load(scales + m * BLOCKS + block, mask=m < M, other=0.0)
        norm = tl.load(norms + n * BLOCKS + block, mask=n < N, other=0.0).to(tl.float32)
        acc += sums * scale[:, None] * norm[None, :]
    if INT8:
        acc *= tl.load((table + STEP_AT).to(tl.pointer_type(tl.float32)))
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
