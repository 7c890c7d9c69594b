"""One row of activations times a weight (M = 1).

    y[n] = sum over blocks of norm[n] * scale * dot(entries of the block, values) + bias[n]

A thread block computes ROWS outputs. Its lanes lie side by side along K, a unit of codes each (decode.py), and add up
in float32 across the row before they meet in one reduction: splitting K over the warps of small thread blocks keeps
enough loads in flight even where N is small, and needs no second pass. Activations are shared by the rows of a block.
Two bodies, the same arithmetic: the kernel below in plain Triton, and gemv_gluon.py, which fixes the layout in
registers (no conversion through shared memory) and loads weights before the wait of programmatic dependent launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import dot, integers
from hlwq_cuda.kernels.device import allow_next_kernel, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation
from hlwq_cuda.kernels.unpack import load_entries


class Config(NamedTuple):
    """How a product is cut up."""

    rows: int  # outputs of a thread block
    units: int  # units of a row that a thread block takes in one step
    warps: int
    gluon: bool  # the body with explicit layouts


AHEAD = {"int8": 2, "exact": 1}  # steps whose weights a thread loads ahead; fp16 entries leave fewer registers
IDLE_LANES = 1.1  # work over useful work that a step size may cost in its last step


def pick(rows: int, units: int, gluon: bool, processors: int) -> Config:
    """A configuration for N = `rows` outputs and `units` units a row, on a GPU of so many multiprocessors.

    From sweeps inside the step of an 8B model (docs/measurements.md): 4 outputs share their activations, and two warps
    a thread block, a unit a lane, leave the weights of a whole row of K = 4096 in registers before the wait. Where N is
    too small to fill the GPU, more warps along K and fewer outputs do.
    """
    if rows >= 24 * processors:
        step = next((size for size in (64, 32) if integers.cdiv(units, size) * size <= IDLE_LANES * units), 32)
        return Config(4, step, step // 32, gluon)
    step = min(128, max(32, integers.next_power_of_2(units)))
    return Config(4 if rows >= 12 * processors else 2, step, step // 32, gluon)


# what the kernels ask for while they compile; Triton lets them see constants only
_DOT = tl.constexpr({(bits, mode): dot.describe(bits, mode) for bits, mode in dot.KINDS})


@triton.constexpr_function
def dot_of(bits, mode):
    """The Dot of dot.py."""
    return _DOT.value[bits, mode]


@triton.constexpr_function
def min_of(a, b):
    """The smaller one."""
    return min(a, b)


@triton.constexpr_function
def next_power_of_2(n):
    """The least power of two that is not below n."""
    return triton.next_power_of_2(n)


@triton.jit
def gemv_kernel(
    values,  # int32: fp16 or int8 activations [Kp], in words
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    mean_squares,  # float32 [Kp / B], or unused
    codes,  # int32 [N, Kp * BITS / 32]
    norms,  # float16 [N, Kp / B]
    table,  # int32
    bias,  # [N], or unused
    out,  # [N]
    N,
    eps,
    KP: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    dot: tl.constexpr = dot_of(BITS, MODE)
    per_row: tl.constexpr = KP // dot.codes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    wait_for_previous_kernel(PDL)
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    for first in tl.range(0, per_row, UNITS):
        u = first + tl.arange(0, UNITS)
        inside = u < per_row
        if PTX:
            sums = _dot_ptx(values, codes, table, safe_row, u, inside, KP, BITS, MODE)
        else:
            sums = _dot_plain(values, codes, table, safe_row, u, inside, KP, BITS, MODE)
        if MODE == "int8" and BITS >= 4:
            sums = sums + tl.load(half_sums + u, mask=inside, other=0.0)[None, :]
        block = u * dot.codes // B
        scale = tl.load(scales + block, mask=inside, other=0.0)[None, :]
        norm = tl.load(norms + safe_row[:, None] * (KP // B) + block[None, :], mask=inside[None, :], other=0.0)
        acc += sums * (norm.to(tl.float32) * scale)
    y = tl.sum(acc, 1)
    if MODE == "int8":
        y *= tl.load((table + dot.step_word).to(tl.pointer_type(tl.float32)))
    if NORMED:
        every = tl.arange(0, next_power_of_2(KP // B))
        y *= tl.rsqrt(tl.sum(tl.load(mean_squares + every, mask=every < KP // B, other=0.0), 0) + eps)
    if HAS_BIAS:
        y += tl.load(bias + safe_row).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def _dot_ptx(values, codes, table, row, u, inside, KP: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """Every unit against its activations: [ROWS, UNITS]."""
    dot: tl.constexpr = dot_of(BITS, MODE)
    width: tl.constexpr = dot.width
    second_words: tl.constexpr = dot.second
    table_words: tl.constexpr = dot.table_words
    tensors: tl.constexpr = dot.activations // dot.width
    text: tl.constexpr = dot.whole
    e = tl.arange(0, width)[None, None, :]
    ok = inside[None, :, None]
    base = codes + row[:, None, None] * (KP * BITS // 32)
    operands = (tl.load(base + u[None, :, None] * width + e, mask=ok, other=0),)
    for word in tl.static_range(second_words):
        second = base + (KP // dot.codes) * width + (u * second_words + word)[None, :, None] + 0 * e
        operands = operands + (tl.load(second, mask=ok, other=0),)
    for tensor in tl.static_range(tensors):
        words = u[None, :, None] * dot.activations + tensor * width + e
        operands = operands + (tl.load(values + words, mask=ok, other=0),)
    for word in tl.static_range(table_words):
        operands = operands + (tl.load(table + dot.table_start + word),)
    if table_words == 0:
        operands = operands + (table.to(tl.int64),)
    sums = tl.inline_asm_elementwise(text[0], text[1], operands, dtype=tl.float32, is_pure=True, pack=width)
    if width == 4:
        sums, _ = tl.split(tl.reshape(sums, [sums.shape[0], sums.shape[1], 2, 2]))
    sums, _ = tl.split(sums)
    return sums


@triton.jit
def _dot_plain(values, codes, table, row, u, inside, KP: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """The same without inline assembly."""
    size: tl.constexpr = dot_of(BITS, MODE).codes
    k = u[:, None] * size + tl.arange(0, size)[None, :]
    ok = inside[:, None] & (k >= 0)
    kind: tl.constexpr = tl.int8 if MODE == "int8" else tl.float16
    x = tl.load(values.to(tl.pointer_type(kind)) + k, mask=ok, other=0).to(tl.float32)
    w = load_entries(
        codes, table, row[:, None, None], k[None, :, :], ok[None, :, :], KP * BITS // 32, BITS, MODE == "int8"
    )
    return tl.sum(w * x[None, :, :], 2)


def gemv(
    activation: Activation,  # one row
    codes: torch.Tensor,  # int32 [N, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    bias: torch.Tensor | None,  # [N]
    out: torch.Tensor,  # [N], any floating dtype
    bits: int,
    block_size: int,
    mode: str,
    config: Config,
    launch: dict,  # PDL, and launch_pdl with it
    ptx: bool = True,
) -> None:
    """out = weight @ activation + bias."""
    if (ptx or config.gluon) and config.units < 32 * config.warps:
        raise ValueError(f"{config} gives a lane less than a unit, which inline assembly cannot take")
    rows = codes.shape[0]
    normed = activation.mean_squares is not None
    arguments = (activation.values.view(torch.int32), activation.scales, activation.half_sums)
    arguments += (activation.mean_squares if normed else out, codes, norms, table)
    arguments += (out if bias is None else bias, out, rows, activation.eps)
    shape = {"KP": norms.shape[-1] * block_size, "B": block_size, "BITS": bits, "MODE": mode}
    cut = {"ROWS": config.rows, "UNITS": config.units, "HAS_BIAS": bias is not None, "NORMED": normed}
    cut |= {"num_warps": config.warps}
    grid = (integers.cdiv(rows, config.rows),)
    if config.gluon:
        from hlwq_cuda.kernels.gemv_gluon import gemv_gluon_kernel

        gemv_gluon_kernel[grid](*arguments, **shape, **cut, AHEAD=AHEAD[mode], **launch)
    else:
        gemv_kernel[grid](*arguments, **shape, **cut, PTX=ptx, **launch)
