"""encoders.py: the fast plain encoder gives reference.encode's codes and norms."""

from __future__ import annotations

import numpy as np
import pytest

from convert import encoders
from convert.codebook import codebook
from convert.encoders import encode_plain
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, ModuleSpec
from convert.reference import blocks, encode, rotate

# float32 rotation: a value within this of a midpoint may fall on either side, depending on the order of the sum
NEAR = 128 * 2**-24 * 6


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(1, 128), (300, 200), (3, 40, 96), (2000, 256)])
def test_same_as_the_reference(bits: int, block: int, shape: tuple[int, ...]):
    weight = np.random.default_rng(bits).standard_normal(shape, dtype=np.float32)
    weight[0] = 0
    spec = ModuleSpec(bits, block, shape[-1])
    fast, plain = encode_plain(weight, spec), encode(weight, spec)
    assert fast.codes.shape == plain.codes.shape and fast.codes.dtype == np.uint8
    assert np.abs(fast.norms.view(np.int16) - plain.norms.view(np.int16)).max() <= 1  # float16 steps
    different = fast.codes != plain.codes
    if different.any():
        rotated = blocks(rotate(weight.astype(np.float64), block), block)
        norms = np.linalg.norm(rotated, axis=-1, keepdims=True)
        normal = (rotated * np.sqrt(block) / np.where(norms > 0, norms, 1)).reshape(plain.codes.shape)[different]
        table = np.array(codebook(bits))
        midpoints = (table[1:] + table[:-1]) / 2
        assert np.abs(normal[:, None] - midpoints).min(axis=1).max() < NEAR
        assert different.mean() < 1e-4


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    weight = np.random.default_rng(0).standard_normal((50, 192), dtype=np.float32)
    spec = ModuleSpec(4, 64, 192)
    whole = encode_plain(weight, spec)
    monkeypatch.setattr(encoders, "CHUNK", 7 * 64)
    pieces = encode_plain(weight, spec)
    assert np.array_equal(whole.norms, pieces.norms) and (whole.codes != pieces.codes).mean() < 1e-3


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e5])
def test_what_the_reference_refuses_is_refused(poison: float):
    weight = np.ones((400, 512), np.float32)
    weight[399] = poison
    with pytest.raises(ValueError, match=r"NaN or infinity|beyond float16"):
        encode_plain(weight, ModuleSpec(4, 128, 512))
