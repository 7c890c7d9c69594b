"""The shipped Metal kernels against the numpy reference in float64, emulated and race-checked on the CPU.

Products are compared with the centroids that a kernel's decoder really uses (`Decoder.values`); how far those are from
the codebook is a test of its own. Bounds: float32 sums of n terms err by at most n * 2**-24 of the sum of magnitudes,
and a result in half or bfloat is rounded once.
"""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from convert import packing, reference
from convert.codebook import codebook, expected_error
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec
from hlwq_mlx import metal
from hlwq_mlx.metal.decoder import Decoder, Way, decoder, polynomial, ways
from tests import metal_cpu
from tests.metal_cpu import require
from tests.mlx_cuda_cases import swiglu_of

pytestmark = require.emulator

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}  # of one conversion
FLOAT32 = 2.0**-24
ROWS = (1, 2, 3, 5, 8)


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


class Packed:
    """A random quantized matrix: what the kernels take, and what its decoder makes of it in float64."""

    def __init__(self, spec: ModuleSpec, rows: tuple[int, ...], way: Way | None = None, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        shape = (*rows, spec.padded_in_features)
        self.spec, self.table = spec, codebook(spec.bits)
        codes = random.integers(0, 2**spec.bits, shape).astype(np.uint8)
        norms = random.uniform(0.5, 2.0, (*rows, spec.blocks)).astype(np.float16)
        norms.flat[-1] = 0  # a block of zeros
        self.encoded = reference.Encoded(codes, norms)
        self.codes, self.norms = mx.array(packing.pack(codes, spec.bits)), mx.array(norms)
        self.decoder: Decoder = decoder(self.table, spec.block_size, way or ways(self.table)[0])
        table = np.array(self.decoder.values) * np.sqrt(spec.block_size)
        self.rotated = reference.decode_rotated(self.encoded, spec, table)


def assert_product(y: mx.array, x: mx.array, weight: np.ndarray) -> None:
    """y = x @ weight^T within float32 sums and one rounding to y's dtype."""
    expected = float64(x) @ weight.T
    sums = FLOAT32 * (x.shape[-1] + 8) * (np.abs(float64(x)) @ np.abs(weight).T)  # + 8: operations of a decoded value
    assert (np.abs(float64(y) - expected) <= sums + ROUNDING[y.dtype] * np.abs(expected)).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate(block_size: int, dtype: mx.Dtype):
    with metal_cpu.emulated():
        for shape in ((3, 320), (2, 129), (1, 5)):  # whole blocks or not; 5: fewer elements than MLX keeps in device
            x = normal(shape, dtype)
            expected = reference.rotate(float64(x), block_size)
            sums = FLOAT32 * 8 * reference.blocks(np.abs(float64(x)), block_size).sum(-1, keepdims=True)
            bound = np.broadcast_to(sums, (*sums.shape[:-1], block_size)).reshape(expected.shape)
            got = float64(metal.rotate(x, block_size))
            assert (np.abs(got - expected) <= bound / np.sqrt(block_size) + ROUNDING[dtype] * np.abs(expected)).all()


def test_rotate_passes_nan_infinity_and_large_half_values():
    x = np.random.default_rng(0).uniform(-1, 1, (4, 128)).astype(np.float16)
    x[0, 3], x[1, 70] = np.nan, np.inf
    x[2] *= np.float16(30000)  # the sums exceed half inside, the results do not
    with metal_cpu.emulated():
        got = float64(metal.rotate(mx.array(x), 128))
    assert np.isnan(got[0]).all() and np.isinf(got[1]).all()
    expected = reference.rotate(x[2:].astype(np.float64), 128)
    assert (np.abs(got[2:] - expected) <= 2**-11 * np.abs(expected) + 8 * FLOAT32 * 30000 * np.sqrt(128)).all()


def combinations() -> list[tuple[int, int, mx.Dtype, int]]:
    """Every pair of (bits, M), (bits, dtype), (bits, block) and most of the others, without the 270 of all."""
    return [
        (bits, rows, DTYPES[(i + j) % 3], BLOCK_SIZES[(i + 2 * j) % 3])
        for i, bits in enumerate(SUPPORTED_BITS)
        for j, rows in enumerate(ROWS)
    ]


@pytest.mark.parametrize("bits,rows,dtype,block_size", combinations(), ids=str)
def test_gemv(bits: int, rows: int, dtype: mx.Dtype, block_size: int):
    columns = 9 * block_size  # a tail of the 1024 codes (512 at 8 bits) that a simdgroup takes at a time; 19: of 8
    possible = ways(codebook(bits))
    packed = Packed(ModuleSpec(bits, block_size, columns), (19,), possible[rows % len(possible)])
    x = normal((rows, columns), dtype)
    with metal_cpu.emulated():
        assert_product(metal.gemv(x, packed.codes, packed.norms, packed.decoder), x, packed.rotated)


def test_gemv_of_codes_and_norms_with_fewer_than_eight_elements():
    packed, x = Packed(ModuleSpec(2, 32, 32), (3,), seed=1), normal((1, 32), mx.float16)
    assert packed.codes.size < 8 and packed.norms.size < 8  # MLX passes them in constant memory
    with metal_cpu.emulated():
        assert_product(metal.gemv(x, packed.codes, packed.norms, packed.decoder), x, packed.rotated)


@pytest.mark.parametrize("bits,way", [(bits, way) for bits in (2, 4) for way in ways(codebook(bits))], ids=str)
def test_gemv_of_each_way_in_each_order(bits: int, way: Way):
    packed, x = Packed(ModuleSpec(bits, 128, 2176), (13,), way), normal((1, 2176), mx.float16)
    for mode, order in (("check", 0), ("fast", 1), ("fast", 5)):
        with metal_cpu.emulated(mode, order):
            metal._kernel.cache_clear()
            y = metal.gemv(x, packed.codes, packed.norms, packed.decoder)
            assert_product(y, x, packed.rotated)
    metal._kernel.cache_clear()


def test_gemv_of_one_hot_rows_returns_decoded_values():
    packed = Packed(ModuleSpec(4, 128, 256), (9,), Way.POLYNOMIAL)
    x = np.zeros((8, 256), np.float32)
    columns = np.array([0, 1, 7, 31, 128, 200, 254, 255])
    x[np.arange(8), columns] = 1
    with metal_cpu.emulated():
        y = float64(metal.gemv(mx.array(x), packed.codes, packed.norms, packed.decoder))
    expected = packed.rotated[:, columns].T
    assert np.abs(y - expected).max() <= 8 * FLOAT32 * np.abs(expected).max()  # roundings of the polynomial
    assert (y[-1, -1] == 0) and expected[-1, -1] == 0  # the zero block decodes to exact zeros


def test_gemv_passes_nan_and_infinity_to_their_rows_only():
    packed, x = Packed(ModuleSpec(4, 64, 128), (8,)), np.ones((3, 128), np.float16)
    x[1, 5], x[2, 6] = np.nan, np.inf
    with metal_cpu.emulated():
        y = float64(metal.gemv(mx.array(x), packed.codes, packed.norms, packed.decoder))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and not np.isfinite(y[2]).any()


@pytest.mark.parametrize("bits", [4, 5])
def test_gather_product(bits: int):
    packed, experts = Packed(ModuleSpec(bits, 64, 192), (5, 11)), np.array([4, 0, 0, 3, 1, 2])
    with metal_cpu.emulated():
        for rows in (1, 3, 6):  # one row of x for every six, two and one experts
            x = normal((rows, 192), mx.bfloat16, seed=rows)
            rotated = metal.rotate(x, 64)
            y = metal.gather_product(x, packed.codes, packed.norms, mx.array(experts), packed.decoder)
            for i, expert in enumerate(experts):
                assert_product(y[i : i + 1], rotated[i * rows // 6 : i * rows // 6 + 1], packed.rotated[expert])


def assert_within(y: mx.array, exact: np.ndarray, bound: np.ndarray) -> None:
    """y = exact within `bound` and one rounding to y's dtype."""
    assert y.size == exact.size
    got = float64(y).reshape(exact.shape)
    assert (np.abs(got - exact) <= bound + ROUNDING[y.dtype] * (np.abs(exact) + bound)).all()


def rotated_product(values: np.ndarray, dtype: mx.Dtype, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """The product of values that are to be rotated, and its bound where the rotated ones are rounded to `dtype`."""
    rotated = reference.rotate(values, packed.spec.block_size)
    magnitude = np.abs(rotated) @ np.abs(packed.rotated).T
    return rotated @ packed.rotated.T, (FLOAT32 * (values.shape[-1] + 16) + ROUNDING[dtype]) * magnitude


# bits, block, N, K, dtype: tails of N and K, fewer blocks than simdgroups and more, K of fewer than eight values
NORMED = [
    (4, 128, 42, 2200, mx.bfloat16),
    (4, 64, 2, 64, mx.float16),
    (3, 32, 10, 1100, mx.float16),
    (8, 64, 22, 190, mx.bfloat16),
    (5, 128, 6, 7, mx.float32),
]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bits,block_size,outputs,columns,dtype", NORMED, ids=str)
def test_normed_product(bits: int, block_size: int, outputs: int, columns: int, dtype: mx.Dtype, swiglu: bool):
    """Of a norm and of a sum's norm, then SwiGLU or not."""
    packed = Packed(ModuleSpec(bits, block_size, columns), (outputs,))
    x, more, scale = (normal((1, 1, columns), dtype, seed) for seed in range(3))
    for add in (None, more):
        arrays = (x, scale[0, 0], 1e-5, packed.codes, packed.norms, packed.decoder)
        with metal_cpu.emulated():
            y, *total = metal.normed_product(*arrays, add=add, swiglu=swiglu)
        summed = x if add is None else x + add
        assert [mx.array_equal(value, summed).item() for value in total] == [True] * (add is not None)
        values = float64(summed)[0]
        normed = values / np.sqrt((values**2).mean() + 1e-5) * float64(scale)[0]
        exact, bound = rotated_product(normed, dtype, packed)
        if swiglu:
            exact, bound = swiglu_of(exact, bound)
        assert y.shape == (1, 1, exact.shape[-1])
        assert_within(y, exact, bound)


@pytest.mark.parametrize("bits,outputs,dtype", [(4, 37, mx.bfloat16), (6, 5, mx.float16)], ids=str)
def test_residual(bits: int, outputs: int, dtype: mx.Dtype):
    packed, x = Packed(ModuleSpec(bits, 64, 640), (outputs,)), normal((1, 1, 640), dtype)
    residual = normal((1, 1, outputs), dtype, seed=1)
    with metal_cpu.emulated():
        y = metal.product(x, packed.codes, packed.norms, packed.decoder, residual)
    exact, bound = rotated_product(float64(x)[0], dtype, packed)
    assert y.shape == (1, 1, outputs)
    assert_within(y, exact + float64(residual)[0], bound)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "head_dim,dims,dtype", [(128, 128, mx.bfloat16), (96, 64, mx.float16), (64, 64, mx.float32)], ids=str
)
def test_heads(head_dim: int, dims: int, dtype: mx.Dtype, normed: bool):
    """Three heads of q, two of k and v; a rotary embedding of all values or of some."""
    position, eps = 1234, 1e-6
    y = normal((1, 1, 7 * head_dim), dtype)
    scales = (normal((head_dim,), dtype, seed=1), normal((head_dim,), dtype, seed=2)) if normed else None
    inv_freq = 10000.0 ** -np.linspace(0, 1, dims // 2, endpoint=False).astype(np.float32)
    with metal_cpu.emulated():
        found = metal.heads(y, mx.array(position, mx.int32), mx.array(inv_freq), (3, 2), scales, eps)
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
        # the angle, of up to 1234, is rounded to float32
        assert_within(got, expected, np.full(expected.shape, 2 * position * FLOAT32 * np.abs(expected).max()))


# what is wrong, text, replacement, how it must be caught: "WRONG" is by the numbers
FAULTS = [
    (
        "sums of squares are read before all are written",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n  squares",
        "squares",
        "UNINITIALIZED|RACE",
    ),
    ("a barrier of one simdgroup", "threadgroup_barrier(mem", "simdgroup_barrier(mem", "UNINITIALIZED|RACE"),
    ("sums of squares of simdgroups that are not there", "lane < simdgroups_per_threadgroup ?", "true ?", "UNINIT"),
    ("every lane writes its simdgroup's sum", "if (lane == 0) squares_s", "squares_s", "RACE"),
    ("values beyond K are read", "if (k < K) {", "{", "OUT OF BOUNDS"),
    ("gate and other are rows of one half", "r / OUTPUTS * outputs + ", "", "WRONG"),
    ("outputs beyond the last are written", " && row0 + r < outputs", "", "OUT OF BOUNDS"),
]


@pytest.mark.parametrize("what,old,new,finding", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_the_emulator_sees(what: str, old: str, new: str, finding: str):
    changed = []

    def edit(text: str) -> str:
        changed.append(old in text)
        return text.replace(old, new)

    packed = Packed(ModuleSpec(4, 64, 1100), (42,))
    arrays = (normal((1, 1100), mx.float16), normal((1100,), mx.float16, 1), 1e-5, packed.codes, packed.norms)
    with metal_cpu.emulated():
        (expected,) = metal.normed_product(*arrays, packed.decoder, swiglu=True)
    metal._kernel.cache_clear()
    with metal_cpu.emulated(edit=edit):
        try:
            (y,) = metal.normed_product(*arrays, packed.decoder, swiglu=True)
            verdict = "" if mx.array_equal(y, expected) else "WRONG"
        except metal_cpu.EmulationError as caught:
            verdict = str(caught)
    metal._kernel.cache_clear()
    assert any(changed) and re.search(finding, verdict), verdict or "not caught"


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_dequantize(bits: int):
    dtype = DTYPES[bits % 3]
    packed = Packed(ModuleSpec(bits, 32, 96), (7,))
    with metal_cpu.emulated():
        got = float64(metal.dequantize(packed.codes, packed.norms, dtype, packed.decoder))
    assert (np.abs(got - packed.rotated) <= (ROUNDING[dtype] + 8 * FLOAT32) * np.abs(packed.rotated).max()).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_embedding(bits: int):
    block_size, dtype = BLOCK_SIZES[bits % 3], DTYPES[bits % 3]
    spec = ModuleSpec(bits, block_size, 2 * block_size + 12)  # a tail of K
    packed, ids = Packed(spec, (10,)), np.array([9, 0, 0, 4, 7])
    table = mx.array(np.array(packed.table) / np.sqrt(block_size), mx.float32)
    with metal_cpu.emulated():
        got = metal.embedding(mx.array(ids), packed.codes, packed.norms, table, spec.in_features, dtype)
    expected = reference.decode(packed.encoded, spec, packed.table)[ids]
    assert np.abs(float64(got) - expected).max() <= (ROUNDING[dtype] + 16 * FLOAT32) * np.abs(expected).max()


@pytest.mark.parametrize("bits,degree,added", [(2, 3, 0.0), (3, 3, 0.00296), (4, 5, 0.00333)])
def test_polynomial_adds_the_stated_error(bits: int, degree: int, added: float):
    table = codebook(bits)
    fitted = polynomial(table)
    assert fitted.degree == degree
    assert fitted.added_error == pytest.approx(added, abs=1e-5)
    # measured, not derived: the squared error on normal samples grows by that share
    samples = np.random.default_rng(0).standard_normal(200_000)
    codes = reference.nearest(samples.astype(np.float32), bits).astype(int)
    levels = np.arange(len(table)) - (len(table) - 1) / 2
    extra = np.mean((fitted(levels)[codes] - np.array(table)[codes]) ** 2) / expected_error(table)
    assert extra == pytest.approx(added, rel=0.1, abs=1e-6)


def test_tables_without_a_good_polynomial_are_looked_up():
    random = np.random.default_rng(0)
    crooked = tuple(np.sort(random.standard_normal(16)).tolist())
    assert ways(crooked) == (Way.TABLE, Way.PAIRS)
    assert all(ways(codebook(bits)) == (Way.TABLE,) for bits in (5, 6, 8))
    cubic = tuple((np.arange(16) - 7.5) * (0.25 + 0.0018 * (np.arange(16) - 7.5) ** 2))
    assert polynomial(cubic).degree == 3 and polynomial(cubic).added_error < 1e-12
    with pytest.raises(ValueError, match="no polynomial decoder"):
        decoder(crooked, 128, Way.POLYNOMIAL)
