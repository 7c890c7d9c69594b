"""The CUDA kernels of the MLX backend against the numpy reference; needs MLX with a CUDA GPU (mlx[cuda13]).

Bounds: a decoded centroid is rounded to half (bfloat16 for bfloat16 x), products of half x add up in half over eight
codes, everything else is float32, and the result is rounded to the dtype of x.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from convert import packing, reference
from convert.codebook import codebook
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not mx.cuda.is_available(), reason="no MLX with a CUDA GPU here")]

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
# of one product: the centroid's rounding, and for half x up to four roundings of a partial sum
PRODUCT = {mx.float16: 5 * 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-11}


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def packed(spec: ModuleSpec, *rows: int):
    """(codes, norms, decoder, encoded, rotated weight in float64) of a random quantized matrix."""
    from hlwq_mlx import cuda

    random = np.random.default_rng(0)
    codes = random.integers(0, 2**spec.bits, (*rows, spec.padded_in_features)).astype(np.uint8)
    encoded = reference.Encoded(codes, random.uniform(0.5, 2, (*rows, spec.blocks)).astype(np.float16))
    rotated = reference.decode_rotated(encoded, spec, codebook(spec.bits))
    words, norms = mx.array(packing.pack(codes, spec.bits)), mx.array(encoded.norms)
    return words, norms, cuda.decoder(codebook(spec.bits), spec.block_size), encoded, rotated


def assert_product(y: mx.array, x: mx.array, weight: np.ndarray) -> None:
    expected = float64(x) @ weight.T
    sums = (PRODUCT[x.dtype] + 2.0**-24 * x.shape[-1]) * (np.abs(float64(x)) @ np.abs(weight).T)
    assert (np.abs(float64(y) - expected) <= sums + ROUNDING[y.dtype] * np.abs(expected)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_rotate(block_size: int, dtype: mx.Dtype):
    from hlwq_mlx import cuda

    x = normal(3, 5 * block_size - 7, dtype=dtype)
    expected = reference.rotate(float64(x), block_size)
    bound = ROUNDING[dtype] * np.abs(expected) + 1e-5  # float32 sums of at most 128 values of order one
    assert (np.abs(float64(cuda.rotate(x, block_size)) - expected) <= bound).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_gemv(bits: int, dtype: mx.Dtype, rows: int):
    from hlwq_mlx import cuda

    for block_size, outputs, blocks in ((128, 37, 5), (64, 16, 70), (32, 3, 1)):
        spec = ModuleSpec(bits, block_size, blocks * block_size)
        codes, norms, decoder, _, rotated = packed(spec, outputs)
        x = normal(rows, spec.in_features, dtype=dtype)
        assert_product(cuda.gemv(x, codes, norms, decoder), x, rotated)


@pytest.mark.parametrize("bits", [3, 4])
def test_gather_gemv(bits: int):
    from hlwq_mlx import cuda

    codes, norms, decoder, _, rotated = packed(ModuleSpec(bits, 64, 192), 5, 11)
    experts = np.array([4, 0, 0, 3, 1, 2])
    for rows in (1, 3, 6):
        x = normal(rows, 192, dtype=mx.bfloat16)
        y = cuda.gather_gemv(x, codes, norms, mx.array(experts), decoder)
        for i, expert in enumerate(experts):
            assert_product(y[i : i + 1], x[i * rows // 6 : i * rows // 6 + 1], rotated[expert])


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_and_embedding(bits: int, dtype: mx.Dtype):
    from hlwq_mlx import cuda

    spec = ModuleSpec(bits, 64, 3 * 64 - 5)
    codes, norms, decoder, encoded, rotated = packed(spec, 10)
    rounding = (ROUNDING[dtype] + PRODUCT[dtype]) * np.abs(rotated).max()
    assert np.abs(float64(cuda.dequantize(codes, norms, dtype, decoder)) - rotated).max() <= rounding
    table, ids = mx.array(decoder.values, mx.float32), np.array([9, 0, 0, 4])
    rows = cuda.embedding(mx.array(ids), codes, norms, table, spec.in_features, dtype)
    expected = reference.decode(encoded, spec, codebook(bits))[ids]
    assert np.abs(float64(rows) - expected).max() <= (ROUNDING[dtype] + 2.0**-19) * np.abs(expected).max()


def test_layers_take_the_kernels():
    from hlwq_mlx import kernels, ops
    from hlwq_mlx.layers import HLWQLinear

    spec = ModuleSpec(4, 128, 256)
    codes, norms, _, encoded, _ = packed(spec, 40)
    layer = HLWQLinear((40,), spec, codebook(4), mx.float32)
    layer.weight_codes, layer.weight_norms = codes, norms
    layer.eval()
    weight = reference.decode(encoded, spec, codebook(4))
    assert kernels.work(layer.codebook, spec, mx.float32) and layer._path(mx.float32) is ops.Path.KERNELS
    for rows in (1, 40):
        x = normal(rows, 256, dtype=mx.float32)
        # half centroids, and TF32 in MLX's float32 product of many rows
        assert np.linalg.norm(float64(layer(x)) - float64(x) @ weight.T) <= 2e-3 * np.linalg.norm(float64(x) @ weight.T)
