"""Codes to values in plain Triton, one element a code: the readable twin of decode.py, for any GPU and the interpreter.

It fetches the word of every code anew, so it is slow; the tests compare the PTX sequences with it, and kernels that
touch few codes (embedding rows) use it as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_entries(codes, table, row, k, inside, ROW_WORDS: tl.constexpr, BITS: tl.constexpr, INT8: tl.constexpr):
    """The centroid of column k of a row (fields: layout.py), float32; `row` and `k` broadcast.

    codes: int32 device layout; row: int64; INT8: the entry as int8 units, with all bits flipped for a negative one
    (tables.py), else the centroid rounded to fp16.
    """
    index, negative = load_codes(codes, row, k, inside, ROW_WORDS, BITS)
    count: tl.constexpr = 1 << BITS if BITS < 4 else 1 << (BITS - 1)
    if INT8:
        entry = tl.load((table + count).to(tl.pointer_type(tl.int8)) + index, mask=inside, other=0).to(tl.int32)
        return tl.where(negative, ~entry, entry).to(tl.float32)
    value = tl.load(table.to(tl.pointer_type(tl.float16)) + index, mask=inside, other=0.0).to(tl.float32)
    return tl.where(negative, -value, value)


@triton.jit
def load_codes(codes, row, k, inside, ROW_WORDS: tl.constexpr, BITS: tl.constexpr):
    """The table index of column k, and whether the entry counts negative."""
    first = codes + row * ROW_WORDS
    chunk = k // 32
    h = k // 16 % 2
    i = k // 4 % 4
    j = k % 4
    nibble = 4 * (4 * h + j)
    chunks: tl.constexpr = ROW_WORDS // BITS
    if BITS == 2:
        index = _bits(first + chunk * 2 + i // 2, nibble + 2 * (i % 2), 2, inside)
        negative = index < 0
    elif BITS == 3:
        index = _bits(first + chunk * 2 + i // 2, nibble + 2 * (i % 2), 2, inside)
        index += _bits(first + chunks * 2 + chunk, nibble + i, 1, inside) * 4
        negative = index < 0
    elif BITS == 4:
        index = _bits(first + chunk * 4 + i, nibble, 3, inside)
        negative = _bits(first + chunk * 4 + i, 8 * j + 7 - 4 * h, 1, inside) > 0
    elif BITS == 5:
        index = _bits(first + chunk * 4 + i, nibble, 4, inside)
        negative = _bits(first + chunks * 4 + chunk, 8 * j + 7 - (2 * i + h), 1, inside) > 0
    elif BITS == 6:
        second = first + chunks * 4 + chunk * 2
        c = k % 32
        word = tl.where(c < 24, first + chunk * 4 + c // 6, second)
        index = _bits(word, 5 * (c % 6), 5, inside & (c < 30))
        for bit in tl.static_range(5):  # the last two codes: two spare bits of every word
            at = 5 * (c - 30) + bit
            spare = tl.where(at < 8, first + chunk * 4 + at // 2, second)
            index += _bits(spare, 30 + at % 2, 1, inside & (c >= 30)) << bit
        negative = _bits(second + 1, 15 + 16 * (c % 2) - c // 2, 1, inside) > 0
    else:
        byte = _bits(first + k // 4, 8 * j, 8, inside)
        index = byte & 127
        negative = byte > 127
    return index, negative


@triton.jit
def _bits(word, at, width: tl.constexpr, inside):
    """`width` bits of the word at a pointer, from bit `at` up; 0 outside."""
    return (tl.load(word, mask=inside, other=0) >> at) & ((1 << width) - 1)
