"""What gated attention with a partial rotary embedding adds around the attention kernel: two small kernels.

`arrange` takes q out of the rows where every head's q is followed by its gate, and puts the elements of each head of q
and k in another order. Scores do not depend on that order, and in this one the pairs of a rotary embedding over the
first R elements, i and i + R/2, stand half a head apart, as the attention kernel expects; the others get angle zero.
`gate` multiplies attention's output by sigmoid(gate) and formats the row for the output projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation


def rotary_order(head_dim: int, rotary_dim: int) -> list[int]:
    """order[i] is the element of a head that goes to place i."""
    half, pairs = head_dim // 2, rotary_dim // 2
    passed = list(range(rotary_dim, head_dim))
    return [*range(pairs), *passed[: half - pairs], *range(pairs, rotary_dim), *passed[half - pairs :]]


@triton.jit
def arrange_kernel(
    row,  # [(2 HEADS + 2 KV_HEADS) * D]: q and gate of every head, then k, then v
    order,  # int32 [D]
    out,  # float32 [(HEADS + 2 KV_HEADS) * D]
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    head = tl.program_id(0)
    d = tl.arange(0, D_POW2)
    place = tl.load(order + d, mask=d < D, other=0)
    wait_for_previous_kernel(PDL)
    source = tl.where(head < HEADS, 2 * head, HEADS + head) * D
    element = tl.where(head < HEADS + KV_HEADS, place, d)
    x = tl.load(row + source + element, mask=d < D, other=0.0)
    tl.store(out + head * D + d, x.to(tl.float32), mask=d < D)


@triton.jit
def gate_kernel(
    x,  # float32 [K]
    row,  # as above
    values,  # [Kp], and the next two: see store_activation
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    K: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    block = tl.program_id(0) + tl.arange(0, 1)
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    inside = column < K
    wait_for_previous_kernel(PDL)
    gate = tl.load(row + (2 * (column // D) + 1) * D + column % D, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(x + column, mask=inside, other=0.0) / (1.0 + tl.exp(-gate))
    store_activation(gated, 1.0, block, values, scales, half_sums, K, B, FORMAT)


def arrange(row: torch.Tensor, order: torch.Tensor, out: torch.Tensor, heads: int, launch: dict) -> None:
    """row: q with gate, k, v -> out: q, k, v in the layout of the attention kernel; order: int32 [D]."""
    head_dim = order.numel()
    kv_heads = (row.numel() // head_dim - 2 * heads) // 2
    arrange_kernel[(heads + 2 * kv_heads,)](
        row,
        order,
        out,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        D_POW2=integers.next_power_of_2(head_dim),
        num_warps=1,
        **launch,
    )


def gate(
    x: torch.Tensor, row: torch.Tensor, head_dim: int, out: Activation, block_size: int, format: str, launch: dict
) -> None:
    """x [heads * D] times sigmoid of the gates in `row`: the formatted row in `out`."""
    gate_kernel[(integers.cdiv(x.numel(), block_size),)](
        x, row, *out[:3], K=x.numel(), D=head_dim, B=block_size, FORMAT=format, num_warps=1, **launch
    )
