"""What lies between the products of a prompt: many rows at once, in the model's dtype, not yet rotated.

Each kernel reads its input once and writes its output once; in a decode step the same work ends in the rotation that
the next product wants (norm.py, activation.py, attention.py), which for many rows belongs to the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers

_TOGETHER = 8  # rows of one head in a program


@triton.jit
def add_norm_kernel(
    hidden,  # float32 [M, K]
    delta,  # [M, K], or unused
    gain,  # [K]
    out,  # [M, K]
    eps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, WIDTH)
    inside = column < K
    x = tl.load(hidden + row + column, mask=inside, other=0.0)
    if ADD:
        x += tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(hidden + row + column, x, mask=inside)
    normal = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    gained = normal * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, gained.to(out.dtype.element_ty), mask=inside)


def add_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """hidden float32 [M, K] += delta [M, K], in place; returns its RMSNorm times gain [K], [M, K] of `dtype`."""
    rows, size = hidden.shape
    out = hidden.new_empty((rows, size), dtype=dtype)
    width = integers.next_power_of_2(size)
    warps = max(1, min(8, width // 512))
    added = hidden if delta is None else delta
    add_norm_kernel[(rows,)](hidden, added, gain, out, eps, K=size, WIDTH=width, ADD=delta is not None, num_warps=warps)
    return out


@triton.jit
def silu_mul_rows_kernel(
    gate_up,  # [M, 2 K]
    out,  # [M, K]
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < K
    gate = tl.load(gate_up + row * (2 * K) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * K) + K + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """Rows of gate, then up, [M, 2 K] -> SiLU(gate) * up, [M, K] of the same dtype."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    width = min(1024, integers.next_power_of_2(size))
    silu_mul_rows_kernel[(rows, integers.cdiv(size, width))](gate_up, out, K=size, WIDTH=width, num_warps=4)
    return out


@triton.jit(do_not_specialize=["first", "M"])
def split_heads_kernel(
    qkv,  # [M, (HEADS + 2 KV_HEADS) * D]
    q_gain,  # [D], or unused
    k_gain,  # [D], or unused
    cos,  # float32 [T, D]
    sin,  # float32 [T, D]
    queries,  # [HEADS, M, D]
    keys,  # [KV_HEADS, T, D]
    values,  # [KV_HEADS, T, D]
    first,
    M,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    D_POW2: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_POW2)
    partner = (d + D // 2) % D  # the other half of the rotary pair
    inside = (row < M)[:, None] & (d < D)[None, :]
    source = qkv + (row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D) + head * D)[:, None]
    x = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
    position = (first + row).to(tl.int64)
    if head >= HEADS + KV_HEADS:
        cached = values + (head - HEADS - KV_HEADS).to(tl.int64) * (T * D) + position[:, None] * D + d[None, :]
        tl.store(cached, x.to(values.dtype.element_ty), mask=inside)
    else:
        other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if QK_NORM:
            gain = q_gain if head < HEADS else k_gain
            inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            x *= inverse_rms * tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            other *= inverse_rms * tl.load(gain + partner, mask=d < D, other=0.0).to(tl.float32)[None, :]
        angle = position[:, None] * D + d[None, :]
        cosine = tl.load(cos + angle, mask=inside, other=0.0)
        sine = tl.load(sin + angle, mask=inside, other=0.0) * tl.where(d < D // 2, -1.0, 1.0)[None, :]
        turned = x * cosine + other * sine
        if head < HEADS:
            query = queries + head.to(tl.int64) * M * D + row.to(tl.int64)[:, None] * D + d[None, :]
            tl.store(query, turned.to(queries.dtype.element_ty), mask=inside)
        else:
            cached = keys + (head - HEADS).to(tl.int64) * (T * D) + position[:, None] * D + d[None, :]
            tl.store(cached, turned.to(keys.dtype.element_ty), mask=inside)


def split_heads(
    qkv: torch.Tensor,
    gains: tuple[torch.Tensor, torch.Tensor] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    eps: float,
) -> torch.Tensor:
    """Queries [heads, M, D] of the tokens at `first` .. `first` + M - 1, whose keys and values go to the cache.

    qkv [M, (heads + 2 kv_heads) * D]; gains: q and k norm weights [D] or None; rotary: cos and sin, float32 [T, D];
    keys, values: [kv_heads, T, D].
    """
    (kv_heads, length, head_dim), rows = keys.shape, len(qkv)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    queries = keys.new_empty((heads, rows, head_dim))
    q_gain, k_gain = gains or (qkv, qkv)
    split_heads_kernel[(integers.cdiv(rows, _TOGETHER), heads + 2 * kv_heads)](
        qkv,
        q_gain,
        k_gain,
        *rotary,
        queries,
        keys,
        values,
        first,
        rows,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        T=length,
        D=head_dim,
        D_POW2=integers.next_power_of_2(head_dim),
        QK_NORM=gains is not None,
        ROWS=_TOGETHER,
        num_warps=2,
    )
    return queries
