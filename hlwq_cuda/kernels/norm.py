"""Residual addition, RMSNorm and the next product's input in one kernel.

    hidden += delta;  out = activation(hidden * gain),  to be multiplied by 1 / sqrt(mean(hidden**2) + eps)

where `activation` is what the product behind the norm reads: rotated and scaled by blocks. One warp makes one block.
The factor belongs to the whole row, so it commutes with the rotation, the scaling and the product: every program leaves
the mean square of its block, and the product, which has the time, adds them up and multiplies its sums (gemv.py). No
program reads more than its block. Only a product by cuBLAS needs the finished row ("plain"): there every program reads
the whole row for the factor, and the new hidden state goes to a second buffer, since others still read the old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation

TILE = 1024  # elements of the row that a warp loads at once


@triton.jit
def norm_kernel(
    hidden,  # float32 [K]
    delta,  # [K], or unused
    gain,  # [K]
    new_hidden,  # float32 [K]
    values,  # [Kp], and the next two: see store_activation
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    mean_squares,  # float32 [Kp / B], or unused when plain
    eps,
    K: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    block = tl.program_id(0) + tl.arange(0, 1)
    offset = block[:, None] * B + tl.arange(0, B)[None, :]
    inside = offset < K
    block_gain = tl.load(gain + offset, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)

    part = tl.load(hidden + offset, mask=inside, other=0.0)
    if ADD:
        part += tl.load(delta + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(new_hidden + offset, part, mask=inside)
    if FORMAT == "plain":
        squares = tl.zeros((TILE,), tl.float32)
        for start in tl.static_range(0, K, TILE):
            column = start + tl.arange(0, TILE)
            x = tl.load(hidden + column, mask=column < K, other=0.0)
            if ADD:
                x += tl.load(delta + column, mask=column < K, other=0.0).to(tl.float32)
            squares += x * x
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    else:
        tl.store(mean_squares + block, tl.sum(part * part, 1) / K)
        factor = 1.0
    store_activation(part * block_gain, factor, block, values, scales, half_sums, K, B, FORMAT)


def norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    gain: torch.Tensor,
    eps: float,
    new_hidden: torch.Tensor,
    out: Activation,
    block_size: int,
    format: str,
    launch: dict,
) -> None:
    """hidden float32 [K] (+ delta [K]) -> new_hidden float32 [K] and the normalized row, formatted, in `out`.

    Without `delta` the hidden state is read only and `new_hidden` is left alone.
    """
    size = hidden.numel()
    norm_kernel[(integers.cdiv(size, block_size),)](
        hidden,
        hidden if delta is None else delta,
        gain,
        new_hidden,
        *out[:3],
        out.scales if out.mean_squares is None else out.mean_squares,
        eps,
        K=size,
        B=block_size,
        TILE=min(TILE, integers.next_power_of_2(size)),
        ADD=delta is not None,
        FORMAT=format,
        num_warps=1,
        **launch,
    )
