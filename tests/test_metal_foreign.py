"""The emulator runs kernels that this project did not write: a second opinion on itself.

They come from installed packages, mlx-lm and jang (a peer, in the extra `test`), and are not copied here.
"""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import bitlinear_layers, gated_delta

from convert import packing, reference
from tests import metal_cpu
from tests.metal_cpu import require

pytestmark = require.emulator


def test_bitlinear_of_mlx_lm():
    """Ternary weights, four rows a byte: simd_sum over 32 lanes that stride K."""
    random = np.random.default_rng(0)
    inputs, outputs, rows = 256, 24, 3
    x = mx.array(random.standard_normal((rows, inputs)).astype(np.float32))
    packed = random.integers(0, 256, (outputs // 4, inputs)).astype(np.uint8) & 0b10101010  # values 0 and 2, minus 1
    scale = mx.array([0.25])
    with metal_cpu.emulated():
        kernel = bitlinear_layers.make_bitlinear_kernel()
        (y,) = kernel(
            inputs=[x, mx.array(packed), scale],
            template=[
                ("T", mx.float32),
                ("invert_weight_scales", False),
                ("in_features", inputs),
                ("out_features", outputs),
            ],
            grid=(32, rows * outputs // 4, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(rows, outputs)],
            output_dtypes=[mx.float32],
        )
    weight = np.concatenate([((packed >> (2 * i)) & 3).astype(np.float64) - 1 for i in range(4)])
    expected = 0.25 * np.array(x) @ weight.T
    assert np.abs(np.array(y) - expected).max() <= inputs * 2.0**-24 * np.abs(np.array(x)).sum(1).max()


def test_gated_delta_of_mlx_lm():
    """The recurrence of hybrid models, against mlx-lm's own implementation in plain MLX operations on the CPU."""
    random = np.random.default_rng(1)
    tokens, key_heads, value_heads, key_dim, value_dim = 5, 2, 4, 64, 8

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32) / 4)

    q, k = normal(1, tokens, key_heads, key_dim), normal(1, tokens, key_heads, key_dim)
    v, state = normal(1, tokens, value_heads, value_dim), normal(1, value_heads, value_dim, key_dim)
    g = mx.array(random.uniform(0.5, 1, (1, tokens, value_heads)).astype(np.float32))
    beta = mx.array(random.uniform(0, 1, (1, tokens, value_heads)).astype(np.float32))
    expected = gated_delta.gated_delta_ops(q, k, v, g, beta, state)
    with metal_cpu.emulated(), mock.patch.object(mx.metal, "is_available", lambda: True):
        kernel = gated_delta._make_gated_delta_kernel()
        with mock.patch.object(gated_delta, "_gated_delta_kernel", kernel):
            got = gated_delta.gated_delta_kernel(q, k, v, g, beta, state)
    for mine, theirs in zip(got, expected, strict=True):
        # two float32 orders of the same sums of 64 products, over five steps
        assert np.abs(np.array(mine) - np.array(theirs)).max() <= 1e-5


@require.peer
@pytest.mark.parametrize("bits,rows,columns,rotate", [(4, 16, 1024, False), (3, 13, 544, True), (2, 8, 512, True)])
def test_decode_kernel_of_jang(bits: int, rows: int, columns: int, rotate: bool):
    """Hadamard-32 of x, then MLX's layout for one row with a cubic for each code; with and without its guards."""
    from jang_tools.jangh import format as jang_format
    from jang_tools.jangh import kernels as jang

    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (3, rows, columns)).astype(np.uint8)
    scales = random.uniform(0.5, 2, (3, rows)).astype(np.float16)
    x = mx.array(random.standard_normal((1, columns)).astype(np.float16))
    packed = mx.array(packing.pack(codes, bits))  # the same bit stream
    assert np.array_equal(np.array(jang_format.unpack_bitstream(packed, bits, columns)), codes)
    experts = mx.array([2, 0])
    jang._qmv_kernel.cache_clear()
    with metal_cpu.emulated():
        y = jang.gather_qmv(x, packed, mx.array(scales), None, experts, bits, x_per_dispatch=False, rotate=rotate)
    jang._qmv_kernel.cache_clear()
    activation = np.array(x).astype(np.float64)
    if rotate:
        activation = reference.rotate(activation, 32)
    level = np.arange(2**bits) - (2**bits - 1) / 2
    first, third = jang_format.cubic_params(bits)
    weight = (level * (first + third * level**2))[codes] * scales[..., None].astype(np.float64)
    for i, expert in enumerate(np.array(experts)):
        bound = 2.0**-24 * (columns + 16) * (np.abs(activation) @ np.abs(weight[expert]).T)
        assert (np.abs(np.array(y[i]) - activation @ weight[expert].T) <= bound).all()
