"""The definition of HLWQ in numpy: steps 1 to 5 of docs/format.md, and the judge of every kernel.

The method is the scalar case of HIGGS (Malinovskii et al., arXiv 2411.17525): Hadamard rotation of weight blocks, then
a mean-squared-error-optimal codebook of the normal distribution, with one norm a block.
Letters: N outputs, K inputs, B block, b bits, Kp = K padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from convert.codebook import codebook
from convert.format import ModuleSpec


class Encoded(NamedTuple):
    """One quantized matrix (leading dimensions allowed)."""

    codes: np.ndarray  # uint8 [..., N, Kp], each below 2**bits
    norms: np.ndarray  # float16 [..., N, Kp / B]


@cache
def hadamard(size: int) -> np.ndarray:
    """H_B: the Sylvester Walsh-Hadamard matrix over sqrt(B), float64 [B, B]. Symmetric and its own inverse."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Walsh-Hadamard matrix needs a power of two, got {size}")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(size)
    matrix.setflags(write=False)
    return matrix


def blocks(x: np.ndarray, block_size: int) -> np.ndarray:
    """Step 1: pad the last axis with zeros to whole blocks and cut it: [..., K] -> [..., Kp / B, B]."""
    padding = -x.shape[-1] % block_size
    if padding:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], padding), x.dtype)], axis=-1)
    return x.reshape(*x.shape[:-1], -1, block_size)


def rotate(x: np.ndarray, block_size: int) -> np.ndarray:
    """Steps 1 and 2: every block times H_B, in the dtype of x: float [..., K] -> [..., Kp]."""
    rotated = blocks(x, block_size) @ hadamard(block_size).astype(x.dtype)
    return rotated.reshape(*x.shape[:-1], -1)


def encode(weight: np.ndarray, spec: ModuleSpec) -> Encoded:
    """Step 4, the plain encoder: norm = L2 norm of the block, codes = nearest centroids, a tie to the lower code.

    weight: float32 [..., N, K], finite. Raises ValueError when a value is not finite or a norm exceeds float16.
    """
    rotated = blocks(rotate(weight.astype(np.float32, copy=False), spec.block_size), spec.block_size)
    exact_norms = np.sqrt(np.einsum("...b,...b->...", rotated, rotated))
    norms = to_float16(exact_norms)
    # normalized blocks have unit variance; a zero block has no direction: any code serves, its norm decodes it to zero
    scale = np.sqrt(np.float32(spec.block_size)) / np.where(exact_norms > 0, exact_norms, 1)
    normal = rotated * scale[..., None]
    return Encoded(nearest(normal, spec.bits).reshape(*weight.shape[:-1], -1), norms)


def nearest(normal: np.ndarray, bits: int) -> np.ndarray:
    """The code of the nearest centroid, a tie to the lower: float32 [...] -> uint8 [...]."""
    table = np.array(codebook(bits))
    midpoints = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    return np.searchsorted(midpoints, normal).astype(np.uint8)


def to_float16(norms: np.ndarray) -> np.ndarray:
    """Norms as stored. Raises ValueError for NaN, infinity, or a norm beyond float16's 65504."""
    if not np.isfinite(norms).all():
        raise ValueError("the weight holds NaN or infinity")
    if norms.size and norms.max() > np.finfo(np.float16).max:
        raise ValueError(f"a block has norm {norms.max():.4g}, beyond float16's largest {np.finfo(np.float16).max}")
    return norms.astype(np.float16)


def decode_rotated(encoded: Encoded, spec: ModuleSpec, table: Sequence[float], dtype: type = np.float64) -> np.ndarray:
    """norm * c[code] / sqrt(B), the weight in the rotated basis: [..., N, Kp] of `dtype`."""
    centroids = (np.array(table) / np.sqrt(spec.block_size)).astype(dtype)
    values = blocks(centroids[encoded.codes], spec.block_size) * encoded.norms.astype(dtype)[..., None]
    return values.reshape(encoded.codes.shape)


def decode(encoded: Encoded, spec: ModuleSpec, table: Sequence[float], dtype: type = np.float64) -> np.ndarray:
    """Step 5: the weight that the codes stand for, [..., N, K] of `dtype`."""
    weight = rotate(decode_rotated(encoded, spec, table, dtype), spec.block_size)
    return weight[..., : spec.in_features]


def matmul(x: np.ndarray, encoded: Encoded, spec: ModuleSpec, table: Sequence[float]) -> np.ndarray:
    """y = x W^T as a kernel must compute it: rotate x, never the weight. [..., M, K] -> float64 [..., M, N]."""
    rotated = rotate(x.astype(np.float64), spec.block_size)
    return rotated @ np.swapaxes(decode_rotated(encoded, spec, table), -1, -2)
