"""What the tests of the CUDA kernels of the MLX backend share: where they run, random matrices, and a bound."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from convert import packing, reference
from convert.codebook import codebook
from convert.format import ModuleSpec
from hlwq_mlx import cuda
from tests import cuda_cpu
from tests.metal_cpu import require

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not mx.cuda.is_available(), reason="no MLX with a CUDA GPU here")]

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
FLOAT32 = 2.0**-24


DEVICES = [pytest.param("emulated", marks=require.emulator), pytest.param("gpu", marks=on_gpu)]


def on_device(device: str) -> Iterator[str]:
    """The body of a fixture: inside, kernels run on `device`."""
    if device == "gpu":
        yield device
        return
    cuda._kernel.cache_clear()
    with cuda_cpu.emulated(), mock.patch.object(cuda, "_multiprocessors", lambda: 2):  # few: each has several turns
        yield device
    cuda._kernel.cache_clear()


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


class Packed:
    """A random quantized matrix: what kernels take, and what it stands for in float64."""

    def __init__(self, spec: ModuleSpec, *rows: int) -> None:
        random = np.random.default_rng(0)
        codes = random.integers(0, 2**spec.bits, (*rows, spec.padded_in_features)).astype(np.uint8)
        norms = random.uniform(0.5, 2, (*rows, spec.blocks)).astype(np.float16)
        norms.flat[-1] = 0  # a block of zeros
        self.encoded = reference.Encoded(codes, norms)
        self.rotated = reference.decode_rotated(self.encoded, spec, codebook(spec.bits))
        self.codes, self.norms = mx.array(packing.pack(codes, spec.bits)), mx.array(self.encoded.norms)
        self.decoder = cuda.decoder(codebook(spec.bits), spec.block_size)


def assert_product(y: mx.array, x: mx.array, weight: np.ndarray, block_size: int) -> None:
    """y = x W^T, `weight` in the rotated basis."""
    rotated = reference.rotate(float64(x), block_size)
    exact, magnitude = rotated @ weight.T, np.abs(rotated) @ np.abs(weight).T
    # the order of a float32 sum and of the rotation; two roundings to the dtype of x a product, one of the result
    bound = (FLOAT32 * (weight.shape[-1] + 16) + 2 * ROUNDING[x.dtype]) * magnitude + ROUNDING[x.dtype] * np.abs(exact)
    assert (np.abs(float64(y) - exact) <= bound).all()


def swiglu_of(exact: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """silu(gate) * other of gates and others [..., 2 N] known within `bound`, and its bound: both [..., N]."""
    (gate, other), (of_gate, of_other) = np.split(exact, 2, axis=-1), np.split(bound, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    # the slope of silu is at most 1.1
    return gate * sigmoid * other, 1.1 * of_gate * (np.abs(other) + of_other) + np.abs(gate) * of_other
