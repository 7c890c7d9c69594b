"""reference.py: steps 1 to 5 of docs/format.md, each checked against its own statement in float64."""

from __future__ import annotations

import numpy as np
import pytest

from convert.codebook import codebook
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec
from convert.reference import Encoded, blocks, decode, encode, hadamard, matmul, nearest, rotate, to_float16


def random_weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 256])
def test_hadamard_is_symmetric_and_its_own_inverse(size: int):
    matrix = hadamard(size)
    assert np.array_equal(matrix, matrix.T)
    assert np.abs(matrix @ matrix - np.eye(size)).max() < size * 2**-52
    assert np.allclose(np.abs(matrix), size**-0.5, rtol=1e-15)


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_hadamard_is_in_sylvester_order(size: int):
    """The sign of entry (i, j) is the parity of the bits that i and j share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    assert np.array_equal(np.sign(hadamard(size)), signs)


@pytest.mark.parametrize("size", [0, 3, 96, -2])
def test_hadamard_needs_a_power_of_two(size: int):
    with pytest.raises(ValueError, match="power of two"):
        hadamard(size)


def test_blocks_pads_with_zeros():
    x = random_weight(3, 5, 200)
    cut = blocks(x, 128)
    assert cut.shape == (3, 5, 2, 128)
    assert np.array_equal(cut.reshape(3, 5, 256)[..., :200], x) and not cut[..., 1, 72:].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rotate_is_the_matrix_product_in_the_dtype_of_x(dtype: type):
    x = random_weight(4, 192).astype(dtype)
    rotated = rotate(x, 64)
    assert rotated.dtype == dtype
    expected = x.astype(np.float64).reshape(4, 3, 64) @ hadamard(64)
    tolerance = 64 * np.finfo(dtype).eps * np.abs(x).max()  # a sum of 64 products, each rounded
    assert np.abs(rotated.reshape(4, 3, 64) - expected).max() < tolerance


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_nearest_is_the_nearest_centroid(bits: int):
    normal = random_weight(500) * 1.5
    distances = np.abs(normal[:, None].astype(np.float64) - np.array(codebook(bits)))
    found = distances[np.arange(500), nearest(normal, bits)]
    assert (found - distances.min(axis=1)).max() < 2**-22  # midpoints are rounded to float32, at most 4 of them


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_tie_takes_the_lower_code(bits: int):
    table = np.array(codebook(bits))
    midpoints = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    codes = np.arange(len(midpoints))
    assert np.array_equal(nearest(midpoints, bits), codes)
    assert np.array_equal(nearest(np.nextafter(midpoints, np.float32(9)), bits), codes + 1)
    assert np.array_equal(nearest(np.nextafter(midpoints, np.float32(-9)), bits), codes)


def test_nearest_saturates():
    assert nearest(np.float32([-1e30, 1e30]), 4).tolist() == [0, 15]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("in_features", [128, 200, 31])
def test_encode_stores_the_l2_norm_and_nearest_codes(bits: int, block: int, in_features: int):
    weight = random_weight(6, in_features)
    spec = ModuleSpec(bits, block, in_features)
    encoded = encode(weight, spec)
    assert (encoded.codes.dtype, encoded.norms.dtype) == (np.uint8, np.float16)
    assert encoded.codes.shape == (6, spec.padded_in_features) and encoded.norms.shape == (6, spec.blocks)
    exact = np.linalg.norm(blocks(weight.astype(np.float64), block), axis=-1)
    assert np.abs(encoded.norms / exact - 1).max() < 2**-11 + 2**-20  # rounded to float16 once
    normal = blocks(weight.astype(np.float64), block) @ hadamard(block) * (np.sqrt(block) / exact)[..., None]
    distances = np.abs(normal[..., None] - np.array(codebook(bits)))
    chosen = np.take_along_axis(distances, blocks(encoded.codes, block)[..., None].astype(int), -1)[..., 0]
    assert (chosen - distances.min(axis=-1)).max() < 1e-5  # values are float32 sums of up to 128 products


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_relative_error_of_normal_weights(bits: int, block: int):
    """A block over its norm is uniform on a sphere: one coordinate times sqrt(B) has density (1 - z^2/B)^((B-3)/2)."""
    weight = random_weight(512, 512, seed=bits)
    spec = ModuleSpec(bits, block, 512)
    error = np.square(decode(encode(weight, spec), spec, codebook(bits)) - weight).sum() / np.square(weight).sum()
    z = np.linspace(-np.sqrt(block), np.sqrt(block), 200_001)
    density = (1 - z * z / block).clip(0) ** ((block - 3) / 2)
    table = np.array(codebook(bits))
    squared = np.square(z - table[nearest(z.astype(np.float32), bits)])
    expected = (density * squared).sum() / density.sum()
    # five standard errors of the mean of 2**18 values whose squared error varies by up to 3 times its mean
    assert error == pytest.approx(expected, rel=5 * 3 / 2**9)


def test_leading_dimensions_are_independent():
    weight = random_weight(3, 2, 5, 96)
    spec = ModuleSpec(4, 32, 96)
    whole = encode(weight, spec)
    table = codebook(4)
    for index in np.ndindex(3, 2):
        part = encode(weight[index], spec)
        assert np.array_equal(whole.codes[index], part.codes) and np.array_equal(whole.norms[index], part.norms)
        assert np.array_equal(decode(whole, spec, table)[index], decode(part, spec, table))


def test_a_zero_block_decodes_to_exact_zeros():
    weight = random_weight(4, 256)
    weight[1, 128:] = 0
    weight[2] = 0
    spec = ModuleSpec(4, 128, 256)
    encoded = encode(weight, spec)
    decoded = decode(encoded, spec, codebook(4))
    assert encoded.norms[1, 1] == 0 and not encoded.norms[2].any()
    assert not decoded[1, 128:].any() and not decoded[2].any() and decoded[1, :128].all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_constant_block_has_one_nonzero_rotated_value(sign: int):
    """All energy in one value of sqrt(B) standard deviations: it saturates, the others take the code below zero."""
    spec = ModuleSpec(4, 128, 128)
    encoded = encode(np.full((1, 128), sign * 0.25, np.float32), spec)
    assert encoded.norms[0, 0] == np.float16(0.25 * np.sqrt(128))
    assert encoded.codes[0, 0] == (15 if sign > 0 else 0)
    assert set(encoded.codes[0, 1:].tolist()) <= {7, 8}  # exact zeros give 7, rounding noise may give 8


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(poison: float):
    weight = random_weight(4, 256)
    weight[3, 200] = poison
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode(weight, ModuleSpec(4, 128, 256))


def test_a_norm_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="beyond float16"):
        encode(np.full((1, 128), 1e5, np.float32), ModuleSpec(4, 128, 128))
    assert to_float16(np.float32([65504])) == np.float16(65504)


@pytest.mark.parametrize(("rows", "in_features", "block"), [(1, 128, 128), (7, 200, 128), (33, 96, 32), (2, 31, 64)])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_matmul_equals_the_product_with_the_decoded_weight(rows: int, in_features: int, block: int, bits: int):
    spec = ModuleSpec(bits, block, in_features)
    encoded = encode(random_weight(11, in_features), spec)
    x = random_weight(rows, in_features, seed=1)
    expected = x.astype(np.float64) @ decode(encoded, spec, codebook(bits)).T
    found = matmul(x, encoded, spec, codebook(bits))
    bound = in_features * 2**-50 * (np.abs(x) @ np.abs(decode(encoded, spec, codebook(bits))).T)  # float64 sums
    assert found.dtype == np.float64 and (np.abs(found - expected) <= bound + 1e-14).all()


def test_one_hot_rotated_rows_return_the_stored_values():
    """With x = H e_i the product is column i of the rotated weight: norm * c[code] / sqrt(B)."""
    spec = ModuleSpec(3, 64, 64)
    encoded = encode(random_weight(5, 64), spec)
    expected = encoded.norms.astype(np.float64) * np.array(codebook(3))[encoded.codes] / 8
    assert np.abs(matmul(hadamard(64), encoded, spec, codebook(3)).T - expected).max() < 64 * 2**-52


def test_decode_crops_the_padding():
    spec = ModuleSpec(4, 128, 200)
    codes = np.random.default_rng(0).integers(0, 16, (2, 256), dtype=np.uint8)
    assert decode(Encoded(codes, np.ones((2, 2), np.float16)), spec, codebook(4)).shape == (2, 200)
