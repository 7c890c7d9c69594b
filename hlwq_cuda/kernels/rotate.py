"""The block rotation alone, and with the scaling that the matrix kernels read (device.py has the transform itself).

One warp rotates a few blocks of 32 to 128 values: nothing but its own registers and one trip through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import (
    allow_next_kernel,
    hadamard_matrix,
    hadamard_sums,
    round_to_int8,
    store_activation,
    wait_for_previous_kernel,
)
from hlwq_cuda.kernels.layout import CHUNK
from hlwq_cuda.kernels.plain import Activation

_REGISTERS = 16384  # values that eight warps hold, 64 a lane
_PROGRAMS = 528  # four a multiprocessor of an H100
_FILLS_A_GPU = 2048  # blocks, about 16 warps a multiprocessor: from here on a warp takes several


@triton.jit
def rotate_kernel(
    x,  # [M, K]
    out,  # [M, Kp]
    K: tl.constexpr,
    B: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    wait_for_previous_kernel(PDL)
    values = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    padded: tl.constexpr = (K + B - 1) // B * B
    rotated = hadamard_sums(values, B) * B**-0.5
    tl.store(out + row * padded + column, rotated.to(out.dtype.element_ty), mask=column < padded)


@triton.jit
def quantize_activation_kernel(
    x,  # [M, K]
    values,  # float16 or int8 [M, Kp]
    scales,  # float32 [M, Kp / B]
    half_sums,  # float32 [M, Kp / 32]
    K: tl.constexpr,
    B: tl.constexpr,
    BLOCKS: tl.constexpr,
    MODE: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (K + B - 1) // B
    block = tl.minimum(tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), blocks - 1)  # a last one may come twice
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    wait_for_previous_kernel(PDL)
    loaded = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    values += row * blocks * B
    half_sums += row * blocks * (B // 32)
    store_activation(loaded, 1.0, block, values, scales + row * blocks, half_sums, K, B, MODE)


@triton.jit
def quantize_rows_kernel(
    x,  # [M, K]
    values,  # int8 [M, Kp]
    scales,  # float32 [M]
    M,
    K: tl.constexpr,
    B: tl.constexpr,
    BLOCKS: tl.constexpr,  # taken at a time
    PDL: tl.constexpr,
):
    """A row at a time, which stays in registers where it fits; else it is rotated twice, for its scale and to store.

    fp16 and bf16 rows are rotated by tensor cores, exactly but for the float32 sums: by sums and differences, 2048 rows
    of 4096 took 25 us on an H100, three times what reading and writing take. A program makes the matrix for many rows.
    """
    allow_next_kernel(PDL)
    padded: tl.constexpr = (K + B - 1) // B * B
    matrix = hadamard_matrix(B, x.dtype.element_ty)
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    while row < M:
        source = x + row * K
        target = values + row * padded
        if BLOCKS * B >= padded:
            column, sums = _rotated_sums(source, 0, matrix, K, B, BLOCKS)
            scale = tl.maximum(tl.max(tl.max(tl.abs(sums), 1), 0), 1e-20) / 127.0
            tl.store(target + column, round_to_int8(sums, scale).to(tl.int8), mask=column < padded)
        else:
            largest = tl.zeros((BLOCKS,), tl.float32)
            for first in tl.range(0, padded // B, BLOCKS):
                column, sums = _rotated_sums(source, first, matrix, K, B, BLOCKS)
                largest = tl.maximum(largest, tl.max(tl.abs(sums), 1))
            scale = tl.maximum(tl.max(largest, 0), 1e-20) / 127.0
            for first in tl.range(0, padded // B, BLOCKS):
                column, sums = _rotated_sums(source, first, matrix, K, B, BLOCKS)
                tl.store(target + column, round_to_int8(sums, scale).to(tl.int8), mask=column < padded)
        tl.store(scales + row, scale * B**-0.5)
        row += tl.num_programs(0)


@triton.jit
def _rotated_sums(x, first, matrix, K: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr):
    """Blocks `first` .. `first` + BLOCKS - 1 of the row at x, times H_B * sqrt(B), and their columns: [BLOCKS, B]."""
    column = (first + tl.arange(0, BLOCKS))[:, None] * B + tl.arange(0, B)[None, :]
    loaded = tl.load(x + column, mask=column < K, other=0.0)
    if loaded.dtype == tl.float32:
        sums = hadamard_sums(loaded, B)
    else:
        sums = tl.dot(loaded, matrix)
    return column, sums


def rotate(x: torch.Tensor, block_size: int, launch: dict) -> torch.Tensor:
    """[..., K] -> x @ H_B of every block, [..., Kp], dtype of x."""
    size = x.shape[-1]
    blocks = integers.cdiv(size, block_size)
    out = x.new_empty((*x.shape[:-1], blocks * block_size))
    rows = x.numel() // size
    if rows:
        each = _blocks_a_program(rows * blocks)
        grid = (rows, integers.cdiv(blocks, each))
        rotate_kernel[grid](x.contiguous(), out, K=size, B=block_size, BLOCKS=each, num_warps=1, **launch)
    return out


def quantize_activation(x: torch.Tensor, block_size: int, mode: str, launch: dict) -> Activation:
    """[M, K], M > 0 -> the rows as the matrix kernels read them; plain.quantize_activation says what it computes."""
    rows, size = x.shape
    blocks = integers.cdiv(size, block_size)
    padded = blocks * block_size
    out = Activation(
        x.new_empty((rows, padded), dtype=torch.int8 if mode == "int8" else torch.float16),
        x.new_empty((rows, blocks), dtype=torch.float32),
        x.new_empty((rows, padded // CHUNK), dtype=torch.float32),
    )
    each = _blocks_a_program(rows * blocks)
    grid = (rows, integers.cdiv(blocks, each))
    quantize_activation_kernel[grid](
        x.contiguous(),
        out.values,
        out.scales,
        out.half_sums,
        K=size,
        B=block_size,
        BLOCKS=each,
        MODE=mode,
        num_warps=1,
        **launch,
    )
    return out


def quantize_rows(x: torch.Tensor, block_size: int, launch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K], M > 0 -> rotated rows as int8 [M, Kp] with one scale each, float32 [M]: rotated = values * scale."""
    rows, size = x.shape
    blocks = integers.cdiv(size, block_size)
    values = x.new_empty((rows, blocks * block_size), dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    together = max(16, min(_REGISTERS // block_size, integers.next_power_of_2(blocks)))
    shape = {"K": size, "B": block_size, "BLOCKS": together}
    warps = max(1, min(8, together * block_size // 1024))
    quantize_rows_kernel[(min(rows, _PROGRAMS),)](
        x.contiguous(), values, scales, rows, **shape, num_warps=warps, **launch
    )
    return values, scales


def _blocks_a_program(blocks: int) -> int:
    return 1 if blocks < _FILLS_A_GPU else 4
