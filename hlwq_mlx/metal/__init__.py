"""Metal kernels of the MLX backend: emulated and race-checked on Linux; not yet run on Apple hardware.

Kernels are built on first use. Each function takes and returns MLX arrays and launches one kernel. Letters: M rows,
N outputs, K inputs, B block, b bits, Kp = K padded to whole blocks.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

import mlx.core as mx

from hlwq_mlx.metal.decoder import Decoder, decoder

__all__ = [
    "GEMV_MAX_ROWS",
    "Decoder",
    "decoder",
    "dequantize",
    "embedding",
    "gather_product",
    "gemv",
    "product",
    "rotate",
]

GEMV_MAX_ROWS = 8  # rows of x whose sums fit a lane's registers
_SIMD, _SIMDGROUPS, _ROWS = 32, 2, 4  # gemv.metal: lanes, simdgroups a threadgroup, outputs a simdgroup
_BLOCK_SIMDGROUPS = 4  # rotate.metal, embedding.metal: blocks a threadgroup


def rotate(x: mx.array, block_size: int) -> mx.array:
    """Every block of x times H_B: half, bfloat or float [M, K] -> [M, Kp] of the same dtype."""
    rows, columns = x.shape
    blocks = -(-columns // block_size)
    (out,) = _kernel("rotate", ("x",), "out")(
        inputs=[x],
        template=[("T", x.dtype), ("BLOCK", block_size)],
        grid=_block_grid(rows * blocks),
        threadgroup=(_SIMD * _BLOCK_SIMDGROUPS, 1, 1),
        output_shapes=[(rows, blocks * block_size)],
        output_dtypes=[x.dtype],
    )
    return out


def product(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder) -> mx.array:
    """x W^T: [..., K] of M <= GEMV_MAX_ROWS rows, uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N]."""
    y = _gemv(rotate(x.reshape(-1, x.shape[-1]), decoder.block_size), codes, norms, decoder, experts=None)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def gather_product(x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: Decoder) -> mx.array:
    """Row i is x[i * X // P] W[experts[i]]^T: x [X, K], codes [E, N, ...], integer [P] -> [P, N]; X divides P."""
    return _gemv(rotate(x, decoder.block_size), codes, norms, decoder, experts)


def gemv(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder) -> mx.array:
    """`product` of rows that are rotated already, [M, Kp] -> [M, N]: what `tune` times."""
    return _gemv(x, codes, norms, decoder, experts=None)


def _gemv(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder, experts: mx.array | None) -> mx.array:
    outputs = codes.shape[-2]
    rows = x.shape[0] if experts is None else experts.size
    inputs = {"x": x, "codes": codes, "norms": norms, **_lookup(decoder)}
    if experts is not None:
        inputs["experts"] = experts.astype(mx.uint32)
    (y,) = _kernel("gemv", tuple(inputs), "y", decoder, "HLWQ_GATHER" if "experts" in inputs else "")(
        inputs=list(inputs.values()),
        template=[("T", x.dtype), ("M", rows if experts is None else 1)],
        grid=(_SIMD, _SIMDGROUPS * -(-outputs // (_SIMDGROUPS * _ROWS)), 1 if experts is None else rows),
        threadgroup=(_SIMD, _SIMDGROUPS, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return y


def dequantize(codes: mx.array, norms: mx.array, dtype: mx.Dtype, decoder: Decoder) -> mx.array:
    """The weight in the rotated basis: uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> `dtype` [N, Kp]."""
    outputs, blocks = norms.shape
    columns = blocks * decoder.block_size
    chunk = 16 if decoder.bits == 8 else 32  # HLWQ_CHUNK of decode.h
    inputs = {"codes": codes, "norms": norms, **_lookup(decoder)}
    (out,) = _kernel("dequantize", tuple(inputs), "out", decoder)(
        inputs=list(inputs.values()),
        template=[("T", dtype)],
        grid=(-(-outputs * columns // chunk // 256) * 256, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(outputs, columns)],
        output_dtypes=[dtype],
    )
    return out


def embedding(
    ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, columns: int, dtype: mx.Dtype
) -> mx.array:
    """Rows of the weight: integer [M], codes and norms, c / sqrt(B) float32 [2**b] -> `dtype` [M, columns]."""
    blocks, bits = norms.shape[1], table.size.bit_length() - 1
    block_size = codes.shape[1] * 32 // bits // blocks
    (out,) = _kernel("embedding", ("ids", "codes", "norms", "table"), "out")(
        inputs=[ids.astype(mx.uint32), codes, norms, table],
        template=[("T", dtype), ("BLOCK", block_size), ("BITS", bits), ("K", columns)],
        grid=_block_grid(ids.size * blocks),
        threadgroup=(_SIMD * _BLOCK_SIMDGROUPS, 1, 1),
        output_shapes=[(ids.size, columns)],
        output_dtypes=[dtype],
    )
    return out


def _block_grid(blocks: int) -> tuple[int, int, int]:
    """Threads for one simdgroup a block, in whole threadgroups: the kernels return beyond the last block."""
    threadgroups = -(-blocks // _BLOCK_SIMDGROUPS)
    return (threadgroups * _BLOCK_SIMDGROUPS * _SIMD, 1, 1)


@cache
def _kernel(stem: str, inputs: tuple[str, ...], output: str, decoder: Decoder | None = None, define: str = ""):
    """The kernel of <stem>.metal, for one decoder where it reads codes. MLX compiles it when it is first evaluated."""
    header, name = "", f"hlwq_{stem}"
    if decoder:
        header = decoder.defines + (f"#define {define} 1\n" if define else "") + _text("decode.h")
        name += f"_{decoder.bits}bit_{decoder.way.value}_{zlib.crc32(header.encode()):08x}"
    return mx.fast.metal_kernel(name, inputs, (output,), _text(f"{stem}.metal"), header)


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@cache
def _lookup(decoder: Decoder) -> dict[str, mx.array]:
    return {"lookup": mx.array(decoder.lookup, mx.uint32)} if decoder.lookup else {}
