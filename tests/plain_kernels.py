"""What surrounds the kernels on a GPU, run without one: choices, siblings, compiled steps, tracing by mx.compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx

from convert.codebook import codebook
from convert.format import ModuleSpec
from hlwq_mlx import kernels, ops


class PlainKernels:
    """The functions of hlwq_mlx.metal in plain operations."""

    __name__ = "plain"
    GEMV_MAX_ROWS = 8

    def decoder(self, table: tuple[float, ...], block_size: int) -> ModuleSpec:
        return ModuleSpec(len(table).bit_length() - 1, block_size, block_size)

    def rotate(self, x: mx.array, block_size: int) -> mx.array:
        return ops.rotate(x, ModuleSpec(4, block_size, x.shape[-1])).astype(x.dtype)

    def dequantize(self, codes: mx.array, norms: mx.array, dtype: mx.Dtype, decoder: ModuleSpec) -> mx.array:
        spec = dataclasses.replace(decoder, in_features=norms.shape[-1] * decoder.block_size)
        return ops.decode_rotated(codes, norms, ops.centroids(codebook(spec.bits), spec), spec, dtype)

    def product(
        self,
        x: mx.array,
        codes: mx.array,
        norms: mx.array,
        decoder: ModuleSpec,
        residual: mx.array | None = None,
    ) -> mx.array:
        y = self.rotate(x, decoder.block_size) @ self.dequantize(codes, norms, x.dtype, decoder).T
        return y if residual is None else y + residual

    def gather_product(
        self, x: mx.array, codes: mx.array, norms: mx.array, experts: mx.array, decoder: ModuleSpec
    ) -> mx.array:
        weight = self.dequantize(codes, norms, x.dtype, decoder)[experts]
        rows = mx.repeat(self.rotate(x, decoder.block_size), experts.size // x.shape[0], axis=0)
        return (weight @ rows[..., None])[..., 0]

    def embedding(
        self, ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, columns: int, dtype: mx.Dtype
    ) -> mx.array:
        bits = table.size.bit_length() - 1
        spec = ModuleSpec(bits, codes.shape[-1] * 32 // bits // norms.shape[-1], columns)
        return ops.embedding(ids, codes, norms, table, spec, dtype)


class FusingKernels(PlainKernels):
    """The functions of hlwq_mlx.cuda: as there, sums and norms inside are float32."""

    def fuses(self, decoder: ModuleSpec, dtype: mx.Dtype) -> bool:
        return decoder.bits == 4 and dtype != mx.float32

    def normed_product(
        self,
        x: mx.array,
        scale: mx.array,
        eps: float,
        codes: mx.array,
        norms: mx.array,
        decoder: ModuleSpec,
        add: mx.array | None = None,
        swiglu: bool = False,
    ) -> list[mx.array]:
        x = x if add is None else x + add
        normed = mx.fast.rms_norm(x.astype(mx.float32), scale.astype(mx.float32), eps)
        rotated = self.rotate(normed, decoder.block_size).astype(x.dtype)
        y = rotated.astype(mx.float32) @ self.dequantize(codes, norms, x.dtype, decoder).astype(mx.float32).T
        if swiglu:
            gate, other = mx.split(y, 2, axis=-1)
            y = gate * mx.sigmoid(gate) * other
        return [y.astype(x.dtype)] if add is None else [y.astype(x.dtype), x]

    def heads(
        self,
        y: mx.array,
        position: mx.array,
        inv_freq: mx.array,
        counts: tuple[int, int],
        scales: tuple[mx.array, mx.array] | None = None,
        eps: float = 0.0,
    ) -> list[mx.array]:
        head_dim = y.size // (counts[0] + 2 * counts[1])
        parts = mx.split(y.astype(mx.float32).reshape(1, -1, 1, head_dim), (counts[0], sum(counts)), axis=1)
        for i, scale in enumerate(scales or ()):
            parts[i] = mx.fast.rms_norm(parts[i], scale.astype(mx.float32), eps)
        for i in range(2):
            parts[i] = mx.fast.rope(
                parts[i],
                2 * inv_freq.size,
                traditional=False,
                base=None,
                scale=1.0,
                offset=position,
                freqs=1 / inv_freq,
            )
        return [part.astype(y.dtype) for part in parts]


@contextmanager
def as_on_a_gpu(plain: PlainKernels | None = None) -> Iterator[None]:
    """Inside, layers take the path of a GPU whose kernels, `plain`, work."""
    plain = plain or PlainKernels()
    kernels.kernels_for.cache_clear()
    with (
        mock.patch.object(kernels, "backend", lambda: plain),
        mock.patch.object(ops, "pick", lambda *_: ops.Path.KERNELS),
    ):
        yield
    kernels.kernels_for.cache_clear()
