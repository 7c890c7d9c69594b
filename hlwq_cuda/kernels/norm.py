"""Residual addition, RMSNorm and the next layer's input in one kernel.

    hidden += delta;  out = activation(hidden / sqrt(mean(hidden**2) + eps) * gain)

where `activation` is what the linear layers behind the norm read: rotated and scaled by blocks.
A warp makes one block of the output. Each program needs the mean square of the whole row, which all of them compute
again: 32 KB from L2 cost less than one more launch. The new hidden state goes to a second buffer, since
programs still read the old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation

WARPS = 1
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
    squares = tl.zeros((TILE,), tl.float32)
    for start in tl.static_range(0, K, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(hidden + column, mask=column < K, other=0.0)
        if ADD:
            x += tl.load(delta + column, mask=column < K, other=0.0).to(tl.float32)
        squares += x * x
    inverse_rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    store_activation(part * block_gain, inverse_rms, block, values, scales, half_sums, K, B, FORMAT)


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
    """hidden float32 [K] (+ delta [K]) -> new_hidden float32 [K] and the normalized, formatted row in `out`.

    Without `delta` the hidden state is read only and `new_hidden` is left alone.
    """
    size = hidden.numel()
    norm_kernel[(triton.cdiv(size, block_size),)](
        hidden,
        hidden if delta is None else delta,
        gain,
        new_hidden,
        *out,
        eps,
        K=size,
        B=block_size,
        TILE=min(TILE * WARPS, triton.next_power_of_2(size)),
        ADD=delta is not None,
        FORMAT=format,
        num_warps=WARPS,
        **launch,
    )
