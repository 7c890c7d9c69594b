"""The MLX operations and layers against convert.reference, both ways of multiplying, on the CPU device.

Tolerances are relative to the norm of the expected result. float32: the rotation and the product add at most a few
hundred terms, each rounded to 2**-24. bfloat16: input, decoded weight and result are each rounded to 2**-9.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert.codebook import codebook
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec
from convert.packing import pack
from convert.reference import Encoded, decode, decode_rotated, encode, matmul, rotate
from hlwq_mlx import ops
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear, HLWQSwitchLinear

FLOAT32, BFLOAT16 = 2e-6, 2e-2
CASES = [(bits, block_size) for bits in SUPPORTED_BITS for block_size in BLOCK_SIZES]
WIDTHS = (37, 200, 384)  # less than a block, a padded tail, whole blocks


class Case:
    """A random quantized weight [*rows, K], as numpy and as MLX arrays."""

    def __init__(self, rows: tuple[int, ...], in_features: int, bits: int, block_size: int = 128) -> None:
        rng = np.random.default_rng([*rows, in_features, bits, block_size])
        self.rng = rng
        self.spec = ModuleSpec(bits, block_size, in_features)
        weight = rng.standard_normal((*rows, in_features), np.float32)
        weight.reshape(-1, in_features)[0] = 0  # a zero row must decode to zeros
        self.encoded: Encoded = encode(weight, self.spec)
        self.codebook = codebook(bits)
        self.weight = decode(self.encoded, self.spec, self.codebook)  # float64
        self.table = ops.centroids(self.codebook, self.spec)
        self.codes, self.norms = mx.array(pack(self.encoded.codes, bits)), mx.array(self.encoded.norms)
        self.packed = (self.codes, self.norms, self.table, self.spec)

    def x(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal((*shape, self.spec.in_features), np.float32)

    def fill(self, layer: nn.Module) -> nn.Module:
        layer.weight_codes, layer.weight_norms = self.codes, self.norms
        return layer


def error(found: mx.array, expected: np.ndarray) -> float:
    found = np.array(found.astype(mx.float32), np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("bits", "block_size"), CASES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_decode_is_exact(bits: int, block_size: int, in_features: int):
    case = Case((5,), in_features, bits, block_size)
    np.testing.assert_array_equal(np.array(ops.unpack(case.codes, case.spec)), case.encoded.codes)
    expected = decode_rotated(case.encoded, case.spec, case.codebook, np.float32)
    np.testing.assert_array_equal(np.array(ops.decode_rotated(*case.packed)), expected)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_rotate(block_size: int, in_features: int):
    case = Case((1,), in_features, 4, block_size)
    x = case.x(2, 3)
    assert error(ops.rotate(mx.array(x), case.spec), rotate(x.astype(np.float64), block_size)) < FLOAT32


@pytest.mark.parametrize(("bits", "block_size"), CASES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_linear(bits: int, block_size: int, in_features: int):
    case = Case((67,), in_features, bits, block_size)
    layer = case.fill(HLWQLinear((67,), case.spec, case.codebook, mx.float32))
    for shape in ((1,), (2, 5)):
        x = case.x(*shape)
        expected = matmul(x, case.encoded, case.spec, case.codebook)
        assert error(layer(mx.array(x)), expected) < FLOAT32
        assert error(ops.linear(mx.array(x), *case.packed), expected) < FLOAT32
        for dtype in (mx.bfloat16, mx.float16):
            y = ops.linear(mx.array(x).astype(dtype), *case.packed)
            assert y.dtype == dtype and error(y, expected) < BFLOAT16
            y = layer(mx.array(x).astype(dtype))
            assert y.dtype == dtype and error(y, expected) < BFLOAT16


def test_linear_in_chunks(monkeypatch: pytest.MonkeyPatch):
    case = Case((67,), 256, 4)
    x = case.x(3)
    monkeypatch.setattr(ops, "CHUNK_WEIGHTS", 10 * 256)  # 7 chunks, the last of 7 rows
    assert error(ops.linear(mx.array(x), *case.packed), matmul(x, case.encoded, case.spec, case.codebook)) < FLOAT32


def test_bias_and_nan():
    case = Case((9,), 96, 4, 32)
    layer = case.fill(HLWQLinear((9,), case.spec, case.codebook, mx.float32, bias=True))
    bias = case.rng.standard_normal(9).astype(np.float32)
    layer.bias = mx.array(bias)
    x = case.x(4)
    expected = matmul(x, case.encoded, case.spec, case.codebook) + bias
    assert error(layer(mx.array(x)), expected) < FLOAT32
    x[2, 50] = np.nan
    y = np.array(layer(mx.array(x)))
    assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_embedding(bits: int, in_features: int):
    case = Case((31,), in_features, bits)
    layer = case.fill(HLWQEmbedding((31,), case.spec, case.codebook, mx.float32))
    ids = np.array([[3, 3, 0], [30, 1, 7]])
    assert error(layer(mx.array(ids)), case.weight[ids]) < FLOAT32
    assert (np.array(layer(mx.array([0]))) == 0).all()
    x = case.x(2)
    assert error(layer.as_linear(mx.array(x)), matmul(x, case.encoded, case.spec, case.codebook)) < FLOAT32
    half = case.fill(HLWQEmbedding((31,), case.spec, case.codebook, mx.bfloat16))(mx.array(ids))
    assert half.dtype == mx.bfloat16 and error(half, case.weight[ids]) < BFLOAT16


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 40])  # fewer and more matrices than experts; sorted from 64 indices on
def test_switch(bits: int, in_features: int, tokens: int):
    case = Case((6, 19), in_features, bits)
    layer = case.fill(HLWQSwitchLinear((6, 19), case.spec, case.codebook, mx.float32, bias=True))
    bias = case.rng.standard_normal((6, 19)).astype(np.float32)
    layer.bias = mx.array(bias)
    indices = case.rng.integers(0, 6, (tokens, 2))
    x = case.x(tokens, 1, 1)  # as SwitchGLU calls it: [tokens, 1, 1, K] against indices [tokens, 2]
    expected = np.einsum("tk,tenk->ten", x[:, 0, 0].astype(np.float64), case.weight[indices])
    portable = ops.gather_linear(mx.array(x), *case.packed, mx.array(indices))
    assert error(portable, expected[:, :, None]) < FLOAT32
    assert error(layer(mx.array(x), mx.array(indices)), (expected + bias[indices])[:, :, None]) < FLOAT32

    order = np.argsort(indices.ravel())
    rows, ordered = x.repeat(2, axis=0)[order, 0], indices.ravel()[order]
    expected = (expected + bias[indices]).reshape(-1, 1, 19)[order]
    assert error(layer(mx.array(rows), mx.array(ordered), sorted_indices=True), expected) < FLOAT32
    portable = ops.gather_linear(mx.array(rows), *case.packed, mx.array(ordered), sorted_indices=True)
    assert error(portable + mx.array(bias)[mx.array(ordered)][:, None], expected) < FLOAT32


def test_pick_keeps_decoded_weights_on_the_cpu_only():
    assert ops.pick(mx.DeviceType.cpu, kernels_work=False) is ops.Path.DECODED
    assert ops.pick(mx.DeviceType.gpu, kernels_work=True) is ops.Path.KERNELS
    assert ops.pick(mx.DeviceType.gpu, kernels_work=False) is ops.Path.PORTABLE


def test_kept_weight_follows_the_parameters():
    case = Case((8,), 128, 4)
    layer = case.fill(HLWQLinear((8,), case.spec, case.codebook, mx.float32))
    x = case.x(2)
    assert error(layer(mx.array(x)), x @ case.weight.T) < FLOAT32
    layer.load_weights([("weight_codes", case.codes[::-1]), ("weight_norms", case.norms[::-1])])
    assert error(layer(mx.array(x)), x @ case.weight[::-1].T) < FLOAT32


def test_compiled_step_with_the_parameters_as_inputs():
    """As mlx_lm.lora compiles its training step: inside the trace the parameters are placeholders."""
    case = Case((8,), 128, 4)
    layer = case.fill(HLWQLinear((8,), case.spec, case.codebook, mx.float32))
    step = mx.compile(lambda x: layer(x), inputs=layer.state)
    for _ in range(2):
        x = case.x(2)
        assert error(step(mx.array(x)), x @ case.weight.T) < FLOAT32
    assert error(layer(mx.array(x)), x @ case.weight.T) < FLOAT32  # nothing of the trace was kept


def test_gradient_of_the_input():
    case = Case((8,), 200, 4)
    layer = case.fill(HLWQLinear((8,), case.spec, case.codebook, mx.float32))
    x, weights = case.x(3), case.rng.standard_normal((3, 8)).astype(np.float32)
    gradient = mx.grad(lambda x: (layer(x) * mx.array(weights)).sum())(mx.array(x))
    assert error(gradient, weights.astype(np.float64) @ case.weight) < FLOAT32


def test_layer_is_a_quantized_layer_to_mlx():
    case = Case((8,), 200, 5)
    layer = case.fill(HLWQLinear((8,), case.spec, case.codebook, mx.float32, bias=True))
    assert not layer.trainable_parameters()
    layer.unfreeze()
    assert not layer.trainable_parameters()
    assert not hasattr(layer, "to_quantized")  # nn.quantize must leave it alone
    assert error(layer.weight, case.weight) < FLOAT32
    assert str(layer) == "HLWQLinear(8x200, bits=5, block_size=128)"
