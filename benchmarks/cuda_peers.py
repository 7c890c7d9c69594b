"""Other projects' 4-bit linear layers, each built from the same weight through its own public interface.

Every builder returns an Entry: what one call reads, and one callable per copy of the weights. A library that is not
installed raises ImportError, which the benchmark reports as "not installed"; nothing else is caught.

    pip install torchao bitsandbytes gemlite polarquant==0.6.0
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.cuda_timing import copies_for


class Entry(NamedTuple):
    """One implementation at one shape and one number of rows."""

    weight_bytes: int  # what one call must read of the weights
    calls: list[Callable[[], torch.Tensor]]  # each: -> [M, N], on its own copy of the weights
    tolerance: float  # largest relative error of the product against the unquantized weight's; else nothing is timed


UNIFORM_4_BIT_ERROR = 0.2  # 4-bit integer grids on normal weights give about 0.1
Builder = Callable[[torch.Tensor, torch.Tensor], Entry]  # weight bf16 [N, K], x bf16 [M, K]


def bf16_cublas(weight: torch.Tensor, x: torch.Tensor) -> Entry:
    """The unquantized layer: torch's linear in bfloat16."""
    weights = [weight.clone() for _ in range(copies_for(weight.nbytes))]
    return Entry(weight.nbytes, [lambda w=w: F.linear(x, w) for w in weights], 0.01)


def torchao_int4(weight: torch.Tensor, x: torch.Tensor) -> Entry:
    """torchao's tile-packed INT4 (tinygemm), groups of 128, bfloat16."""
    from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import Int4TilePackedTo4dTensor

    packed = Int4TilePackedTo4dTensor.from_hp(weight, [1, 128])
    size = packed.qdata.nbytes + packed.scale_and_zero.nbytes
    copies = [(packed.qdata.clone(), packed.scale_and_zero.clone()) for _ in range(copies_for(size))]
    matmul = torch.ops.aten._weight_int4pack_mm  # what the tensor's linear calls
    return Entry(size, [lambda q=q, s=s: matmul(x, q, 128, s) for q, s in copies], UNIFORM_4_BIT_ERROR)


def bitsandbytes_nf4(weight: torch.Tensor, x: torch.Tensor) -> Entry:
    """bitsandbytes NF4, blocks of 64, float32 block maxima, bfloat16."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    size = packed.nbytes + state.absmax.nbytes

    def clone() -> tuple:
        own = copy.copy(state)
        own.absmax = state.absmax.clone()
        return packed.clone(), own

    copies = [clone() for _ in range(copies_for(size))]
    return Entry(size, [lambda q=q, s=s: bitsandbytes.matmul_4bit(x, q.t(), s) for q, s in copies], UNIFORM_4_BIT_ERROR)


def gemlite_int4(weight: torch.Tensor, x: torch.Tensor) -> Entry:
    """gemlite A16W4, groups of 128, float16, with the configurations that it ships for the H100."""
    import gemlite

    gemlite.load_config(str(Path(gemlite.__file__).parent / "configs/h100.json"))
    n, k = weight.shape
    groups = weight.float().view(n, k // 128, 128)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).view(n, k)
    scales, zeros = scale.half().view(n, -1), (-low / scale).half().view(n, -1)
    half = gemlite.DType.FP16
    size = codes.nbytes // 2 + scales.nbytes + zeros.nbytes

    def build() -> torch.nn.Module:
        layer = gemlite.GemLiteLinear(
            4, group_size=128, in_features=k, out_features=n, input_dtype=half, output_dtype=half
        )
        layer.pack(codes, scales, zeros, None)
        return layer

    x = x.half()
    layers = [build() for _ in range(copies_for(size))]
    return Entry(size, [lambda layer=layer: layer(x) for layer in layers], UNIFORM_4_BIT_ERROR)


def reference_project(weight: torch.Tensor, x: torch.Tensor) -> Entry:
    """The kernels of PyPI polarquant 0.6.0 (4-bit packed, block 128), rotation of the activation not included."""
    from polarengine_vllm.kernels.polar_gemm import polar_matmul
    from polarengine_vllm.kernels.polar_gemv import pack_codes_int4

    from benchmarks.cuda_hlwq import encode, hadamard
    from convert.codebook import codebook

    n, k = weight.shape
    codes, norms = encode(weight, 4, 128)
    packed = pack_codes_int4(codes, 128)
    table = torch.tensor(codebook(4), device="cuda") / 128**0.5
    rotated = (x.float().view(len(x), -1, 128) @ hadamard(128, x.device)).view(len(x), k)
    size = packed.nbytes + norms.nbytes
    copies = [(packed.clone(), norms.clone()) for _ in range(copies_for(size))]

    def call(packed: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        return polar_matmul(
            codes, rotated, norms, table, n, k, k // 128, packed=True, packed_codes=packed, in_f_half=k // 2
        )

    return Entry(size, [lambda q=q, s=s: call(q, s) for q, s in copies], UNIFORM_4_BIT_ERROR)


PEERS: dict[str, Builder] = {
    "bf16 cuBLAS": bf16_cublas,
    "torchao INT4": torchao_int4,
    "bitsandbytes NF4": bitsandbytes_nf4,
    "gemlite A16W4": gemlite_int4,
    "polarquant 0.6.0": reference_project,
}
