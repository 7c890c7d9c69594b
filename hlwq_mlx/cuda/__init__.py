"""CUDA kernels of the MLX backend, the twins of hlwq_mlx/metal: the same functions for MLX on an NVIDIA GPU.

The kernels are function templates in *.cuh. What MLX gets is one #include and one call: it hashes the source text of a
kernel at every launch, which took 1.4 us a launch when the text held the kernel itself.
"""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

__all__ = ["GEMV_MAX_ROWS", "Decoder", "decoder", "dequantize", "embedding", "gather_product", "product", "rotate"]

GEMV_MAX_ROWS = 8
_BLOCK_WARPS = 4  # rotate.cuh, embedding.cuh: blocks a thread block
_COLUMNS, _MAX_WARPS = 256, 16  # gemv_mma.cuh: of a warp at a time, warps a thread block
_PLAIN_SHARED = 48000  # bytes of shared memory that a kernel of MLX has without asking
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
        {"T": x.dtype, "BLOCK": block_size},
        grid=_block_grid(rows, blocks),
        threads=32 * _BLOCK_WARPS,
        outputs={"out": (rows, blocks * block_size)},
        arguments=("x", "x_shape[1]", "out"),
    )[0]


def product(
    x: mx.array, codes: mx.array, norms: mx.array, decoder: Decoder, residual: mx.array | None = None
) -> mx.array:
    """x W^T: [..., K] of M <= GEMV_MAX_ROWS rows, uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N].

    With `residual` [..., N], of one row and where `fuses`: x W^T + residual.
    """
    rows = x.size // x.shape[-1]
    shape = (*x.shape[:-1], codes.shape[0])
    if fuses(decoder, x.dtype):
        return _gemv_mma(x, codes, norms, decoder, rows, shape, residual=residual)[0]
    return _gemv(x, codes, norms, decoder, rows, shape)


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
    """[rms_norm(x + add) * scale W^T, x + add where there is `add`], of one row and where `fuses`.

    swiglu: W holds N / 2 gates and then as many others: silu(gate) * other, [..., N / 2].
    """
    shape = (*x.shape[:-1], codes.shape[0] // (2 if swiglu else 1))
    return _gemv_mma(x, codes, norms, decoder, 1, shape, add=add, scale=scale, eps=eps, swiglu=swiglu)


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
    arrays = {"y": y, "inv_freq": inv_freq, "position": position}
    if scales:
        arrays |= {"q_scale": scales[0], "k_scale": scales[1]}
    names = ("q_scale", "k_scale") if scales else ("nullptr", "nullptr")
    arguments = ("y", *names, f"{eps:.9e}f", "inv_freq", "position", queries, keys, "q", "k", "v")
    shapes = {"q": (1, queries, 1, head_dim), "k": (1, keys, 1, head_dim), "v": (1, keys, 1, head_dim)}
    sizes = {"T": y.dtype, "D": head_dim, "DIMS": 2 * inv_freq.size}
    grid = (-(-(queries + 2 * keys) // _BLOCK_WARPS) * _BLOCK_WARPS * 32, 1, 1)
    return _launch("heads", arrays, sizes, grid, 32 * _BLOCK_WARPS, shapes, arguments)


def gather_product(x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: Decoder) -> mx.array:
    """Row i is x[i * X // P] W[experts[i]]^T: x [X, K], codes [E, N, ...], integer [P] -> [P, N]; X divides P."""
    shape, experts = (experts.size, codes.shape[1]), experts.astype(mx.uint32)
    if fuses(decoder, x.dtype):
        return _gemv_mma(x, codes, norms, decoder, 1, shape, experts=experts)[0]
    return _gemv(x, codes, norms, decoder, 1, shape, experts)


def fuses(decoder: Decoder, dtype: mx.Dtype) -> bool:
    """Whether gemv_mma.cuh multiplies: then one row may have a norm before it and a residual after it."""
    return decoder.bits == 4 and dtype != mx.float32


def _gemv(
    x: mx.array,
    codes: mx.array,
    norms: mx.array,
    decoder: Decoder,
    rows: int,  # that share a matrix
    shape: tuple[int, ...],  # of the result
    experts: mx.array | None = None,
) -> mx.array:
    x = rotate(x.reshape(-1, x.shape[-1]), decoder.block_size)
    chunks = x.shape[-1] // (16 if decoder.bits == 8 else 32)
    threads = min(_MAX_THREADS, -(-chunks // 32) * 32)
    arrays = {"x": x, "codes": codes, "norms": norms, "table": decoder.table}
    pointer, pairs_a_row, pairs = _experts(arrays, x, experts)
    matrix = ("codes", "norms", "table", pointer, pairs_a_row, f"codes_shape[{codes.ndim - 2}]", "x_shape[1]")
    sizes = {"T": x.dtype, "BITS": decoder.bits, "BLOCK": decoder.block_size, "M": rows, "OUTPUTS": _OUTPUTS}
    grid = (threads * -(-codes.shape[-2] // _OUTPUTS), 1, pairs)
    return _launch("gemv", arrays, sizes, grid, threads, {"out": shape}, ("x", *matrix, "out"))[0]


def _gemv_mma(
    x: mx.array,
    codes: mx.array,
    norms: mx.array,
    decoder: Decoder,
    rows: int,
    shape: tuple[int, ...],
    experts: mx.array | None = None,
    add: mx.array | None = None,
    scale: mx.array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: mx.array | None = None,
) -> list[mx.array]:
    if rows > 1:
        x = rotate(x.reshape(-1, x.shape[-1]), decoder.block_size)
    columns, block_size = x.shape[-1], decoder.block_size
    warps = _warps(columns, _MAX_WARPS // 2 if block_size == 32 else _MAX_WARPS)  # of 32: up to 145 registers
    steps = -(-columns // (_COLUMNS * warps))
    arrays = {"x": x, "codes": codes, "norms": norms, "table": decoder.table}
    optional = {"add": add, "scale": scale, "residual": residual}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    pointer, pairs_a_row, pairs = _experts(arrays, x, experts)
    results = {"out": shape} if add is None else {"out": shape, "sum_out": x.shape}
    add_, scale_, residual_, sum_ = (
        name if name in (arrays | results) else "nullptr" for name in ("add", "scale", "residual", "sum_out")
    )
    # sizes that are not in the text of a kernel serve every matrix with one: MLX compiles each for seconds
    k = f"norms_shape[{codes.ndim - 1}] * {block_size}" if columns % block_size == 0 else columns
    matrix = ("codes", "norms", "table", pointer, pairs_a_row, f"codes_shape[{codes.ndim - 2}]", k)
    exact = int(columns % (_COLUMNS * warps) == 0)
    sizes = {"T": x.dtype, "BLOCK": block_size, "M": rows, "EXACT": exact, "SWIGLU": int(swiglu)}
    blocks = min(-(-shape[-1] // 16), max(_multiprocessors() // pairs, 1))
    arguments = ("x", add_, scale_, f"{eps:.9e}f", *matrix, residual_, "out", sum_)
    rotated = 2 * steps * warps * _COLUMNS if rows == 1 else 0
    parts = 4 * 2 * (2 if swiglu else 1) * _MAX_WARPS * 16 * rows
    shared = 4 * (256 * 32 + _MAX_WARPS) + parts + rotated
    grid = (32 * warps * blocks, 1, pairs)
    return _launch("gemv_mma", arrays, sizes, grid, 32 * warps, results, arguments, max(shared, _PLAIN_SHARED))


def _experts(arrays: dict[str, mx.array], x: mx.array, experts: mx.array | None) -> tuple[str, int, int]:
    """The pointer to `experts`, which joins `arrays`; how many neighbors share a row of x; how many there are."""
    if experts is None:
        return "nullptr", 1, 1
    arrays["experts"] = experts
    return "experts", experts.size // (x.size // x.shape[-1]), experts.size


def _warps(columns: int, most: int) -> int:
    """Of a thread block of gemv_mma.cuh: the largest number that shares the columns evenly, if one does."""
    chunks = -(-columns // _COLUMNS)
    even = [warps for warps in range(most // 2, most + 1) if chunks % warps == 0]
    return even[-1] if even else min(most, chunks)


@cache
def _multiprocessors() -> int:
    """Of the GPU: as many thread blocks run at once. MLX does not tell."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(count), 16, 0)
    if failed:
        raise RuntimeError(f"cuDeviceGetAttribute says {failed} when asked for the number of multiprocessors")
    return count.value


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
        outputs={"out": (outputs, columns)},
        arguments=("codes", "norms", "table", units, "out"),
    )[0]


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
        outputs={"out": (ids.size, columns)},
        arguments=("ids", "codes", "norms", "table", "out"),
    )[0]


def _block_grid(rows: int, blocks: int) -> tuple[int, int, int]:
    """Threads for one warp a block, in whole thread blocks for every row."""
    return (rows * _BLOCK_WARPS * 32, -(-blocks // _BLOCK_WARPS), 1)


def _launch(
    stem: str,
    arrays: dict[str, mx.array],
    sizes: dict[str, mx.Dtype | int],
    grid: tuple[int, int, int],
    threads: int,
    outputs: dict[str, tuple[int, ...]],
    arguments: tuple[str | int, ...],
    shared: int = 0,  # bytes of shared memory beside what the kernel declares
) -> list[mx.array]:
    """hlwq_<stem><sizes>(arguments) on `grid` threads in blocks of `threads`; `outputs`: shapes, dtype sizes["T"]."""
    call = f"hlwq_{stem}<{', '.join(sizes)}>({', '.join(map(str, arguments))});"
    return _kernel(stem, tuple(arrays), tuple(outputs), call, shared)(
        inputs=list(arrays.values()),
        template=list(sizes.items()),
        grid=grid,
        threadgroup=(threads, 1, 1),
        output_shapes=list(outputs.values()),
        output_dtypes=[sizes["T"]] * len(outputs),
    )


@cache
def _kernel(stem: str, inputs: tuple[str, ...], outputs: tuple[str, ...], call: str, shared: int):
    """A kernel whose body is `call`. MLX compiles it when it is first evaluated, and keeps the result by its text.

    `shared` belongs to the name: MLX asks for it when a text first runs, and never again.
    """
    folder = Path(__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.cuh")))
    name = f"hlwq_{stem}_{zlib.crc32(text + call.encode()):08x}_{shared}"
    header = f'#include "{(folder / stem).as_posix()}.cuh"\n'
    return mx.fast.cuda_kernel(name, inputs, outputs, call, header, shared_memory=shared)
