"""Residual addition, RMSNorm and the next layer's input in one kernel.

    hidden += delta;  out = activation(hidden / sqrt(mean(hidden**2) + eps) * gain)

where `activation` is what the linear layers behind the norm read: rotated and, if asked, quantized to int8 by blocks.
One program makes one block of the output. Each needs the mean square of the whole row, which all of them compute
again: 32 KB from L2 a program cost less than one more launch. The new hidden state goes to a second buffer, since
programs still read the old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation


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
    K_POW2: tl.constexpr,
    B: tl.constexpr,
    COPIES: tl.constexpr,
    ADD: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    block = tl.program_id(0)
    # every warp works on a copy of the block, so that the rotation stays inside a warp
    copy = tl.arange(0, COPIES)
    offset = block * B + tl.arange(0, B)[None, :] + 0 * copy[:, None]
    inside = offset < K
    block_gain = tl.load(gain + offset, mask=inside, other=0.0).to(tl.float32)
    row = tl.arange(0, K_POW2)
    in_row = row < K
    wait_for_previous_kernel(PDL)

    whole = tl.load(hidden + row, mask=in_row, other=0.0)
    part = tl.load(hidden + offset, mask=inside, other=0.0)
    if ADD:
        whole += tl.load(delta + row, mask=in_row, other=0.0).to(tl.float32)
        part += tl.load(delta + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(new_hidden + offset, part, mask=inside & (copy == 0)[:, None])
    inverse_rms = tl.rsqrt(tl.sum(whole * whole, 0) / K + eps)
    store_activation(
        part * inverse_rms * block_gain, block + 0 * copy, copy == 0, values, scales, half_sums, K, B, FORMAT
    )


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
    padded = triton.next_power_of_2(size)
    warps = min(8, max(1, padded // 512))
    norm_kernel[(triton.cdiv(size, block_size),)](
        hidden,
        hidden if delta is None else delta,
        gain,
        new_hidden,
        *out,
        eps,
        K=size,
        K_POW2=padded,
        B=block_size,
        COPIES=warps,
        ADD=delta is not None,
        FORMAT=format,
        num_warps=warps,
        **launch,
    )
