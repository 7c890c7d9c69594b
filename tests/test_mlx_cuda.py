"""The CUDA kernels of the MLX backend against the numpy reference: emulated on the CPU and, with -m gpu, on a GPU.

Bounds: rotated x and centroids are rounded to the dtype of x (centroids of float32 x are not), sums are float32, and
the result is rounded to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert import reference
from convert.codebook import codebook
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec
from hlwq_mlx import cuda, kernels, ops
from hlwq_mlx.layers import HLWQLinear
from hlwq_mlx.siblings import link
from hlwq_mlx.steps import compile_steps
from tests import cuda_cpu
from tests.metal_cpu import EmulationError, require
from tests.mlx_cuda_cases import (
    DEVICES,
    DTYPES,
    FLOAT32,
    ROUNDING,
    Packed,
    assert_product,
    float64,
    normal,
    on_device,
    swiglu_of,
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where kernels run inside the test."""
    yield from on_device(request.param)


@pytest.mark.parametrize("block_size,dtype", list(zip(BLOCK_SIZES, DTYPES, strict=True)), ids=str)
def test_rotate(block_size: int, dtype: mx.Dtype, device: str):
    x = normal(3, 5 * block_size - 7, dtype=dtype)
    expected = reference.rotate(float64(x), block_size)
    bound = ROUNDING[dtype] * np.abs(expected) + 1e-5  # float32 sums of at most 128 values of order one
    assert (np.abs(float64(cuda.rotate(x, block_size)) - expected) <= bound).all()


# bits, block, N, K, M, dtype: every bits, block and dtype; M up to 8; tails of N, of K and of 512 columns; on tensor
# cores more and fewer columns than the warps take at a time
PRODUCTS = [
    (4, 128, 37, 640, 1, mx.float16),
    (4, 128, 16, 4608, 1, mx.bfloat16),
    (4, 64, 33, 1000, 1, mx.bfloat16),
    (4, 32, 5, 40, 1, mx.float16),
    (4, 128, 20, 1100, 8, mx.bfloat16),
    (4, 32, 9, 1050, 3, mx.float16),
    (4, 64, 8, 128, 3, mx.float16),  # one warp, more outputs than it has lanes
    (4, 64, 7, 200, 2, mx.float32),
    (2, 128, 13, 384, 1, mx.float16),
    (3, 64, 9, 4480, 2, mx.float16),
    (5, 32, 3, 32, 5, mx.bfloat16),
    (6, 128, 10, 256, 8, mx.float32),
    (8, 64, 21, 190, 1, mx.float32),
]


@pytest.mark.parametrize("bits,block_size,outputs,columns,rows,dtype", PRODUCTS, ids=str)
def test_product(bits: int, block_size: int, outputs: int, columns: int, rows: int, dtype: mx.Dtype, device: str):
    packed = Packed(ModuleSpec(bits, block_size, columns), outputs)
    x = normal(rows, columns, dtype=dtype)
    y = cuda.product(x, packed.codes, packed.norms, packed.decoder)
    assert_product(y, x, packed.rotated, block_size)


@pytest.mark.parametrize("multiprocessors", [1, 3, 9])
def test_any_number_of_multiprocessors(multiprocessors: int, device: str, monkeypatch: pytest.MonkeyPatch):
    """Many turns a thread block, rows that end inside the last one, fewer rows than thread blocks."""
    monkeypatch.setattr(cuda, "_multiprocessors", lambda: multiprocessors)
    packed, x = Packed(ModuleSpec(4, 128, 2560), 101), normal(1, 2560, dtype=mx.bfloat16)
    assert_product(cuda.product(x, packed.codes, packed.norms, packed.decoder), x, packed.rotated, 128)


def test_x_at_any_address(device: str):
    """A row that does not start at a multiple of 16 bytes, as slices may."""
    packed, x = Packed(ModuleSpec(4, 64, 576), 16), normal(1, 577, dtype=mx.float16)[:, 1:]
    assert_product(cuda.product(x, packed.codes, packed.norms, packed.decoder), x, packed.rotated, 64)


def test_nan_and_infinity_stay_in_their_rows(device: str):
    packed, x = Packed(ModuleSpec(4, 64, 128), 8), np.ones((3, 128), np.float16)
    packed.norms = mx.ones(packed.norms.shape, mx.float16)
    x[1, 5], x[2, 6] = np.nan, np.inf
    y = float64(cuda.product(mx.array(x), packed.codes, packed.norms, packed.decoder))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and not np.isfinite(y[2]).any()


@pytest.mark.parametrize("bits,dtype", [(4, mx.bfloat16), (3, mx.float16)], ids=str)
def test_gather_product(bits: int, dtype: mx.Dtype, device: str):
    packed, experts = Packed(ModuleSpec(bits, 64, 192), 5, 11), np.array([4, 0, 0, 3, 1, 2])
    for rows in (1, 3, 6):  # one row of x for every six, two and one experts
        x = normal(rows, 192, dtype=dtype)
        y = cuda.gather_product(x, packed.codes, packed.norms, mx.array(experts), packed.decoder)
        for i, expert in enumerate(experts):
            assert_product(y[i : i + 1], x[i * rows // 6 : i * rows // 6 + 1], packed.rotated[expert], 64)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_dequantize_and_embedding(bits: int, device: str):
    dtype, spec = DTYPES[bits % 3], ModuleSpec(bits, 64, 3 * 64 - 5)
    packed = Packed(spec, 10)
    got = float64(cuda.dequantize(packed.codes, packed.norms, dtype, packed.decoder))
    rounding = ROUNDING[dtype] + 2 * FLOAT32
    assert (np.abs(got - packed.rotated) <= rounding * np.abs(packed.rotated)).all()
    ids = np.array([9, 0, 0, 4])
    rows = cuda.embedding(mx.array(ids), packed.codes, packed.norms, packed.decoder.table, spec.in_features, dtype)
    expected = reference.decode(packed.encoded, spec, codebook(bits))[ids]
    assert np.abs(float64(rows) - expected).max() <= (ROUNDING[dtype] + 2.0**-19) * np.abs(expected).max()


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("block_size,columns,dtype", [(128, 640, mx.bfloat16), (64, 4200, mx.float16)], ids=str)
def test_sum_norm_and_activation_inside(block_size: int, columns: int, dtype: mx.Dtype, swiglu: bool, device: str):
    """The product of a norm, of a sum's norm, and with a residual; the sum of squares over one step and over two."""
    packed = Packed(ModuleSpec(4, block_size, columns), 74)
    x, more, scale = (normal(1, columns, dtype=dtype, seed=seed) for seed in range(3))
    for add in (None, more):
        arrays = (x, scale[0], 1e-5, packed.codes, packed.norms, packed.decoder)
        y, *total = cuda.normed_product(*arrays, add=add, swiglu=swiglu)
        summed = x if add is None else x + add
        assert [mx.array_equal(value, summed).item() for value in total] == [True] * (add is not None)
        values = float64(summed)
        normed = values / np.sqrt((values**2).mean() + 1e-5) * float64(scale)
        rotated = reference.rotate(normed, block_size)
        exact, magnitude = rotated @ packed.rotated.T, np.abs(rotated) @ np.abs(packed.rotated).T
        bound = (FLOAT32 * (columns + 16) + 2 * ROUNDING[dtype]) * magnitude  # as of a product, before its rounding
        if swiglu:
            exact, bound = swiglu_of(exact, bound)
        assert (np.abs(float64(y) - exact) <= bound + ROUNDING[dtype] * (np.abs(exact) + bound)).all()


def test_residual(device: str):
    packed, x = Packed(ModuleSpec(4, 128, 640), 37), normal(1, 640, dtype=mx.bfloat16)
    residual = normal(1, 37, dtype=mx.bfloat16, seed=1)
    y = cuda.product(x, packed.codes, packed.norms, packed.decoder, residual)
    rotated = reference.rotate(float64(x), 128)
    exact = rotated @ packed.rotated.T + float64(residual)
    bound = (FLOAT32 * 656 + 2 * ROUNDING[x.dtype]) * (np.abs(rotated) @ np.abs(packed.rotated).T)
    assert (np.abs(float64(y) - exact) <= bound + ROUNDING[x.dtype] * (np.abs(exact) + bound)).all()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim,dims", [(128, 128), (96, 64), (64, 64)])
def test_heads(head_dim: int, dims: int, normed: bool, device: str):
    """Three heads of q, two of k and v; a rotary embedding of all values or of some."""
    dtype, position, eps = mx.bfloat16, 1234, 1e-6
    y = normal(1, 1, 7 * head_dim, dtype=dtype)
    scales = (normal(head_dim, dtype=dtype, seed=1), normal(head_dim, dtype=dtype, seed=2)) if normed else None
    inv_freq = 10000.0 ** -np.linspace(0, 1, dims // 2, endpoint=False).astype(np.float32)
    found = cuda.heads(y, mx.array(position, mx.int32), mx.array(inv_freq), (3, 2), scales, eps)
    parts = np.split(float64(y).reshape(7, head_dim), (3, 5))
    for i, scale in enumerate(scales or ()):
        parts[i] = parts[i] / np.sqrt((parts[i] ** 2).mean(-1, keepdims=True) + eps) * float64(scale)
    for i in range(2):
        angle, half = position * inv_freq.astype(np.float64), dims // 2
        a, b = parts[i][:, :half], parts[i][:, half:dims]
        turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
        parts[i] = np.concatenate([*turned, parts[i][:, dims:]], axis=-1)
    for got, expected in zip(found, parts, strict=True):
        assert got.shape == (1, len(expected), 1, head_dim)
        error = np.abs(float64(got)[0, :, 0] - expected)
        # the angle, of up to 1234, is rounded to float32
        assert (error <= ROUNDING[dtype] * np.abs(expected) + 2 * position * FLOAT32 * np.abs(expected).max()).all()


FAULTS = [
    (
        "what is prepared is used before it is written",
        "  __syncthreads();\n\n  float sum[4]",
        "  float sum[4]",
        "UNINITIALIZED|RACE",
    ),
    (
        "parts are summed before they are written",
        "__syncthreads();\n      buffer ^= 1;",
        "buffer ^= 1;",
        "UNINITIALIZED|RACE",
    ),
    ("parts are overwritten before they are summed", "buffer ^= 1;", "", "RACE"),
    ("rows beyond N are read", "min(row + 8 * i, last)", "(row + 8 * i)", "OUT OF BOUNDS"),
    ("rows beyond N are written", "if (row < outputs) y", "y", "OUT OF BOUNDS"),
]


@require.emulator
@pytest.mark.parametrize("what,old,new,finding", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_the_emulator_sees(what: str, old: str, new: str, finding: str, monkeypatch: pytest.MonkeyPatch):
    changed = []

    def edit(text: str) -> str:
        changed.append(old in text)
        return text.replace(old, new)

    packed, x = Packed(ModuleSpec(4, 128, 640), 84), normal(1, 640, dtype=mx.float16)
    cuda._kernel.cache_clear()
    monkeypatch.setattr(cuda, "_multiprocessors", lambda: 2)
    with cuda_cpu.emulated(edit=edit), pytest.raises(EmulationError, match=finding):
        cuda.product(x, packed.codes, packed.norms, packed.decoder)
    cuda._kernel.cache_clear()
    assert any(changed)


@pytest.mark.gpu
@pytest.mark.skipif(not mx.cuda.is_available(), reason="no MLX with a CUDA GPU here")
def test_layers_on_a_gpu():
    """A feed-forward module as a model has it: siblings, a compiled step, a prompt, and a gradient."""

    class FeedForward(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))

    module, weights = FeedForward(), {}
    for name, outputs, columns in (("gate_proj", 96, 256), ("up_proj", 96, 256), ("down_proj", 64, 96)):
        spec = ModuleSpec(4, 32, columns)
        packed = Packed(spec, outputs)
        layer = HLWQLinear((outputs,), spec, codebook(4), mx.float16)
        layer.weight_codes, layer.weight_norms = packed.codes, packed.norms
        module[name], weights[name] = layer, reference.decode(packed.encoded, spec, codebook(4))
    module.eval()
    link([module])
    compile_steps([module])
    assert kernels.backend() is cuda and module.up_proj._path(mx.float16) is ops.Path.KERNELS
    for rows in (1, 1, 8, 40):
        x = normal(rows, 256, dtype=mx.float16, seed=rows) * 0.1
        gate, up = float64(x) @ weights["gate_proj"].T, float64(x) @ weights["up_proj"].T
        expected = (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"].T
        # half: x, three products, their centroids and the activation
        assert np.linalg.norm(float64(module(x)) - expected) <= 2e-3 * np.linalg.norm(expected)
    layer, x = module.down_proj, normal(3, 96, dtype=mx.float16)
    layer.train()
    target = normal(3, 64, dtype=mx.float16, seed=8)
    gradient = mx.grad(lambda x: (layer(x) * target).sum())(x)
    expected = float64(target) @ weights["down_proj"]
    assert np.linalg.norm(float64(gradient) - expected) <= 2e-3 * np.linalg.norm(expected)
