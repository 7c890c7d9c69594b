"""SiLU(gate) x up, rotated (and quantized) for the down projection. One program, one warp, one block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, store_activation, wait_for_previous_kernel
from hlwq_cuda.kernels.plain import Activation


@triton.jit
def silu_mul_kernel(
    gate_up,  # [2 K]: gate, then up
    values,  # [Kp], and the next two: see store_activation
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    K: tl.constexpr,
    B: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    block = tl.program_id(0) + tl.arange(0, 1)
    offset = block[:, None] * B + tl.arange(0, B)[None, :]
    inside = offset < K
    wait_for_previous_kernel(PDL)

    gate = tl.load(gate_up + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + K + offset, mask=inside, other=0.0).to(tl.float32)
    store_activation(gate / (1.0 + tl.exp(-gate)) * up, 1.0, block, values, scales, half_sums, K, B, FORMAT)


def silu_mul(gate_up: torch.Tensor, out: Activation, block_size: int, format: str, launch: dict) -> None:
    """gate_up [2 K] -> the formatted row SiLU(gate) * up in `out`."""
    size = gate_up.numel() // 2
    silu_mul_kernel[(integers.cdiv(size, block_size),)](
        gate_up, *out[:3], K=size, B=block_size, FORMAT=format, num_warps=1, **launch
    )
