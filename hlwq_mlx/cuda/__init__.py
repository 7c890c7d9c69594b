"""CUDA kernels of the MLX backend, the twins of hlwq_mlx/metal: the same functions for MLX on an NVIDIA GPU.

Centroids are exact in float16 (bfloat16 where x is): a symmetric 4-bit codebook is eight positive values, whose bytes
the instruction prmt looks up four at a time; other codebooks are staged in shared memory.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

GEMV_MAX_ROWS = 8
_OUTPUTS = 4  # outputs of a thread block: as many loads of 16 bytes in flight a thread
_MAX_THREADS = 128
_BLOCK_WARPS = 4  # rotate.cu, embedding.cu: blocks a thread block


@dataclass(frozen=True, eq=False)  # one object a codebook: compared and hashed by identity, at each call
class Decoder:
    """A codebook and block size; `values` are the centroids over sqrt(B)."""

    bits: int
    block_size: int
    values: tuple[float, ...]

    @property
    def in_bytes(self) -> bool:
        """Whether prmt decodes it: 16 values, symmetric."""
        return len(self.values) == 16 and all(a == -b for a, b in zip(self.values, reversed(self.values), strict=True))


@cache
def decoder(codebook: tuple[float, ...], block_size: int) -> Decoder:
    """The decoder of `codebook`."""
    bits = len(codebook).bit_length() - 1
    return Decoder(bits, block_size, tuple(value / block_size**0.5 for value in codebook))


def rotate(x: mx.array, block_size: int) -> mx.array:
    """Every block of x times H_B: half, bfloat16 or float [M, K] -> [M, Kp] of the same dtype."""
    rows, columns = x.shape
    blocks = -(-columns // block_size)
    (out,) = _transform_kernel("rotate", ("x",), "out")(
        inputs=[x],
        template=[("T", x.dtype), ("BLOCK", block_size), ("K", columns), ("ROWS", rows)],
        grid=_block_grid(rows * blocks),
        threadgroup=(32 * _BLOCK_WARPS, 1, 1),
        output_shapes=[(rows, blocks * block_size)],
        output_dtypes=[x.dtype],
    )
    return out


def gemv(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder) -> mx.array:
    """x W^T from rotated rows: [M, Kp], M <= GEMV_MAX_ROWS, uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [M, N]."""
    return _gemv(x, codes, norms, decoder, experts=None)


def gather_gemv(x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: Decoder) -> mx.array:
    """Row i is x[i * X // P] W[experts[i]]^T: x [X, Kp], codes [E, N, ...], integer [P] -> [P, N]; X divides P."""
    return _gemv(x, codes, norms, decoder, experts)


def _gemv(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder, experts: mx.array | None) -> mx.array:
    columns, outputs = x.shape[1], codes.shape[-2]
    rows = x.shape[0] if experts is None else experts.size
    chunk = 16 if decoder.bits == 8 else 32  # HLWQ_CHUNK of decode.cuh
    threads = min(_MAX_THREADS, -(-columns // chunk // 32) * 32)
    inputs = {"x": x, "codes": codes, "norms": norms, **_table(decoder)}
    if experts is not None:
        inputs["experts"] = experts.astype(mx.uint32)
    sizes = {"N": outputs, "KP": columns, "THREADS": threads, "OUTPUTS": _OUTPUTS, "XROWS": x.shape[0]}
    (y,) = _decode_kernel("gemv", tuple(inputs), "y", decoder, x.dtype)(
        inputs=list(inputs.values()),
        template=[("T", x.dtype), ("M", rows if experts is None else 1), *sizes.items()],
        grid=(threads * -(-outputs // _OUTPUTS), 1, 1 if experts is None else rows),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return y


def dequantize(codes: mx.array, norms: mx.array, dtype: mx.Dtype, decoder: Decoder) -> mx.array:
    """The weight in the rotated basis: uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> `dtype` [N, Kp]."""
    outputs, columns = norms.shape[0], norms.shape[1] * decoder.block_size
    codes_a_thread = {4: 8, 8: 16}.get(decoder.bits, 32)
    inputs = {"codes": codes, "norms": norms, **_table(decoder)}
    (out,) = _decode_kernel("dequantize", tuple(inputs), "out", decoder, dtype)(
        inputs=list(inputs.values()),
        template=[("T", dtype), ("N", outputs), ("KP", columns)],
        grid=(-(-outputs * columns // codes_a_thread // 256) * 256, 1, 1),
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
    sizes = {"BLOCK": codes.shape[1] * 32 // bits // blocks, "BITS": bits, "K": columns, "ROWS": ids.size}
    (out,) = _transform_kernel("embedding", ("ids", "codes", "norms", "table"), "out")(
        inputs=[ids.astype(mx.uint32), codes, norms, table],
        template=[("T", dtype), *sizes.items()],
        grid=_block_grid(ids.size * blocks),
        threadgroup=(32 * _BLOCK_WARPS, 1, 1),
        output_shapes=[(ids.size, columns)],
        output_dtypes=[dtype],
    )
    return out


def _block_grid(blocks: int) -> tuple[int, int, int]:
    return (-(-blocks // _BLOCK_WARPS) * _BLOCK_WARPS * 32, 1, 1)


@cache
def _transform_kernel(stem: str, inputs: tuple[str, ...], output: str):
    return _kernel(stem, inputs, output, _text("transform.cuh"))


@cache
def _decode_kernel(stem: str, inputs: tuple[str, ...], output: str, decoder: Decoder, dtype: mx.Dtype):
    header = _defines(decoder, dtype) + _text("decode.cuh")
    if stem == "gemv":
        header += ("#define HLWQ_GATHER 1\n" if "experts" in inputs else "") + _text("multiply.cuh")
    return _kernel(stem, inputs, output, header)


def _kernel(stem: str, inputs: tuple[str, ...], output: str, header: str):
    """The kernel of <stem>.cu behind `header`. MLX compiles it when it is first evaluated."""
    name = f"hlwq_{stem}_{zlib.crc32(header.encode()):08x}"
    return mx.fast.cuda_kernel(name, inputs, (output,), _text(f"{stem}.cu"), header)


def _defines(decoder: Decoder, dtype: mx.Dtype) -> str:
    lines = [f"HLWQ_BITS {decoder.bits}", f"HLWQ_BLOCK {decoder.block_size}"]
    if decoder.in_bytes:
        low, high = _bytes(decoder, dtype)
        lines += [f"HLWQ_LOW{i} {word:#x}u" for i, word in enumerate(low)]
        lines += [f"HLWQ_HIGH{i} {word:#x}u" for i, word in enumerate(high)]
        lines += [] if dtype == mx.bfloat16 else ["HLWQ_HALF 1"]
        # half x multiplies half centroids; float x takes the path that converts
        lines += ["HLWQ_HALF_PRODUCTS 1"] if dtype == mx.float16 else []
    return "".join(f"#define {line}\n" for line in lines)


def _bytes(decoder: Decoder, dtype: mx.Dtype) -> tuple[np.ndarray, np.ndarray]:
    """Low and high bytes of the positive centroids in float16 or bfloat16, two words each."""
    upper = mx.array(decoder.values[8:], mx.float32).astype(mx.bfloat16 if dtype == mx.bfloat16 else mx.float16)
    halves = np.array(upper.view(mx.uint16))
    return (halves & 255).astype(np.uint8).view(np.uint32), (halves >> 8).astype(np.uint8).view(np.uint32)


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@cache
def _table(decoder: Decoder) -> dict[str, mx.array]:
    return {} if decoder.in_bytes else {"table": mx.array(decoder.values, mx.float32)}
