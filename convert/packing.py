"""Codes to the little-endian bit stream of format 1 and back: code i of a row is bits [i*b, (i+1)*b) of the row.

Eight codes fill `bits` bytes. Both directions treat eight one-byte codes as a 64-bit lane and halve (or double)
the distance between fields in three steps, so a whole array takes three passes of word arithmetic. Before that, packing
joins neighbors while two of them fit a byte, which is all that 2 and 4 bits need.
"""

from __future__ import annotations

import sys

import numpy as np

if sys.byteorder != "little":
    raise ImportError("convert.packing needs a little-endian machine: the format is a little-endian bit stream")

# (mask of the lower fields, field width in bits) of each merging step: 8 -> 16 -> 32 -> 64 bits
_STEPS = ((0x00FF00FF00FF00FF, 8), (0x0000FFFF0000FFFF, 16), (0x00000000FFFFFFFF, 32))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., K], K a multiple of 32, each below 2**bits -> uint32 words [..., K * bits / 32].

    (8 bits need no packing: the words may share memory with `codes`.)
    """
    if codes.dtype != np.uint8 or codes.shape[-1] % 32:
        raise ValueError(f"codes must be uint8 with a last axis of whole 32s, got {codes.dtype} {codes.shape}")
    shape = (*codes.shape[:-1], codes.shape[-1] * bits // 32)
    codes = np.ascontiguousarray(codes)
    while bits <= 4:  # two fields of a byte each become one of twice the width; the upper byte is dropped
        pairs = codes.view(np.uint16)
        codes, bits = (pairs | pairs >> np.uint16(8 - bits)).astype(np.uint8), 2 * bits
    if bits == 8:
        return codes.view(np.uint32).reshape(shape)
    lanes = codes.view(np.uint64)
    for step, (low, width) in enumerate(_STEPS):
        used = bits << step  # bits of a field that carry codes
        lanes = (lanes & np.uint64(low)) | ((lanes >> np.uint64(width)) & np.uint64(low)) << np.uint64(used)
    stream = np.ascontiguousarray(lanes[..., None].view(np.uint8)[..., :bits])
    return stream.reshape(-1).view(np.uint32).reshape(shape)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words [..., W], whole blocks of 32 codes a row -> uint8 codes [..., W * 32 / bits]."""
    if words.dtype != np.uint32 or words.shape[-1] % bits:
        raise ValueError(f"words must be uint32 with a last axis of whole {bits}s, got {words.dtype} {words.shape}")
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], words.shape[-1] * 4 // bits, bits)
    lanes = np.zeros((*stream.shape[:-1], 8), np.uint8)
    lanes[..., :bits] = stream
    lanes = lanes.view(np.uint64)[..., 0]
    for step, (low, width) in reversed(tuple(enumerate(_STEPS))):
        used = bits << step
        field = np.uint64(low // ((1 << width) - 1) * ((1 << used) - 1))  # `used` ones at the bottom of every field
        lanes = (lanes & field) | ((lanes >> np.uint64(used)) & field) << np.uint64(width)
    return lanes.view(np.uint8)
