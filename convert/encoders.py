"""Encoders by name: `(weight float32 [..., N, K], spec, power) -> Encoded`; only `search` looks at the power."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from convert import search
from convert.codebook import codebook
from convert.format import ModuleSpec
from convert.reference import Encoded, blocks, hadamard, to_float16

Encoder = Callable[[np.ndarray, ModuleSpec, float], Encoded]

CHUNK = 2**17  # weights at a time: the working set (float32 in, rotated, masks) fits a 2 MB second-level cache


def encode_plain(weight: np.ndarray, spec: ModuleSpec, power: float = 0.0) -> Encoded:
    """reference.encode, cut into pieces that stay in the cache.

    A code is the number of midpoints below the value: one comparison and one addition of bytes a midpoint is three
    times faster than a binary search at 4 bits and twice at 8, because both run on whole vector registers.
    """
    rows = blocks(weight, spec.block_size).reshape(-1, spec.block_size)  # one block a row
    codes = np.empty(rows.shape, np.uint8)
    norms = np.empty(len(rows), np.float16)
    step = max(CHUNK // spec.block_size, 1)
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        norms[piece] = _encode_blocks(rows[piece], spec.bits, codes[piece])
    return Encoded(codes.reshape(*weight.shape[:-1], -1), norms.reshape(*weight.shape[:-1], -1))


def _encode_blocks(rows: np.ndarray, bits: int, codes: np.ndarray) -> np.ndarray:
    """Encode blocks [n, B] into `codes` [n, B]; returns their norms, float16 [n]."""
    rotated = rows @ _rotation(rows.shape[1])
    exact_norms = np.sqrt(np.einsum("nb,nb->n", rotated, rotated))
    norms = to_float16(exact_norms)
    rotated *= (np.sqrt(np.float32(rows.shape[1])) / np.where(exact_norms > 0, exact_norms, 1))[:, None]
    above = np.empty(rows.shape, np.bool_)
    codes.fill(0)
    for midpoint in _midpoints(bits):
        np.greater(rotated, midpoint, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return norms


@cache
def _rotation(block_size: int) -> np.ndarray:
    return hadamard(block_size).astype(np.float32)


@cache
def _midpoints(bits: int) -> np.ndarray:
    table = np.array(codebook(bits))
    return ((table[1:] + table[:-1]) / 2).astype(np.float32)


ENCODERS: dict[str, Encoder] = {"plain": encode_plain, "search": search.encode}
DEFAULT_ENCODER = "search"
