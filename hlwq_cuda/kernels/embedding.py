"""Rows of a weight by id, rotated back: the input embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels.device import allow_next_kernel, hadamard_sums, wait_for_previous_kernel
from hlwq_cuda.kernels.unpack import load_entries


@triton.jit
def embedding_kernel(
    ids,  # integer [M]
    codes,  # int32 [V, Kp * BITS / 32]
    norms,  # float16 [V, Kp / B]
    table,  # int32
    out,  # [M, K]
    K: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    blocks: tl.constexpr = (K + B - 1) // B
    block = tl.program_id(1) + tl.arange(0, 1)[:, None]
    k = block * B + tl.arange(0, B)[None, :]
    wait_for_previous_kernel(PDL)
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    entries = load_entries(codes, table, row, k, k >= 0, blocks * B * BITS // 32, BITS, False)
    norm = tl.load(norms + row * blocks + block).to(tl.float32)
    values = hadamard_sums(entries, B) * (norm / B)  # both factors 1 / sqrt(B): of the centroids and of the rotation
    tl.store(out + tl.program_id(0).to(tl.int64) * K + k, values.to(out.dtype.element_ty), mask=k < K)


def embedding(
    ids: torch.Tensor,  # integer [...]
    codes: torch.Tensor,  # int32 [V, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [V, Kp / B]
    table: torch.Tensor,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
    launch: dict,
) -> torch.Tensor:
    """[...] -> [..., K] of `dtype`."""
    out = norms.new_empty((*ids.shape, in_features), dtype=dtype)
    if ids.numel():
        grid = (ids.numel(), norms.shape[-1])
        shape = {"K": in_features, "B": block_size, "BITS": bits}
        embedding_kernel[grid](ids.contiguous(), codes, norms, table, out, **shape, num_warps=1, **launch)
    return out
