"""packing.py: golden bytes for every width, and numpy's own bit packing as a second opinion."""

from __future__ import annotations

import numpy as np
import pytest

from convert.format import SUPPORTED_BITS
from convert.packing import pack, unpack

# codes (3 i + 1) mod 2**bits for i = 0..31, as sum(code << i * bits) of Python integers
GOLDEN = {
    2: "0xb1b1b1b1 0xb1b1b1b1",
    3: "0xe1cc55e1 0x55e1cc55 0xcc55e1cc",
    4: "0x630da741 0xeb852fc9 0x630da741 0xeb852fc9",
    5: "0xe0d51c81 0x517f99b4 0x5e9172d0 0x8930c1dd 0xf6f1593d",
    6: "0x0d287101 0xf7195934 0xbaba2589 0x3deb7d31 0xf3091830 0x79b61548",
    8: "0x0a070401 0x1613100d 0x221f1c19 0x2e2b2825 0x3a373431 0x4643403d 0x524f4c49 0x5e5b5855",
}


def codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_golden_words(bits: int):
    pattern = ((3 * np.arange(32) + 1) % 2**bits).astype(np.uint8)
    assert " ".join(f"0x{word:08x}" for word in pack(pattern, bits)) == GOLDEN[bits]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 96), (1, 416)])
def test_numpy_packs_the_same_stream(bits: int, shape: tuple[int, ...]):
    source = codes(bits, shape)
    stream = np.unpackbits(source[..., None], axis=-1, bitorder="little")[..., :bits].reshape(*shape[:-1], -1)
    expected = np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
    assert np.array_equal(pack(source, bits), expected)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_code_i_is_bits_i_times_b_of_the_row(bits: int):
    source = codes(bits, (2, 128))
    for row, words in zip(source, pack(source, bits), strict=True):
        stream = int.from_bytes(words.tobytes(), "little")
        assert [stream >> i * bits & (1 << bits) - 1 for i in range(128)] == row.tolist()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("shape", [(32,), (7, 160), (2, 3, 4, 64), (0, 32)])
def test_unpack_undoes_pack(bits: int, shape: tuple[int, ...]):
    source = codes(bits, shape)
    assert np.array_equal(unpack(pack(source, bits), bits), source)


def test_strided_codes_are_packed_like_their_copy():
    source = codes(5, (64, 6)).T
    assert np.array_equal(pack(source, 5), pack(np.ascontiguousarray(source), 5))
    words = pack(codes(3, (8, 64)), 3)[::2]
    assert np.array_equal(unpack(words, 3), unpack(words.copy(), 3))


def test_a_block_of_k_is_a_slice_of_words():
    source = codes(3, (4, 128))
    assert np.array_equal(pack(source, 3)[:, 3:9], pack(source[:, 32:96], 3))


@pytest.mark.parametrize("bad", [np.zeros((2, 33), np.uint8), np.zeros((2, 32), np.int32)])
def test_pack_refuses_other_arrays(bad: np.ndarray):
    with pytest.raises(ValueError, match="codes must be uint8"):
        pack(bad, 4)


@pytest.mark.parametrize("bad", [np.zeros((2, 4), np.uint32), np.zeros((2, 3), np.int64)])
def test_unpack_refuses_other_arrays(bad: np.ndarray):
    with pytest.raises(ValueError, match="words must be uint32"):
        unpack(bad, 3)
