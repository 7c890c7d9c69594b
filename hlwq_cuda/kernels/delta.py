"""One token through a gated DeltaNet layer (Yang et al. 2024, arXiv 2412.06464), in two kernels.

With S the state [DK, DV] of a value head, its key head's q and k of unit length, and v, all three after a causal
convolution over the last few tokens and SiLU:

    S <- exp(-exp(A) softplus(a + dt)) S;    S <- S + k (sigmoid(b) (v - k^T S))^T;    o = q^T S / sqrt(DK)

`delta`: grid (value heads, DV / TILE). Columns of S do not mix, so each program updates its own tile, which it holds in
registers: the state is read and written once. The tile is loaded before the wait, as no earlier kernel
of the step writes it.
`gated_norm`: RMSNorm of every head of o, times SiLU(z), formatted for the output projection.

The convolution's inputs of the last tokens lie in a ring, at position modulo its length: a program overwrites the
oldest one, which none reads in the same step, and takes the newest from the projection: no order among programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation

TILE = 32  # columns of the state: 128 programs for 32 heads of 128


@dataclass(frozen=True)
class Shape:
    """Heads and widths of a layer. All widths are powers of two."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int  # of the convolution

    @property
    def channels(self) -> int:
        """q, k and v of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@triton.jit
def _convolved(row, ring, weight, channel, newest, C: tl.constexpr, TAPS: tl.constexpr):
    """SiLU of the convolution at `channel` [W]; `newest` is the ring's slot of this token."""
    x = tl.load(row + channel).to(tl.float32)
    total = x * tl.load(weight + channel * TAPS + TAPS - 1).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        slot = (newest + TAPS - back) % TAPS
        tap = tl.load(weight + channel * TAPS + TAPS - 1 - back).to(tl.float32)
        total += tap * tl.load(ring + slot * C + channel)
    return x, total / (1.0 + tl.exp(-total))


@triton.jit
def delta_kernel(
    row,  # [C + HV * DV + 2 HV]: q, k, v of the convolution, z, b, a
    weight,  # [C, TAPS], of the convolution
    log_decay,  # [HV], A
    time_bias,  # [HV], dt
    position,  # int64 [1]
    ring,  # float32 [TAPS, C]
    state,  # float32 [HV, DK, DV]
    out,  # float32 [HV * DV]
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    C: tl.constexpr = 2 * HK * DK + HV * DV
    head = tl.program_id(0)
    key_head = head // (HV // HK)
    k_index = tl.arange(0, DK)
    v_index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tile = state + head * DK * DV + k_index[:, None] * DV + v_index[None, :]
    s = tl.load(tile)
    rate = tl.exp(tl.load(log_decay + head).to(tl.float32))
    bias = tl.load(time_bias + head).to(tl.float32)
    newest = (tl.load(position) % TAPS).to(tl.int32)
    wait_for_previous_kernel(PDL)

    q_channel = key_head * DK + k_index
    k_channel = HK * DK + q_channel
    v_channel = 2 * HK * DK + head * DV + v_index
    q_new, q = _convolved(row, ring, weight, q_channel, newest, C, TAPS)
    k_new, k = _convolved(row, ring, weight, k_channel, newest, C, TAPS)
    v_new, v = _convolved(row, ring, weight, v_channel, newest, C, TAPS)
    slot = ring + newest * C
    if (head % (HV // HK) == 0) & (tl.program_id(1) == 0):
        tl.store(slot + q_channel, q_new)
        tl.store(slot + k_channel, k_new)
    tl.store(slot + v_channel, v_new)

    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * DK**-0.5
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    b = tl.load(row + C + HV * DV + head).to(tl.float32)
    a = tl.load(row + C + HV * DV + HV + head).to(tl.float32) + bias
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    s *= tl.exp(-rate * softplus)
    change = (v - tl.sum(s * k[:, None], 0)) / (1.0 + tl.exp(-b))
    s += k[:, None] * change[None, :]
    tl.store(tile, s)
    tl.store(out + head * DV + v_index, tl.sum(s * q[:, None], 0))


@triton.jit
def gated_norm_kernel(
    x,  # float32 [HV * DV]
    gate,  # [HV * DV], z
    gain,  # [DV]
    values,  # [Kp], and the next two: see store_activation
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    eps,
    K: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a program: whole heads and whole blocks
    B: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    d = tl.arange(0, DV)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH // DV)[:, None] * DV + d[None, :]
    weight = tl.load(gain + d).to(tl.float32)
    wait_for_previous_kernel(PDL)
    values_in = tl.load(x + column, mask=column < K, other=0.0)
    z = tl.load(gate + column, mask=column < K, other=0.0).to(tl.float32)
    normed = values_in * tl.rsqrt(tl.sum(values_in * values_in, 1) / DV + eps)[:, None] * weight[None, :]
    gated = normed * z / (1.0 + tl.exp(-z))
    block = tl.program_id(0) * (WIDTH // B) + tl.arange(0, WIDTH // B)
    store_activation(tl.reshape(gated, [WIDTH // B, B]), 1.0, block, values, scales, half_sums, K, B, FORMAT)


def delta(
    row: torch.Tensor,
    weight: torch.Tensor,
    log_decay: torch.Tensor,
    time_bias: torch.Tensor,
    position: torch.Tensor,
    ring: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    shape: Shape,
    launch: dict,
) -> None:
    """row: q, k, v, z, b, a of the token at `position` -> out, float32 [value_heads * value_dim]; updates the state.

    weight [channels, taps]; log_decay, time_bias [value_heads]; position int64 [1]; ring float32 [taps, channels];
    state float32 [value_heads, key_dim, value_dim].
    """
    tile = min(TILE, shape.value_dim)
    delta_kernel[(shape.value_heads, shape.value_dim // tile)](
        row,
        weight,
        log_decay,
        time_bias,
        position,
        ring,
        state,
        out,
        HK=shape.key_heads,
        HV=shape.value_heads,
        DK=shape.key_dim,
        DV=shape.value_dim,
        TAPS=shape.taps,
        TILE=tile,
        num_warps=4,
        **launch,
    )


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    out: Activation,
    block_size: int,
    format: str,
    launch: dict,
) -> None:
    """RMSNorm of every head of x [heads * DV] by `gain` [DV], times SiLU(gate): the formatted row in `out`.

    DV and the block size are powers of two.
    """
    width = max(block_size, gain.numel())
    gated_norm_kernel[(integers.cdiv(x.numel(), width),)](
        x,
        gate,
        gain,
        *out[:3],
        eps,
        K=x.numel(),
        DV=gain.numel(),
        WIDTH=width,
        B=block_size,
        FORMAT=format,
        num_warps=1,
        **launch,
    )
