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

    def product(self, x: mx.array, codes: mx.array, norms: mx.array, decoder: ModuleSpec) -> mx.array:
        return self.rotate(x, decoder.block_size) @ self.dequantize(codes, norms, x.dtype, decoder).T

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


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, layers take the path of a GPU whose kernels work."""
    plain = PlainKernels()
    kernels.kernels_for.cache_clear()
    with (
        mock.patch.object(kernels, "backend", lambda: plain),
        mock.patch.object(ops, "pick", lambda *_: ops.Path.KERNELS),
    ):
        yield
    kernels.kernels_for.cache_clear()
