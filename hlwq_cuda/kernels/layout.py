"""The device layout: where every bit of a code lies in memory while a model runs (plain torch, any device).

Format 1 stores the codes of a row as a bit stream, which is good on disk and poor in a kernel. The device layout has
the same shape and the same number of words, and is made from format 1 when a model is loaded; the inverse is exact.

A row of Kp codes is cut into chunks of 32. One lane of a warp decodes one chunk. The words of a chunk lie in one or two
*planes*; a row holds the first plane of all chunks, then the second, so that a lane loads each plane of its chunk by
one access of 4, 8 or 16 bytes and neighboring lanes load neighboring bytes:

    bits   words of a chunk   first plane                           second plane
    2      2                  two-bit codes
    3      2 + 1              low two bits of the code              high bit
    4      4                  3-bit magnitude and sign
    5      4 + 1              4-bit magnitude                       sign
    6      4 + 2              5-bit magnitudes (24 of 32)           5-bit magnitudes (8 of 32), signs
    8      8                  7-bit magnitude and sign

Order inside a chunk: code k = 16 h + 4 i + j is byte j of the h-th group of word i, so that the four codes which one
`prmt` instruction decodes to a word of int8 are neighbors in K, and so are the pairs of a half2. A tensor-core fragment
(mma m16n8k32 and m16n8k16) takes the same words: there a permutation of K is free when both operands share it.

At 4 bits and more a code is kept as sign and magnitude: codebooks are symmetric, which halves the table. The sign of
byte j of group h = 0 lies in bit 8 j + 7, where the sign of a decoded high byte goes: one lop3 for four codes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

CHUNK = 32  # codes a lane decodes at a time
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # words a chunk, for each plane
SIGNED_BITS = 4  # from this width on a code is stored as sign and magnitude
_SLICE_CODES = 1 << 24  # codes converted at a time: bounds the temporary memory
CONVERSION_BYTES = 16 * _SLICE_CODES  # that memory: 1.05 GB were measured for 2**26 codes


class Field(NamedTuple):
    """`width` bits of code `k` of a chunk, from bit `shift` of the code up, lie at bit `bit` of word `word`."""

    k: int
    shift: int
    width: int
    word: int
    bit: int


@cache
def fields(bits: int) -> tuple[Field, ...]:
    """Where every bit of a chunk's codes lies; words are numbered through the planes."""
    return tuple(field for k in range(CHUNK) for field in _FIELDS_OF[bits](k))


def to_device_layout(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Format 1 words (uint32 or int32 [..., Kp * bits / 32]) -> device layout, int32 of the same shape."""
    return _convert(words, bits, lambda part: pack_codes(_unpack_stream(part, bits), bits))


def to_format_1(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `to_device_layout`, bit for bit; int32 (view it as uint32 to save it)."""
    return _convert(words, bits, lambda part: _pack_stream(unpack_codes(part, bits), bits))


def unpack_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Device layout int32 [..., Kp * bits / 32] -> codes of format 1, uint8 [..., Kp]."""
    columns = _chunk_words(words, bits)
    codes = torch.zeros((*columns[0].shape, CHUNK), dtype=torch.uint8, device=words.device)
    for k, shift, width, word, bit in fields(bits):
        codes[..., k] |= (((columns[word] >> bit) & ((1 << width) - 1)) << shift).to(torch.uint8)
    return _flip_signs(codes, bits, _SIGN_SET).flatten(-2)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_codes`."""
    chunks = _flip_signs(codes.unflatten(-1, (-1, CHUNK)), bits, _SIGN_CLEAR)
    packed: list = [0] * sum(PLANES[bits])
    for k, shift, width, word, bit in fields(bits):
        packed[word] |= ((chunks[..., k] >> shift) & ((1 << width) - 1)).to(torch.int32) << bit
    planes, first = [], 0
    for size in PLANES[bits]:
        planes.append(torch.stack(packed[first : first + size], -1).flatten(-2))
        first += size
    return torch.cat(planes, -1)


def _convert(words: torch.Tensor, bits: int, function) -> torch.Tensor:
    """`function` over slices of rows: the unpacked codes of a large matrix never lie in memory at once."""
    rows = words.view(torch.int32).reshape(-1, words.shape[-1])
    out = torch.empty_like(rows)
    step = max(1, _SLICE_CODES * bits // (32 * max(1, words.shape[-1])))
    for first in range(0, len(rows), step):
        out[first : first + step] = function(rows[first : first + step])
    return out.view(words.shape)


def _chunk_words(words: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The words of every chunk, [..., chunks] each, numbered through the planes."""
    chunks = words.shape[-1] // bits
    columns, first = [], 0
    for size in PLANES[bits]:
        plane = words[..., first : first + size * chunks].unflatten(-1, (chunks, size))
        columns += plane.unbind(-1)
        first += size * chunks
    return columns


_SIGN_CLEAR, _SIGN_SET = 0, 1


def _flip_signs(codes: torch.Tensor, bits: int, direction: int) -> torch.Tensor:
    """Ascending code <-> sign (top bit, set for negative centroids) and magnitude; narrow codes stay as they are."""
    if bits < SIGNED_BITS:
        return codes
    half = 1 << (bits - 1)
    negative = (codes >= half) if direction == _SIGN_SET else (codes < half)
    return codes ^ torch.where(negative, 2 * half - 1, half).to(torch.uint8)


def _unpack_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Format 1 int32 words [..., W] -> uint8 codes [..., W * 32 / bits]; eight codes fill `bits` bytes."""
    stream = words.contiguous().view(torch.uint8).unflatten(-1, (-1, bits))
    codes = []
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        code = stream[..., byte] >> offset
        if offset + bits > 8:
            code = code | stream[..., byte + 1] << (8 - offset)
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, -1).flatten(-2)


def _pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_unpack_stream`."""
    groups = codes.unflatten(-1, (-1, 8))
    stream: list = [0] * bits
    for i in range(8):
        byte, offset = divmod(i * bits, 8)
        stream[byte] = stream[byte] | groups[..., i] << offset
        if offset + bits > 8:
            stream[byte + 1] = stream[byte + 1] | groups[..., i] >> (8 - offset)
    return torch.stack(stream, -1).flatten(-2).contiguous().view(torch.int32)


def _place(k: int) -> tuple[int, int, int]:
    """k = 16 h + 4 i + j -> (h, i, j)."""
    return k // 16, k // 4 % 4, k % 4


def _fields_2(k: int) -> list[Field]:
    h, i, j = _place(k)
    return [Field(k, 0, 2, i // 2, 4 * (4 * h + j) + 2 * (i % 2))]


def _fields_3(k: int) -> list[Field]:
    h, i, j = _place(k)
    nibble = 4 * (4 * h + j)
    return [Field(k, 0, 2, i // 2, nibble + 2 * (i % 2)), Field(k, 2, 1, 2, nibble + i)]


def _fields_4(k: int) -> list[Field]:
    h, i, j = _place(k)
    return [Field(k, 0, 3, i, 4 * (4 * h + j)), Field(k, 3, 1, i, 8 * j + (3 if h else 7))]


def _fields_5(k: int) -> list[Field]:
    h, i, j = _place(k)
    return [Field(k, 0, 4, i, 4 * (4 * h + j)), Field(k, 4, 1, 4, 8 * j + 7 - (2 * i + h))]


def _fields_6(k: int) -> list[Field]:
    """Six magnitudes of 5 bits a word; the last two codes take the words' top two bits. Signs of a pair: half2."""
    sign = Field(k, 5, 1, 5, (31 if k % 2 else 15) - k // 2)
    if k < 30:
        return [Field(k, 0, 5, k // 6, 5 * (k % 6)), sign]
    spare = [5 * (k - 30) + bit for bit in range(5)]  # bits of the ten spare ones, two a word
    return [*(Field(k, bit, 1, at // 2, 30 + at % 2) for bit, at in enumerate(spare)), sign]


def _fields_8(k: int) -> list[Field]:
    return [Field(k, 0, 8, k // 4, 8 * (k % 4))]


_FIELDS_OF = {2: _fields_2, 3: _fields_3, 4: _fields_4, 5: _fields_5, 6: _fields_6, 8: _fields_8}
