"""The products of HLWQ by the kernels of this machine's GPU: Metal or CUDA behind the same functions.

hlwq_mlx.ops has the same products in plain MLX operations, which are what these are compared with. Letters: N outputs,
K inputs, B block, b bits, Kp = K padded to whole blocks, M rows of x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
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
def kernels_for(codebook: Codebook, spec: ModuleSpec) -> Kernels:
    """The products of all layers with this codebook and spec: one object, found once a layer, not at each call."""
    return Kernels(codebook, spec)


class Kernels:
    """Products against packed weights of one codebook and spec.

    Products of few rows go through mx.compile: it keeps what MLX would otherwise make anew at each call of a custom
    kernel, and a token has hundreds of calls. Those of many rows do not: every prompt length would be compiled.
    """

    def __init__(self, codebook: Codebook, spec: ModuleSpec) -> None:
        self.codebook, self.spec = codebook, spec
        self._work: dict[mx.Dtype, bool] = {}
        self._few: dict[tuple[int, ...], Callable] = {}
        self._gather_few = mx.compile(self._gather)
        self._differentiable = mx.custom_function(self._multiply)
        self._differentiable.vjp(self._gradient)

    def work(self, dtype: mx.Dtype) -> bool:
        """Whether the kernels compile and run here for x of `dtype`; one warning says so when they do not."""
        if dtype not in self._work:
            self._work[dtype] = self._try(dtype)
        return self._work[dtype]

    def product(
        self,
        x: mx.array,  # float [..., K]
        codes: mx.array,  # uint32 [N, Kp * b / 32]
        norms: mx.array,  # float16 [N, Kp / B]
        edges: tuple[int, ...] = (),
        training: bool = False,
    ) -> list[mx.array]:
        """y = x W^T in the dtype of x, [..., N] cut at `edges`.

        `training` gives it a gradient with respect to x, which a kernel has not: dx = (g W_rotated) rotated back.
        """
        if training:
            return _split(self._differentiable(x, codes, norms), edges)
        if x.size > backend().GEMV_MAX_ROWS * self.spec.in_features:
            return _split(self._multiply(x, codes, norms), edges)
        few = self._few.get(edges)
        if few is None:
            few = self._few[edges] = mx.compile(lambda *arrays: _split(self._multiply(*arrays), edges))
        return few(x, codes, norms)

    def fuses(self, dtype: mx.Dtype) -> bool:
        """Whether a product of one row can take the norm before it and the sum after it along."""
        return hasattr(backend(), "fuses") and backend().fuses(self._decoder(), dtype)

    def normed_product(
        self, x: mx.array, scale: mx.array, eps: float, codes: mx.array, norms: mx.array, **more
    ) -> list[mx.array]:
        """`product` of rms_norm(x) * scale, one row, where `fuses`, within what is compiled already."""
        return backend().normed_product(x, scale, eps, codes, norms, self._decoder(), **more)

    def product_plus(self, x: mx.array, codes: mx.array, norms: mx.array, residual: mx.array) -> mx.array:
        """x W^T + residual, one row, where `fuses`, within what is compiled already."""
        return backend().product(x, codes, norms, self._decoder(), residual)

    def gather_product(
        self,
        x: mx.array,  # float [..., M, K]; the leading axes broadcast with those of indices
        codes: mx.array,  # uint32 [experts, N, Kp * b / 32]
        norms: mx.array,  # float16 [experts, N, Kp / B]
        indices: mx.array,  # integer [...]: the expert of each matrix of x
        sorted_indices: bool = False,
        edges: tuple[int, ...] = (),
    ) -> list[mx.array]:
        """y = x W[index]^T, the product of mixture-of-experts layers: [..., M, N] in the dtype of x, cut at `edges`.

        Few single rows (a token being generated) go through the kernel that reads only the experts asked for; otherwise
        the whole stack is decoded and mx.gather_mm multiplies.
        """
        experts, outputs = codes.shape[:2]
        # one row for all experts of a token ([tokens, 1, 1, K] with [tokens, k]), or one an expert ([tokens, k, 1, K])
        if x.shape[-2] == 1 and indices.size < 2 * experts and _leads(x.shape[:-2], indices.shape):
            return _split(self._gather_few(x, codes, norms, indices), edges)
        packed = codes.reshape(-1, codes.shape[-1]), norms.reshape(-1, norms.shape[-1])
        stack = mx.swapaxes(self._dequantize(*packed, x.dtype).reshape(experts, outputs, -1), -1, -2)
        y = mx.gather_mm(self._rotate(x), stack, rhs_indices=indices, sorted_indices=sorted_indices)
        return _split(y, edges)

    def embedding(self, ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows of the weight: integer [...] -> `dtype` [..., K]. Only the rows asked for are decoded."""
        rows = backend().embedding(ids.flatten(), codes, norms, table, self.spec.in_features, dtype)
        return rows.reshape(*ids.shape, self.spec.in_features)

    def _try(self, dtype: mx.Dtype) -> bool:
        if backend() is None or dtype not in (mx.float16, mx.bfloat16, mx.float32):
            return False
        codes, norms = mx.zeros((8, self.spec.words), mx.uint32), mx.ones((8, self.spec.blocks), mx.float16)
        x = mx.ones((1, self.spec.in_features), dtype)
        try:
            mx.eval(self._multiply(x, codes, norms), self._dequantize(codes, norms, dtype))
        except RuntimeError as error:
            _warn_once(f"the HLWQ kernels do not run on this machine, plain MLX operations are used (slower): {error}")
            return False
        return True

    def _multiply(self, x: mx.array, codes: mx.array, norms: mx.array) -> mx.array:
        if x.size <= backend().GEMV_MAX_ROWS * self.spec.in_features:
            return backend().product(x, codes, norms, self._decoder())
        rotated = self._rotate(x)
        step = max(SCRATCH_WEIGHTS // self.spec.padded_in_features, 1)
        starts = range(0, codes.shape[0], step)
        parts = [rotated @ self._dequantize(codes[i : i + step], norms[i : i + step], x.dtype).T for i in starts]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _gradient(self, primals: tuple, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        x, codes, norms = primals
        rotated = cotangent @ self._dequantize(codes, norms, x.dtype)
        return self._rotate(rotated)[..., : self.spec.in_features], mx.zeros_like(codes), mx.zeros_like(norms)

    def _gather(self, x: mx.array, codes: mx.array, norms: mx.array, indices: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        y = backend().gather_product(rows, codes, norms, indices.flatten(), self._decoder())
        return y.reshape(*indices.shape, 1, codes.shape[1])

    def _rotate(self, x: mx.array) -> mx.array:
        rotated = backend().rotate(x.reshape(-1, x.shape[-1]), self.spec.block_size)
        return rotated.reshape(*x.shape[:-1], -1)

    def _dequantize(self, codes: mx.array, norms: mx.array, dtype: mx.Dtype) -> mx.array:
        return backend().dequantize(codes, norms, dtype, self._decoder())

    def _decoder(self):
        if not backend().__name__.endswith(".metal"):
            return backend().decoder(self.codebook, self.spec.block_size)
        from hlwq_mlx.tune import preferred_way

        return backend().decoder(self.codebook, self.spec.block_size, preferred_way(self.codebook))


@cache
def _warn_once(_message: str) -> None:
    warnings.warn(_message, RuntimeWarning, stacklevel=3)


def _split(y: mx.array, edges: tuple[int, ...]) -> list[mx.array]:
    return mx.split(y, edges, axis=-1) if edges else [y]


def _leads(x_axes: tuple[int, ...], index_axes: tuple[int, ...]) -> bool:
    """Whether each row of x serves a run of neighboring indices: equal axes first, then axes of 1."""
    if len(x_axes) != len(index_axes):
        return False
    shared = next((i for i, (a, b) in enumerate(zip(x_axes, index_axes, strict=True)) if a != b), len(x_axes))
    return all(size == 1 for size in x_axes[shared:])
