"""Layers that compute from packed codes: drop-in for nn.Linear, nn.Embedding and mlx-lm's SwitchLinear.

Parameters are the tensors of docs/format.md: `weight_codes`, `weight_norms` and, where the source has one, `bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from hlwq_mlx import ops
from hlwq_mlx.kernels import kernels_for

if TYPE_CHECKING:
    from hlwq_mlx.checkpoint import ModuleSpec
    from hlwq_mlx.siblings import Siblings


class _Quantized(nn.Module):
    """Codes and norms of a matrix [*rows, K], where rows is (N,), or (experts, N) for a stack.

    `dtype` is what the model computes in: of the bias, of embedded rows and of `weight`.
    """

    # mlx-lm counts the parameters of a layer that has `bits` as weight.size * 32 // bits, and `weight` is decoded here
    bits = 32
    _siblings: Siblings | None = None
    _index = 0

    def __init__(
        self,
        rows: tuple[int, ...],
        spec: ModuleSpec,
        codebook: Sequence[float],  # 2**b ascending centroids
        dtype: mx.Dtype,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.weight_codes = mx.zeros((*rows, spec.words), mx.uint32)
        self.weight_norms = mx.zeros((*rows, spec.blocks), mx.float16)
        if bias:
            self.bias = mx.zeros(rows, dtype)
        self._kernels = kernels_for(tuple(codebook), spec)
        self._table = ops.centroids(codebook, spec)  # "_": not a parameter
        self._kept: _Kept | None = None
        self.freeze()

    @property
    def weight(self) -> mx.array:
        """The decoded weight [*rows, K]: for the few architectures that read a layer's weight instead of calling it."""
        return ops.decode(self.weight_codes, self.weight_norms, self._table, self.spec, self.dtype)

    def unfreeze(self, *args, **kwargs) -> nn.Module:
        """Codes and norms have no gradient: they stay frozen, as in mlx.nn's quantized layers."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(recurse=False)

    def join(self, siblings: Siblings, index: int) -> None:
        """Compute together with the other layers of `siblings`, as number `index`, where kernels are used."""
        self._siblings, self._index = siblings, index

    def _path(self, dtype: mx.Dtype) -> ops.Path:
        device = mx.default_device().type
        return ops.pick(device, device != mx.DeviceType.cpu and self._kernels.work(dtype))

    def _decoded(self) -> mx.array:
        """`ops.decode_for_cpu` of this layer, kept until the parameters are replaced."""
        source = (self.weight_codes, self.weight_norms)
        if self._kept is None or not self._kept.made_from(source):
            decoded = ops.decode_for_cpu(*source, self._table, self.spec)
            try:
                mx.eval(decoded)
            except ValueError:
                # mx.compile is tracing a step that has the parameters as inputs: they are placeholders, the graph
                # decodes them at each call, and keeping one would leak it out of the trace
                return decoded
            self._kept = _Kept(source, decoded)
        return self._kept.decoded

    def _extra_repr(self) -> str:
        rows = "x".join(map(str, self.weight_codes.shape[:-1]))
        return f"{rows}x{self.spec.in_features}, bits={self.spec.bits}, block_size={self.spec.block_size}"


class _Kept:
    """A decoded weight and the arrays it was made from. A plain object: nn.Module would list arrays as its state."""

    def __init__(self, source: tuple[mx.array, mx.array], decoded: mx.array) -> None:
        self.source = source
        self.decoded = decoded

    def made_from(self, source: tuple[mx.array, mx.array]) -> bool:
        # holding the arrays makes identity a safe test: no other array can take their place in memory
        return self.source[0] is source[0] and self.source[1] is source[1]


class _Matrix(_Quantized):
    """A quantized [N, K] that multiplies."""

    def _multiply(self, x: mx.array) -> mx.array:
        path = self._path(x.dtype)
        if path is ops.Path.KERNELS:
            if self._siblings and not self.training:  # adapters on top see one layer at a time
                y = self._siblings.compute(self._index, x)
                if y is not None:
                    return y
            # a module is a dict: looking arrays up in it is ten times as fast as by attribute
            return self._kernels.product(x, self["weight_codes"], self["weight_norms"], (), self.training)[0]
        if path is ops.Path.DECODED:
            return ops.linear_decoded(x, self._decoded(), self.spec)
        return ops.linear(x, self.weight_codes, self.weight_norms, self._table, self.spec)


class HLWQLinear(_Matrix):
    """y = x W^T + bias: float [..., K] -> [..., N]."""

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> nn.Module:
        """The layer with a low-rank adapter on top, as `mlx_lm.lora` asks for it."""
        from hlwq_mlx.lora import lora_linear

        return lora_linear(self, self.spec.in_features, self.weight_codes.shape[0], r, scale, dropout)

    def product_plus(self, x: mx.array, residual: mx.array) -> mx.array:
        """x W^T + residual: one row, without bias, where the kernels fuse, within what is compiled already."""
        return self._kernels.product_plus(x, self["weight_codes"], self["weight_norms"], residual)

    def __call__(self, x: mx.array) -> mx.array:
        y = self._siblings.take(self._index, x) if self._siblings else None
        if y is None:
            y = self._multiply(x)
        return y + self.bias if "bias" in self else y


class HLWQEmbedding(_Matrix):
    """Rows of W: integer [...] -> [..., K]; `as_linear` is the output head of a model with tied embeddings."""

    def __call__(self, ids: mx.array) -> mx.array:
        if self._path(self.dtype) is ops.Path.KERNELS:
            return self._kernels.embedding(ids, self.weight_codes, self.weight_norms, self._table, self.dtype)
        return ops.embedding(ids, self.weight_codes, self.weight_norms, self._table, self.spec, self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """y = x W^T: float [..., K] -> [..., vocabulary]."""
        return self._multiply(x)


class HLWQSwitchLinear(_Quantized):
    """y = x W[index]^T + bias[index]: float [..., M, K] and integer [...] -> [..., M, N]."""

    @property
    def num_experts(self) -> int:
        """Experts in the stack."""
        return self.weight_codes.shape[0]

    @property
    def output_dims(self) -> int:
        """N."""
        return self.weight_codes.shape[1]

    @property
    def input_dims(self) -> int:
        """K."""
        return self.spec.in_features

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> nn.Module:
        """The layer with a low-rank adapter for each expert, as `mlx_lm.lora` asks for it."""
        from hlwq_mlx.lora import lora_switch_linear

        return lora_switch_linear(self, r, scale, dropout)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self._siblings.take(self._index, x, indices, sorted_indices) if self._siblings else None
        if y is None:
            y = self._multiply(x, indices, sorted_indices)
        return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y

    def _multiply(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        packed = (self.weight_codes, self.weight_norms)
        path = self._path(x.dtype)
        if path is ops.Path.DECODED:
            return ops.gather_linear_decoded(x, self._decoded(), self.spec, indices, sorted_indices)
        if path is ops.Path.PORTABLE or self.training:  # plain operations have gradients
            return ops.gather_linear(x, *packed, self._table, self.spec, indices, sorted_indices)
        if self._siblings:
            y = self._siblings.compute(self._index, x, indices, sorted_indices)
            if y is not None:
                return y
        return self._kernels.gather_product(x, *packed, indices, sorted_indices)[0]
