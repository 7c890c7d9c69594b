"""Attention of one new token over a static cache, in two kernels.

`attention`: grid (kv heads, splits). RMSNorm of q and k (if the family has it), rotary embedding, cache write, and one
split of the cached tokens for all query heads of a group by online softmax (Milakov and Gimelshein 2018), split over
the keys as in Flash-Decoding (Dao et al. 2023). The query heads of a group fill part of a tensor-core tile of 16 rows.
`combine`: grid (heads * head_dim / B). Merges the splits and writes the row as the output projection reads it.

The first tile of keys and values is loaded before the wait: no earlier kernel of the step writes it.
The new token never goes through the cache in its own step, so splits need no order among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation

TILE, TILE_ELEMENTS = 128, 128 * 128  # keys that a program loads at a time: a whole split of a cache of 1024 tokens
_FAR_BELOW = tl.constexpr(-1e30)  # stands for -infinity: differences of two stay finite


@triton.jit
def attention_kernel(
    qkv,  # [(HEADS + 2 KV_HEADS) * D]
    q_gain,  # [D], or unused
    k_gain,  # [D], or unused
    cos,  # float32 [T, D]
    sin,  # float32 [T, D]
    keys,  # [KV_HEADS, T, D]
    values,  # [KV_HEADS, T, D]
    position,  # int64 [1]: the new token's index, the number of cached tokens
    partial,  # float32 [HEADS, SPLITS, D]
    partial_max,  # float32 [HEADS, SPLITS], base 2
    partial_sum,  # float32 [HEADS, SPLITS]
    eps,
    softmax_scale,  # times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    D_POW2: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    QK_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    queries: tl.constexpr = HEADS // KV_HEADS

    d = tl.arange(0, D_POW2)
    partner = (d + D // 2) % D  # the other half of the rotary pair
    in_head = d < D
    new = tl.minimum(tl.load(position), T - 1).to(tl.int32)  # beyond the cache: its last slot, never foreign memory
    cosine = tl.load(cos + new * D + d, mask=in_head, other=0.0)
    sine = tl.load(sin + new * D + d, mask=in_head, other=0.0) * tl.where(d < D // 2, -1.0, 1.0)
    if QK_NORM:
        q_cosine = cosine * tl.load(q_gain + d, mask=in_head, other=0.0).to(tl.float32)
        q_sine = sine * tl.load(q_gain + partner, mask=in_head, other=0.0).to(tl.float32)
        k_cosine = cosine * tl.load(k_gain + d, mask=in_head, other=0.0).to(tl.float32)
        k_sine = sine * tl.load(k_gain + partner, mask=in_head, other=0.0).to(tl.float32)

    per_split = (new + SPLITS - 1) // SPLITS
    start = split * per_split
    end = tl.minimum(start + per_split, new)
    head_base = kv_head.to(tl.int64) * T * D
    t = start + tl.arange(0, TILE)
    cached = (t < end)[:, None] & in_head[None, :]
    k_tile = tl.load(keys + head_base + t[:, None] * D + d[None, :], mask=cached, other=0.0)
    v_tile = tl.load(values + head_base + t[:, None] * D + d[None, :], mask=cached, other=0.0)
    wait_for_previous_kernel(PDL)

    group = tl.arange(0, GROUP)
    head = kv_head * queries + group
    in_group = (group < queries)[:, None] & in_head[None, :]
    q = tl.load(qkv + head[:, None] * D + d[None, :], mask=in_group, other=0.0).to(tl.float32)
    q_partner = tl.load(qkv + head[:, None] * D + partner[None, :], mask=in_group, other=0.0).to(tl.float32)
    # every split loads the new key and value, though one uses them: one trip to memory instead of two
    k = tl.load(qkv + (HEADS + kv_head) * D + d, mask=in_head, other=0.0).to(tl.float32)
    k_partner = tl.load(qkv + (HEADS + kv_head) * D + partner, mask=in_head, other=0.0).to(tl.float32)
    v = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * D + d, mask=in_head, other=0.0)
    if QK_NORM:
        inverse_rms = tl.rsqrt(tl.sum(q * q, 1) / D + eps)[:, None]
        q = inverse_rms * (q * q_cosine[None, :] + q_partner * q_sine[None, :])
    else:
        q = q * cosine[None, :] + q_partner * sine[None, :]
    q *= softmax_scale

    running_max = tl.full((GROUP,), _FAR_BELOW, tl.float32)
    running_sum = tl.zeros((GROUP,), tl.float32)
    out = tl.zeros((GROUP, D_POW2), tl.float32)
    if split == 0:  # the new token itself
        if QK_NORM:
            k = tl.rsqrt(tl.sum(k * k, 0) / D + eps) * (k * k_cosine + k_partner * k_sine)
        else:
            k = k * cosine + k_partner * sine
        new_k = k.to(keys.dtype.element_ty)
        new_v = v.to(values.dtype.element_ty)
        tl.store(keys + head_base + new * D + d, new_k, mask=in_head)
        tl.store(values + head_base + new * D + d, new_v, mask=in_head)
        running_max = tl.sum(q * new_k.to(tl.float32)[None, :], 1)
        running_sum += 1.0
        out += new_v.to(tl.float32)[None, :]

    q = q.to(keys.dtype.element_ty)
    first = start
    while first < end:
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        scores = tl.where((first + tl.arange(0, TILE) < end)[None, :], scores, _FAR_BELOW)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        correction = tl.exp2(running_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        running_sum = running_sum * correction + tl.sum(weights, 1)
        out = out * correction[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        running_max = new_max
        first += TILE
        t = first + tl.arange(0, TILE)
        cached = (t < end)[:, None] & in_head[None, :]
        k_tile = tl.load(keys + head_base + t[:, None] * D + d[None, :], mask=cached, other=0.0)
        v_tile = tl.load(values + head_base + t[:, None] * D + d[None, :], mask=cached, other=0.0)

    slot = head * SPLITS + split
    tl.store(partial + slot[:, None] * D + d[None, :], out, mask=in_group)
    tl.store(partial_max + slot, running_max, mask=group < queries)
    tl.store(partial_sum + slot, running_sum, mask=group < queries)


@triton.jit
def combine_kernel(
    partial,  # float32 [HEADS, SPLITS, D]
    partial_max,  # float32 [HEADS, SPLITS]
    partial_sum,  # float32 [HEADS, SPLITS]
    values,  # [Kp], and the next two: see store_activation
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    K: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    B: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    block = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(0) * B + tl.arange(0, B)
    split = tl.arange(0, SPLITS)
    if D % B == 0:  # one head a block: its statistics are one column
        statistic = (tl.program_id(0) * B // D) * SPLITS + split[:, None]
        inside = split[:, None] >= 0
    else:
        statistic = (column // D)[None, :] * SPLITS + split[:, None]
        inside = (column < K)[None, :] & (split[:, None] >= 0)
    source = ((column // D)[None, :] * SPLITS + split[:, None]) * D + (column % D)[None, :]
    wait_for_previous_kernel(PDL)

    peak = tl.load(partial_max + statistic, mask=inside, other=0.0)
    total = tl.load(partial_sum + statistic, mask=inside, other=1.0)
    weight = tl.exp2(peak - tl.max(peak, 0)[None, :])
    outputs = tl.load(partial + source, mask=(column < K)[None, :] & (split[:, None] >= 0), other=0.0)
    row = tl.sum(outputs * weight, 0)[None, :] / tl.sum(total * weight, 0)[None, :]
    store_activation(row, 1.0, block, values, scales, half_sums, K, B, FORMAT)


@dataclass
class Partials:
    """What `attention` leaves for `combine`: unnormalized outputs, maxima (base 2) and sums of every split."""

    out: torch.Tensor  # float32 [heads, splits, D]
    maximum: torch.Tensor  # float32 [heads, splits]
    total: torch.Tensor  # float32 [heads, splits]

    @classmethod
    def empty(cls, heads: int, splits: int, head_dim: int, device: torch.device) -> Partials:
        def make(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(make(heads, splits, head_dim), make(heads, splits), make(heads, splits))


def split_count(kv_heads: int, length: int, multiprocessors: int) -> int:
    """Splits of a cache of `length` tokens, a power of two: one program a multiprocessor, but 64 tokens or more each.

    With 512 tokens on an H200, 8 splits give a step 2 % faster than 16: `combine` has less to read.
    """
    fill = max(1, round(multiprocessors / kv_heads))
    return 2 ** int(math.log2(max(1, min(64, fill, length // 64))))


def attention(
    qkv: torch.Tensor,
    gains: tuple[torch.Tensor, torch.Tensor] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    partials: Partials,
    eps: float,
    scale: float,
    launch: dict,
) -> None:
    """qkv [(heads + 2 kv_heads) * D] of the token at `position` (int64 [1]); writes its key and value to the cache.

    gains: q and k norm weights [D] or None; rotary: cos and sin, float32 [T, D]; keys, values: [kv_heads, T, D].
    """
    heads, splits, head_dim = partials.out.shape
    kv_heads, length, _ = keys.shape
    q_gain, k_gain = gains or (qkv, qkv)
    attention_kernel[(kv_heads, splits)](
        qkv,
        q_gain,
        k_gain,
        *rotary,
        keys,
        values,
        position,
        partials.out,
        partials.maximum,
        partials.total,
        eps,
        scale * math.log2(math.e),
        HEADS=heads,
        KV_HEADS=kv_heads,
        T=length,
        D=head_dim,
        D_POW2=integers.next_power_of_2(head_dim),
        GROUP=max(16, integers.next_power_of_2(heads // kv_heads)),
        SPLITS=splits,
        TILE=max(16, min(TILE, TILE_ELEMENTS // integers.next_power_of_2(head_dim))),
        QK_NORM=gains is not None,
        num_warps=8,
        **launch,
    )


def combine(partials: Partials, out: Activation, block_size: int, format: str, launch: dict) -> None:
    """The splits merged to one row [heads * D], formatted for the output projection."""
    heads, splits, head_dim = partials.out.shape
    combine_kernel[(integers.cdiv(heads * head_dim, block_size),)](
        partials.out,
        partials.maximum,
        partials.total,
        *out[:3],
        K=heads * head_dim,
        D=head_dim,
        SPLITS=splits,
        B=block_size,
        FORMAT=format,
        num_warps=max(1, splits // 16),
        **launch,
    )
