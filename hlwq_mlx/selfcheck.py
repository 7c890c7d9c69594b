"""Every kernel on this machine's GPU against plain MLX operations on its CPU: `python -m hlwq_mlx selfcheck`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np

from hlwq_mlx import kernels, ops
from hlwq_mlx.checkpoint import SUPPORTED_BITS, ModuleSpec, codebook

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
TIMED_SHAPE = (4096, 4096)  # N, K
TIMED_MATRICES = 32  # different weights in turn, more than any cache holds


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    error: float  # the largest, over the bound that it must keep
    gigabytes_per_second: float | None  # of codes and norms, where the kernel was timed

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= 1


def selfcheck() -> Iterator[Result]:
    """Check every kernel in every dtype, with tails of N and K; time the products of one row.

    Raises RuntimeError where this MLX has no GPU, or with the compiler's message where a kernel does not compile.
    """
    gpu = kernels.backend()
    if gpu is None:
        raise RuntimeError("this MLX has no Metal or CUDA GPU, so there are no kernels to check")
    for dtype in DTYPES:
        for block_size in (128, 64, 32):
            yield _check_rotate(gpu, block_size, dtype)
        yield _check_heads(gpu, dtype)
    for bits in SUPPORTED_BITS:
        for way in _ways(gpu, bits):
            for dtype in DTYPES:
                yield _check_products(gpu, bits, way, dtype)
                if gpu.fuses(_decoder(gpu, bits, 64, way), dtype):
                    yield _check_fused(gpu, bits, way, dtype)
            yield _time_product(gpu, bits, way)
        yield _check_embedding(gpu, bits)


def _ways(gpu: ModuleType, bits: int) -> tuple:
    """What `decoder` takes besides the codebook and the block size: a way on Metal, nothing on CUDA."""
    if not gpu.__name__.endswith(".metal"):
        return (None,)
    from hlwq_mlx.metal.decoder import ways

    return ways(codebook(bits))


def _decoder(gpu: ModuleType, bits: int, block_size: int, way):
    return gpu.decoder(codebook(bits), block_size, *(() if way is None else (way,)))


def random_codes(*shape: int) -> mx.array:
    """Random words, uint32 of `shape`: 16 bits at a time, as MLX makes integers of floats and the low bits of larger
    ones would always be 0.
    """
    return mx.random.randint(0, 2**16, (*shape[:-1], 2 * shape[-1]), mx.uint16).view(mx.uint32)


def _packed(spec: ModuleSpec, *rows: int) -> tuple[mx.array, mx.array]:
    codes = random_codes(*rows, spec.words)
    return codes, mx.random.uniform(0.5, 1.5, (*rows, spec.blocks)).astype(mx.float16)


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _rotated_weight(codes: mx.array, norms: mx.array, decoder, spec: ModuleSpec) -> np.ndarray:
    """What the kernels' decoder makes of the codes, by plain operations on the CPU."""
    with mx.stream(mx.cpu):
        table = mx.array(decoder.values, mx.float32)
        return _float64(ops.decode_rotated(codes, norms, table, spec))


def _rotated(x: mx.array, spec: ModuleSpec) -> np.ndarray:
    with mx.stream(mx.cpu):
        return _float64(ops.rotate(x, spec))


def _check_rotate(gpu: ModuleType, block_size: int, dtype: mx.Dtype) -> Result:
    x = mx.random.normal((5, 3 * block_size - 7)).astype(dtype)
    expected = _rotated(x, ModuleSpec(4, block_size, x.shape[-1]))
    bound = ROUNDING[dtype] * np.abs(expected) + 1e-5  # float32 sums of at most 128 values of order one
    error = np.abs(_float64(gpu.rotate(x, block_size)) - expected) / bound
    return Result(f"rotate {dtype_name(dtype)} block {block_size}", float(error.max()), None)


def _check_products(gpu: ModuleType, bits: int, way, dtype: mx.Dtype) -> Result:
    spec = ModuleSpec(bits, 64, 9 * 64)  # K: not a multiple of what a simdgroup takes at a time; N = 37: nor of 8
    decoder = _decoder(gpu, bits, spec.block_size, way)
    codes, norms = _packed(spec, 3, 37)
    weight = _rotated_weight(codes, norms, decoder, spec)
    # the rotated x is rounded to its dtype, a centroid to half (bfloat16 for such x on CUDA)
    product = 2 * ROUNDING[dtype] + 2.0**-19
    worst = 0.0

    def compare(y: mx.array, rotated: np.ndarray, matrix: np.ndarray) -> None:
        nonlocal worst
        exact = rotated @ matrix.T
        bound = product * (np.abs(rotated) @ np.abs(matrix).T) + ROUNDING[dtype] * np.abs(exact)
        worst = max(worst, float((np.abs(_float64(y) - exact) / bound).max()))

    for rows in (1, 2, 5, 8):
        x = mx.random.normal((rows, spec.in_features)).astype(dtype)
        compare(gpu.product(x, codes[0], norms[0], decoder), _rotated(x, spec), weight[0])
    experts, x = [2, 0, 1, 1], mx.random.normal((2, spec.in_features)).astype(dtype)
    y = gpu.gather_product(x, codes, norms, mx.array(experts), decoder)
    for i, expert in enumerate(experts):
        compare(y[i : i + 1], _rotated(x[i // 2 : i // 2 + 1], spec), weight[expert])
    compare(gpu.dequantize(codes[0], norms[0], dtype, decoder).T, np.eye(spec.in_features), weight[0])
    return Result(f"products {bits} bits {_way_name(way)}{dtype_name(dtype)}", worst, None)


def _check_fused(gpu: ModuleType, bits: int, way, dtype: mx.Dtype) -> Result:
    """What the products of fused layers take along: a residual; a sum and its norm; SwiGLU."""
    spec, eps = ModuleSpec(bits, 64, 9 * 64), 1e-5
    decoder = _decoder(gpu, bits, spec.block_size, way)
    codes, norms = _packed(spec, 42)
    weight = _rotated_weight(codes, norms, decoder, spec)
    x, add, residual = (mx.random.normal((1, size)).astype(dtype) for size in (9 * 64, 9 * 64, 42))
    scale = mx.random.uniform(0.5, 1.5, (9 * 64,)).astype(dtype)

    def exact(x: mx.array) -> tuple[np.ndarray, np.ndarray]:
        rotated = _rotated(x, spec)
        return rotated @ weight.T, (2 * ROUNDING[dtype] + 2.0**-19) * (np.abs(rotated) @ np.abs(weight).T)

    def error(y: mx.array, expected: np.ndarray, bound: np.ndarray) -> float:
        return float((np.abs(_float64(y) - expected) / (bound + ROUNDING[dtype] * np.abs(expected))).max())

    product, bound = exact(x)
    y = gpu.product(x, codes, norms, decoder, residual)
    errors = [error(y, product + _float64(residual), bound)]
    with mx.stream(mx.cpu):
        summed = x + add
        normed = mx.fast.rms_norm(summed.astype(mx.float32), scale.astype(mx.float32), eps)
    product, bound = exact(normed)
    y, total = gpu.normed_product(x, scale, eps, codes, norms, decoder, add=add)
    errors += [error(y, product, bound), error(total, _float64(summed), np.array(1e-6))]
    (gate, other), (of_gate, of_other) = np.split(product, 2, axis=-1), np.split(bound, 2, axis=-1)
    (y,) = gpu.normed_product(summed, scale, eps, codes, norms, decoder, swiglu=True)
    # the slope of silu is at most 1.1
    bound = 1.1 * of_gate * (np.abs(other) + of_other) + np.abs(gate) * of_other
    errors.append(error(y, gate / (1 + np.exp(-gate)) * other, bound))
    return Result(f"fused {bits} bits {_way_name(way)}{dtype_name(dtype)}", float(np.max(errors)), None)


def _check_heads(gpu: ModuleType, dtype: mx.Dtype) -> Result:
    position, dims, eps = mx.array(1234, mx.int32), 64, 1e-5
    y = mx.random.normal((1, 1, 7 * 96)).astype(dtype)  # three heads of q, two of k and v
    scales = [mx.random.uniform(0.5, 1.5, (96,)).astype(dtype) for _ in range(2)]
    inv_freq = 10000.0 ** (-mx.arange(dims // 2) / (dims // 2))
    found = gpu.heads(y, position, inv_freq, (3, 2), (scales[0], scales[1]), eps)
    errors = []
    with mx.stream(mx.cpu):
        parts = mx.split(y.astype(mx.float32).reshape(1, 7, 1, 96), (3, 5), axis=1)
        for i, scale in enumerate(scales):
            normed = mx.fast.rms_norm(parts[i], scale.astype(mx.float32), eps)
            rope = {"traditional": False, "base": None, "scale": 1.0, "offset": position, "freqs": 1 / inv_freq}
            parts[i] = mx.fast.rope(normed, dims, **rope)
        for got, part in zip(found, map(_float64, parts), strict=True):
            # an angle, of up to 1234, is rounded to float32 more than once, and its sine on Metal is the fast one
            bound = ROUNDING[dtype] * np.abs(part) + 8 * 1234 * 2.0**-24 * np.abs(part).max()
            errors.append((np.abs(_float64(got) - part) / bound).max())
    return Result(f"heads {dtype_name(dtype)}", float(np.max(errors)), None)


def _check_embedding(gpu: ModuleType, bits: int) -> Result:
    spec = ModuleSpec(bits, 64, 3 * 64 - 5)
    codes, norms = _packed(spec, 20)
    table, ids = ops.centroids(codebook(bits), spec), mx.array([19, 0, 7, 7])
    with mx.stream(mx.cpu):
        expected = _float64(ops.embedding(ids, codes, norms, table, spec, mx.float32))
    got = _float64(gpu.embedding(ids, codes, norms, table, spec.in_features, mx.float32))
    return Result(f"embedding {bits} bits", float(np.abs(got - expected).max() / (1e-5 * np.abs(expected).max())), None)


def _time_product(gpu: ModuleType, bits: int, way) -> Result:
    outputs, columns = TIMED_SHAPE
    spec, decoder = ModuleSpec(bits, 128, columns), _decoder(gpu, bits, 128, way)
    matrices = [_packed(spec, outputs) for _ in range(TIMED_MATRICES)]
    x = mx.random.normal((1, columns)).astype(mx.float16)
    mx.eval(matrices, x)
    seconds = _median_seconds(lambda: [gpu.product(x, *matrix, decoder) for matrix in matrices]) / TIMED_MATRICES
    return Result(f"speed {bits} bits {_way_name(way)}M = 1", 0.0, spec.bytes_per_row * outputs / seconds / 1e9)


def _median_seconds(step: Callable[[], list[mx.array]]) -> float:
    mx.eval(step())
    times = []
    for _ in range(7):
        start = time.perf_counter()
        mx.eval(step())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _way_name(way) -> str:
    return "" if way is None else f"{way.value} "


def dtype_name(dtype: mx.Dtype) -> str:
    """float16, without the module's name."""
    return str(dtype).rpartition(".")[2]
