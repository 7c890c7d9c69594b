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
    "fuses",
    "gather_product",
    "gemv",
    "heads",
    "normed_product",
    "product",
    "rotate",
]

GEMV_MAX_ROWS = 8  # rows of x whose sums fit a lane's registers
_SIMD, _SIMDGROUPS, _ROWS = 32, 2, 4  # gemv.metal: lanes, simdgroups a threadgroup, outputs a simdgroup
_BLOCK_SIMDGROUPS = 4  # rotate.metal, embedding.metal, heads.metal: blocks or heads a threadgroup
_NORM_SIMDGROUPS = 16  # normed_rotate.metal, which takes 32 at most


def rotate(x: mx.array, block_size: int) -> mx.array:
    """Every block of x times H_B: half, bfloat or float [M, K] -> [M, Kp] of the same dtype."""
    rows, columns = x.shape
    blocks = -(-columns // block_size)
    (out,) = _kernel("rotate", ("x",), ("out",))(
        inputs=[x],
        template=[("T", x.dtype), ("BLOCK", block_size)],
        grid=_block_grid(rows * blocks),
        threadgroup=(_SIMD * _BLOCK_SIMDGROUPS, 1, 1),
        output_shapes=[(rows, blocks * block_size)],
        output_dtypes=[x.dtype],
    )
    return out


def product(
    x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder, residual: mx.array | None = None
) -> mx.array:
    """x W^T: [..., K] of M <= GEMV_MAX_ROWS rows, uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N].

    With `residual` [..., N]: x W^T + residual.
    """
    y = _gemv(rotate(x.reshape(-1, x.shape[-1]), decoder.block_size), codes, norms, decoder, residual=residual)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def fuses(_decoder: Decoder, dtype: mx.Dtype) -> bool:
    """Whether one row may have a norm before its product and a residual after it."""
    return dtype != mx.float32


def normed_product(
    x: mx.array,  # [..., K], one row
    scale: mx.array,  # [K], of the dtype of x
    eps: float,
    codes: mx.array,
    norms: mx.array,
    decoder: Decoder,
    add: mx.array | None = None,  # as x
    swiglu: bool = False,
) -> list[mx.array]:
    """[rms_norm(x + add) * scale W^T, x + add where there is `add`], of one row: two kernels.

    swiglu: W holds N / 2 gates and then as many others: silu(gate) * other, [..., N / 2].
    """
    blocks = -(-x.shape[-1] // decoder.block_size)
    inputs, shapes = {"x": x, "scale": scale}, {"out": (1, blocks * decoder.block_size)}
    defines = (f"HLWQ_EPS ({eps:.9e}f)",)
    if add is not None:
        inputs["add"], shapes["sum_out"] = add, x.shape
        defines += ("HLWQ_ADD",)
    threads = _SIMD * min(_NORM_SIMDGROUPS, blocks)
    rotated, *total = _kernel("normed_rotate", tuple(inputs), tuple(shapes), None, defines)(
        inputs=list(inputs.values()),
        template=[("T", x.dtype), ("BLOCK", decoder.block_size)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=list(shapes.values()),
        output_dtypes=[x.dtype] * len(shapes),
    )
    return [_gemv(rotated, codes, norms, decoder, swiglu=swiglu).reshape(*x.shape[:-1], -1), *total]


def heads(
    y: mx.array,  # [1, 1, (H + 2 HK) * D], products of q, k and v of one token
    position: mx.array,  # int32, its place in the text
    inv_freq: mx.array,  # float32 [dims / 2], dims % 64 == 0: of the rotary embedding
    counts: tuple[int, int],  # H, HK
    scales: tuple[mx.array, mx.array] | None = None,  # [D] of the norms of q and k, of the dtype of y
    eps: float = 0.0,
) -> list[mx.array]:
    """q [1, H, 1, D] and k, v [1, HK, 1, D]: split, q and k normed where there are scales and rotated."""
    (queries, keys), head_dim = counts, y.size // (counts[0] + 2 * counts[1])
    inputs, defines = {"y": y, "position": position, "inv_freq": inv_freq}, ()
    if scales:
        inputs |= {"q_scale": scales[0], "k_scale": scales[1]}
        defines = (f"HLWQ_EPS ({eps:.9e}f)", "HLWQ_NORMS")
    sizes = {"H": queries, "HK": keys, "D": head_dim, "DIMS": 2 * inv_freq.size}
    return _kernel("heads", tuple(inputs), ("q", "k", "v"), None, defines)(
        inputs=list(inputs.values()),
        template=[("T", y.dtype), *sizes.items()],
        grid=_block_grid(queries + 2 * keys),
        threadgroup=(_SIMD * _BLOCK_SIMDGROUPS, 1, 1),
        output_shapes=[(1, count, 1, head_dim) for count in (queries, keys, keys)],
        output_dtypes=[y.dtype] * 3,
    )


def gather_product(x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: Decoder) -> mx.array:
    """Row i is x[i * X // P] W[experts[i]]^T: x [X, K], codes [E, N, ...], integer [P] -> [P, N]; X divides P."""
    return _gemv(rotate(x, decoder.block_size), codes, norms, decoder, experts)


def gemv(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder) -> mx.array:
    """`product` of rows that are rotated already, [M, Kp] -> [M, N]: what `tune` times."""
    return _gemv(x, codes, norms, decoder)


def _gemv(
    x: mx.array,
    codes: mx.array,
    norms: mx.array,
    decoder: Decoder,
    experts: mx.array | None = None,
    residual: mx.array | None = None,
    swiglu: bool = False,
) -> mx.array:
    outputs = codes.shape[-2] // (2 if swiglu else 1)
    rows = x.shape[0] if experts is None else experts.size
    inputs, defines = {"x": x, "codes": codes, "norms": norms, **_lookup(decoder)}, ()
    if experts is not None:
        inputs["experts"], defines = experts.astype(mx.uint32), ("HLWQ_GATHER",)
    if residual is not None:
        inputs["residual"], defines = residual, ("HLWQ_RESIDUAL",)
    if swiglu:
        defines = ("HLWQ_SWIGLU",)
    simdgroups = -(-codes.shape[-2] // _ROWS)
    (y,) = _kernel("gemv", tuple(inputs), ("y",), decoder, defines)(
        inputs=list(inputs.values()),
        template=[("T", x.dtype), ("M", rows if experts is None else 1)],
        grid=(_SIMD, -(-simdgroups // _SIMDGROUPS) * _SIMDGROUPS, 1 if experts is None else rows),
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
    (out,) = _kernel("dequantize", tuple(inputs), ("out",), decoder)(
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
    (out,) = _kernel("embedding", ("ids", "codes", "norms", "table"), ("out",))(
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
def _kernel(
    stem: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    decoder: Decoder | None = None,
    defines: tuple[str, ...] = (),
):
    """The kernel of <stem>.metal, for one decoder where it reads codes. MLX compiles it when it is first evaluated."""
    header = "".join(f"#define {define}\n" for define in defines)
    header = decoder.defines + header + _text("decode.h") if decoder else header + _text("transform.h")
    way = f"_{decoder.bits}bit_{decoder.way.value}" if decoder else ""
    name = f"hlwq_{stem}{way}_{zlib.crc32(header.encode()):08x}"
    return mx.fast.metal_kernel(name, inputs, outputs, _text(f"{stem}.metal"), header)


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@cache
def _lookup(decoder: Decoder) -> dict[str, mx.array]:
    return {"lookup": mx.array(decoder.lookup, mx.uint32)} if decoder.lookup else {}
