"""CUDA kernels of the MLX backend, the twins of hlwq_mlx/metal: the same functions for MLX on an NVIDIA GPU.

The kernels are function templates in *.cuh. What MLX gets is one #include and one call: it hashes the source text of a
kernel at every launch, which took 1.4 us a launch when the text held the kernel itself.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

__all__ = ["GEMV_MAX_ROWS", "Decoder", "decoder", "dequantize", "embedding", "gather_product", "product", "rotate"]

GEMV_MAX_ROWS = 8
_BLOCK_WARPS = 4  # rotate.cuh, embedding.cuh: blocks a thread block
_COLUMNS = 512  # HLWQ_COLUMNS of gemv_mma.cuh
_MAX_WARPS = 8
_OUTPUTS, _MAX_THREADS = 4, 128  # gemv.cuh
_DEQUANTIZED = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 8}  # codes of a thread at a time: whole words and 16 bytes of half
_STEPS = 4


@dataclass(frozen=True, eq=False)  # one object a codebook: compared and hashed by identity, at each call
class Decoder:
    """A codebook and block size; `values` are the centroids over sqrt(B), float32 [2^b] in `table`."""

    bits: int
    block_size: int
    values: tuple[float, ...]
    table: mx.array


@cache
def decoder(codebook: tuple[float, ...], block_size: int) -> Decoder:
    """The decoder of `codebook`."""
    values = tuple(value / block_size**0.5 for value in codebook)
    return Decoder(len(codebook).bit_length() - 1, block_size, values, mx.array(values, mx.float32))


def rotate(x: mx.array, block_size: int) -> mx.array:
    """Every block of x times H_B: half, bfloat16 or float [M, K] -> [M, Kp] of the same dtype."""
    rows, columns = x.shape
    blocks = -(-columns // block_size)
    return _launch(
        "rotate",
        {"x": x},
        {"T": x.dtype, "BLOCK": block_size, "K": columns},
        grid=_block_grid(rows, blocks),
        threads=32 * _BLOCK_WARPS,
        shape=(rows, blocks * block_size),
    )


def product(x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder) -> mx.array:
    """x W^T: [..., K] of M <= GEMV_MAX_ROWS rows, uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N]."""
    rows = x.size // x.shape[-1]
    return _product(x, codes, norms, decoder, rows, (*x.shape[:-1], codes.shape[0]))


def gather_product(x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: Decoder) -> mx.array:
    """Row i is x[i * X // P] W[experts[i]]^T: x [X, K], codes [E, N, ...], integer [P] -> [P, N]; X divides P."""
    shape = (experts.size, codes.shape[1])
    return _product(x, codes, norms, decoder, 1, shape, experts.astype(mx.uint32))


def _product(
    x: mx.array,
    codes: mx.array,
    norms: mx.array,
    decoder: Decoder,
    rows: int,  # that share a matrix
    shape: tuple[int, ...],  # of the result
    experts: mx.array | None = None,
) -> mx.array:
    outputs = codes.shape[-2]
    tensor_cores = decoder.bits == 4 and x.dtype != mx.float32
    if rows > 1 or not tensor_cores:
        x = rotate(x.reshape(-1, x.shape[-1]), decoder.block_size)
    columns = x.shape[-1]
    sizes = {"T": x.dtype, "BLOCK": decoder.block_size, "M": rows, "N": outputs, "K": columns}
    if tensor_cores:
        warps, tiles = _shape(columns, rows)
        name, threads, width = "gemv_mma", 32 * warps, 16 * tiles
        sizes |= {"WARPS": warps, "TILES": tiles}
    else:
        chunks = columns // (16 if decoder.bits == 8 else 32)
        name, threads, width = "gemv", min(_MAX_THREADS, -(-chunks // 32) * 32), _OUTPUTS
        sizes = {"T": x.dtype, "BITS": decoder.bits, **sizes, "THREADS": threads, "OUTPUTS": width}
    arrays = {"x": x, "codes": codes, "norms": norms, "table": decoder.table}
    extra, pairs = ("nullptr", 1), 1
    if experts is not None:
        arrays["experts"], pairs = experts, experts.size
        extra = ("experts", pairs // (x.size // columns))
    grid = (threads * -(-outputs // width), 1, pairs)
    return _launch(name, arrays, sizes, grid, threads, shape, extra)


def _shape(columns: int, rows: int) -> tuple[int, int]:
    """Warps and tiles of a thread block of gemv_mma.cuh."""
    chunks = -(-columns // _COLUMNS)
    even = [warps for warps in range(_MAX_WARPS // 2, _MAX_WARPS + 1) if chunks % warps == 0]
    # two tiles are 8 to 21 % faster than one at every shape measured, more are slower (results/mlx_cuda_h100.json)
    return even[-1] if even else min(_MAX_WARPS, chunks), 2 if rows == 1 else 1


def dequantize(codes: mx.array, norms: mx.array, dtype: mx.Dtype, decoder: Decoder) -> mx.array:
    """The weight in the rotated basis: uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> `dtype` [N, Kp]."""
    outputs, columns = norms.shape[0], norms.shape[1] * decoder.block_size
    count = _DEQUANTIZED[decoder.bits]
    units = outputs * columns // count
    return _launch(
        "dequantize",
        {"codes": codes, "norms": norms, "table": decoder.table},
        {"T": dtype, "BITS": decoder.bits, "BLOCK": decoder.block_size, "CODES": count, "STEPS": _STEPS},
        grid=(-(-units // (256 * _STEPS)) * 256, 1, 1),
        threads=256,
        shape=(outputs, columns),
        extra=(units,),
    )


def embedding(
    ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, columns: int, dtype: mx.Dtype
) -> mx.array:
    """Rows of the weight: integer [M], codes and norms, c / sqrt(B) float32 [2**b] -> `dtype` [M, columns]."""
    blocks, bits = norms.shape[1], table.size.bit_length() - 1
    block_size = codes.shape[1] * 32 // bits // blocks
    return _launch(
        "embedding",
        {"ids": ids.astype(mx.uint32), "codes": codes, "norms": norms, "table": table},
        {"T": dtype, "BITS": bits, "BLOCK": block_size, "K": columns},
        grid=_block_grid(ids.size, blocks),
        threads=32 * _BLOCK_WARPS,
        shape=(ids.size, columns),
    )


def _block_grid(rows: int, blocks: int) -> tuple[int, int, int]:
    """Threads for one warp a block, in whole thread blocks for every row."""
    return (rows * _BLOCK_WARPS * 32, -(-blocks // _BLOCK_WARPS), 1)


def _launch(
    stem: str,
    arrays: dict[str, mx.array],
    sizes: dict[str, mx.Dtype | int],
    grid: tuple[int, int, int],
    threads: int,
    shape: tuple[int, ...],
    extra: tuple[str | int, ...] = (),
) -> mx.array:
    """hlwq_<stem><sizes>(arrays, extra, out) on `grid` threads in blocks of `threads`; out has the dtype sizes["T"]."""
    pointers = [name for name in arrays if name != "experts"]
    call = f"hlwq_{stem}<{', '.join(sizes)}>({', '.join([*pointers, *map(str, extra), 'out'])});"
    (out,) = _kernel(stem, tuple(arrays), call)(
        inputs=list(arrays.values()),
        template=list(sizes.items()),
        grid=grid,
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[sizes["T"]],
    )
    return out


@cache
def _kernel(stem: str, inputs: tuple[str, ...], call: str):
    """A kernel whose body is `call`. MLX compiles it when it is first evaluated, and keeps the result by its text."""
    folder = Path(__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.cuh")))
    name = f"hlwq_{stem}_{zlib.crc32(text + call.encode()):08x}"
    return mx.fast.cuda_kernel(name, inputs, ("out",), call, f'#include "{(folder / stem).as_posix()}.cuh"\n')
