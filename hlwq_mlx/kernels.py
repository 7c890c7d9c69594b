"""The products of HLWQ by the kernels of this machine's GPU: Metal or CUDA behind the same four functions.

hlwq_mlx.ops has the same products in plain MLX operations, which are what these are compared with. Letters: N outputs,
K inputs, B block, b bits, Kp = K padded to whole blocks, M rows of x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from hlwq_mlx.checkpoint import ModuleSpec

# Weights that are decoded at a time for a product of many rows: 256 MB of half.
SCRATCH_WEIGHTS = 2**27

Codebook = tuple[float, ...]


@cache
def backend() -> ModuleType | None:
    """hlwq_mlx.metal or hlwq_mlx.cuda, whichever this MLX has a GPU for."""
    if mx.metal.is_available():
        from hlwq_mlx import metal

        return metal
    if mx.cuda.is_available():
        from hlwq_mlx import cuda

        return cuda
    return None


@cache
def work(codebook: Codebook, spec: ModuleSpec, dtype: mx.Dtype) -> bool:
    """Whether the kernels for such a layer compile and run here; a warning says so when they do not."""
    if backend() is None or dtype not in (mx.float16, mx.bfloat16, mx.float32):
        return False
    codes, norms = mx.zeros((8, spec.words), mx.uint32), mx.ones((8, spec.blocks), mx.float16)
    x = mx.ones((1, spec.in_features), dtype)
    try:
        mx.eval(_product(x, codes, norms, codebook, spec))
        mx.eval(backend().dequantize(codes, norms, dtype, _decoder(codebook, spec)))
    except RuntimeError as error:
        _warn_once(f"the HLWQ kernels do not run on this machine, plain MLX operations are used (slower): {error}")
        return False
    return True


@cache
def _warn_once(_message: str) -> None:
    warnings.warn(_message, RuntimeWarning, stacklevel=3)


@cache
def product(codebook: Codebook, spec: ModuleSpec, training: bool) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """The function y = x W^T: float [..., K], uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N], dtype of x.

    `training` gives it a gradient with respect to x, which a kernel has not: dx = (g W_rotated) rotated back.
    """
    parts = split_product(codebook, spec, (), training)
    return lambda x, codes, norms: parts(x, codes, norms)[0]


@cache
def split_product(
    codebook: Codebook, spec: ModuleSpec, edges: tuple[int, ...], training: bool
) -> Callable[[mx.array, mx.array, mx.array], list[mx.array]]:
    """`product`, its outputs cut at `edges`.

    Few rows go through mx.compile: it keeps what MLX would otherwise make anew at each call of a custom kernel, the
    source text among it, and a token has hundreds of calls. Many rows do not: every prompt length would be compiled.
    """

    def multiply(x: mx.array, codes: mx.array, norms: mx.array) -> mx.array:
        return _product(x, codes, norms, codebook, spec)

    def split(x: mx.array, codes: mx.array, norms: mx.array) -> list[mx.array]:
        y = multiply(x, codes, norms)
        return mx.split(y, edges, axis=-1) if edges else [y]

    if training:
        multiply = _with_gradient(multiply, codebook, spec)
        return split
    few, most = mx.compile(split), backend().GEMV_MAX_ROWS
    return lambda x, codes, norms: (few if prod(x.shape[:-1]) <= most else split)(x, codes, norms)


def _with_gradient(multiply: Callable, codebook: Codebook, spec: ModuleSpec) -> Callable:
    differentiable = mx.custom_function(multiply)

    @differentiable.vjp
    def gradient(primals, cotangent, _output):
        x, codes, norms = primals
        rotated = cotangent @ _dequantize(codes, norms, x, codebook, spec)
        dx = _rotate(rotated, spec)[..., : spec.in_features]
        return dx, mx.zeros_like(codes), mx.zeros_like(norms)

    return differentiable


def gather_linear(
    x: mx.array,  # float [..., M, K]; the leading axes broadcast with those of indices
    codes: mx.array,  # uint32 [experts, N, Kp * b / 32]
    norms: mx.array,  # float16 [experts, N, Kp / B]
    codebook: Codebook,
    spec: ModuleSpec,
    indices: mx.array,  # integer [...]: the expert of each matrix of x
    sorted_indices: bool = False,
) -> mx.array:
    """y = x W[index]^T, the product of mixture-of-experts layers: [..., M, N] in the dtype of x.

    Few single rows (a token being generated) go through the kernel that reads only the experts asked for; otherwise the
    whole stack is decoded and mx.gather_mm multiplies.
    """
    experts, outputs = codes.shape[:2]
    # one row for all experts of a token ([tokens, 1, 1, K] with [tokens, k]), or one an expert ([tokens, k, 1, K])
    if x.shape[-2] == 1 and indices.size < 2 * experts and _leads(x.shape[:-2], indices.shape):
        return _gather_few(codebook, spec)(x, codes, norms, indices)
    weight = _dequantize(codes.reshape(-1, codes.shape[-1]), norms.reshape(-1, norms.shape[-1]), x, codebook, spec)
    stack = mx.swapaxes(weight.reshape(experts, outputs, -1), -1, -2)
    return mx.gather_mm(_rotate(x, spec), stack, rhs_indices=indices, sorted_indices=sorted_indices)


@cache
def _gather_few(codebook: Codebook, spec: ModuleSpec) -> Callable[..., mx.array]:
    def multiply(x: mx.array, codes: mx.array, norms: mx.array, indices: mx.array) -> mx.array:
        rotated = backend().rotate(x.reshape(-1, x.shape[-1]), spec.block_size)
        y = backend().gather_gemv(rotated, codes, norms, indices.flatten(), _decoder(codebook, spec))
        return y.reshape(*indices.shape, 1, codes.shape[1])

    return mx.compile(multiply)


def embedding(
    ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, spec: ModuleSpec, dtype: mx.Dtype
) -> mx.array:
    """Rows of the weight: integer [...] -> `dtype` [..., K]. Only the rows asked for are decoded."""
    rows = backend().embedding(ids.flatten(), codes, norms, table, spec.in_features, dtype)
    return rows.reshape(*ids.shape, spec.in_features)


def _leads(x_axes: tuple[int, ...], index_axes: tuple[int, ...]) -> bool:
    """Whether each row of x serves a run of neighboring indices: equal axes first, then axes of 1."""
    if len(x_axes) != len(index_axes):
        return False
    shared = next((i for i, (a, b) in enumerate(zip(x_axes, index_axes, strict=True)) if a != b), len(x_axes))
    return all(size == 1 for size in x_axes[shared:])


def _rotate(x: mx.array, spec: ModuleSpec) -> mx.array:
    rotated = backend().rotate(x.reshape(-1, x.shape[-1]), spec.block_size)
    return rotated.reshape(*x.shape[:-1], -1)


def _product(x: mx.array, codes: mx.array, norms: mx.array, codebook: Codebook, spec: ModuleSpec) -> mx.array:
    rows = prod(x.shape[:-1])
    rotated = backend().rotate(x.reshape(rows, x.shape[-1]), spec.block_size)
    if rows <= backend().GEMV_MAX_ROWS:
        y = backend().gemv(rotated, codes, norms, _decoder(codebook, spec))
    else:
        step = max(SCRATCH_WEIGHTS // spec.padded_in_features, 1)
        starts = range(0, codes.shape[0], step)
        parts = [rotated @ _dequantize(codes[i : i + step], norms[i : i + step], x, codebook, spec).T for i in starts]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def _dequantize(codes: mx.array, norms: mx.array, x: mx.array, codebook: Codebook, spec: ModuleSpec) -> mx.array:
    return backend().dequantize(codes, norms, x.dtype, _decoder(codebook, spec))


@cache
def _decoder(codebook: Codebook, spec: ModuleSpec):
    if backend().__name__.endswith(".metal"):
        from hlwq_mlx.tune import preferred_way

        return backend().decoder(codebook, spec.block_size, preferred_way(codebook))
    return backend().decoder(codebook, spec.block_size)
