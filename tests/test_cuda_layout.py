"""The device layout holds every bit once, keeps the order that its docstring promises, and converts back exactly."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert.codebook import codebook, expected_error  # noqa: E402
from convert.format import SUPPORTED_BITS  # noqa: E402
from convert.packing import pack  # noqa: E402
from hlwq_cuda.kernels import layout, tables  # noqa: E402


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_bit_of_a_chunk_is_used_once(bits: int):
    places = [(f.word, f.bit + i) for f in layout.fields(bits) for i in range(f.width)]
    sources = [(f.k, f.shift + i) for f in layout.fields(bits) for i in range(f.width)]
    assert sorted(places) == [(word, bit) for word in range(sum(layout.PLANES[bits])) for bit in range(32)]
    assert sorted(sources) == [(k, bit) for k in range(32) for bit in range(bits)]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("columns", [32, 96, 256])
def test_conversion_from_format_1_and_back(bits: int, columns: int):
    codes = random_codes(bits, 7, columns)
    words = torch.from_numpy(pack(codes, bits))
    device = layout.to_device_layout(words, bits)
    assert device.dtype == torch.int32 and device.shape == words.shape
    assert np.array_equal(layout.unpack_codes(device, bits).numpy(), codes)
    assert torch.equal(layout.to_format_1(device, bits), words.view(torch.int32))


def test_conversion_in_slices_equals_conversion_at_once(monkeypatch):
    words = torch.from_numpy(pack(random_codes(4, 33, 64).reshape(3, 11, 64), 4))
    at_once = layout.to_device_layout(words, 4)
    monkeypatch.setattr(layout, "_SLICE_CODES", 64 * 5)
    assert torch.equal(layout.to_device_layout(words, 4), at_once)
    assert torch.equal(layout.to_format_1(at_once, 4), words.view(torch.int32))


def test_four_bit_words_are_as_documented():
    code = np.full((1, 32), 8, np.uint8)  # code 8 is magnitude 0, positive: an all-zero word
    code[0, 16 + 4 * 2 + 3] = 15  # h = 1, i = 2, j = 3: magnitude 7, positive
    code[0, 4 * 2 + 1] = 5  # h = 0, i = 2, j = 1: magnitude 2, negative
    words = layout.to_device_layout(torch.from_numpy(pack(code, 4)), 4)
    assert words.tolist() == [[0, 0, 7 << 28 | 2 << 4 | 1 << 15, 0]]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_table_holds_the_codebook_in_fp16(bits: int):
    table = tables.make_table(codebook(bits), bits)
    exact = tables.float_entries(table, bits, "exact")
    assert torch.equal(exact, torch.tensor(codebook(bits)).to(torch.float16).float())
    count = tables.entries(bits)
    halves = table[: count // 2].view(torch.int16)
    low = table[count // 2 : 3 * count // 4].view(torch.uint8).int()
    high = table[3 * count // 4 : count].view(torch.uint8).int()
    assert torch.equal(halves.int() & 0xFFFF, low | high << 8)


@pytest.mark.parametrize(("bits", "added"), [(2, 1e-4), (3, 1e-4), (4, 1.5e-3), (5, 1e-2)])
def test_int8_entries_add_little_error(bits: int, added: float):
    """The bounds are the measured share of the quantizer's own error, rounded up."""
    centroids = np.array(codebook(bits))
    rounded = tables.float_entries(tables.make_table(codebook(bits), bits), bits, "int8").double().numpy()
    edges = torch.from_numpy((centroids[1:] + centroids[:-1]) / 2)
    mass = np.diff(np.concatenate([[0], torch.special.ndtr(edges).numpy(), [1]]))
    error = (mass * (rounded - centroids) ** 2).sum()
    assert 0 < error < added * expected_error(codebook(bits))


def test_asymmetric_codebook_is_refused():
    values = list(codebook(4))
    values[3] += 0.01
    with pytest.raises(ValueError, match="4-bit codebook is not 16 values symmetric about zero"):
        tables.make_table(values, 4)
