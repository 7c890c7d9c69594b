"""The `search` encoder: better norms, and codes whose errors fall where inputs are small. No data, same format.

Norms. The plain encoder (reference.encode) stores the L2 norm, which is right on average but not for the 32 to 128
values of one block. Here a grid of norms is tried, the best one is refined by least squares, and the codes are taken
for the norm as float16 stores it. The idea is old (llama.cpp's quantizers search their scales like this); at blocks of
128 it cuts the squared error of normal weights by 7 % at 3 bits, 16.5 % at 4 and 23 % at 5.

Trying a norm needs only each block's <|z|, c> and <c, c>, with c the centroid of every |z| (the tables are
symmetric): the best multiple of c leaves the error |z|^2 - <|z|, c>^2 / <c, c>. Magnitudes are binned once by their
logarithm, where dividing by a norm is a shift, so each point of the grid is one table lookup and two sums. The bins
are 0.1 % wide: a value so close to a cell edge is coded equally well on either side. The final codes are exact.

Codes. The rotation spreads a block's rounding error evenly over its inputs, but inputs are not alike: a matrix that
reads the residual stream has small weights where the stream is large, as if every column was to contribute the same.
So an input is taken to matter as a power of its column's size (`power`, plan.py says which), and the error is shaped:
values of a block are rounded one after the other, and each error is pushed to those still free, as GPTQ does (Frantar
et al., arXiv 2210.17323), only that the second moment is a guess from the weights, diagonal before the rotation and so
confined to the block after it. The squared error of the weights grows by 2 %, the KL divergence falls by a third
(docs/quality.md). search_torch.py is the same for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from convert.codebook import codebook
from convert.format import ModuleSpec
from convert.reference import Encoded, blocks, hadamard, nearest, rotate, to_float16

CHUNK = 1 << 15  # weights at a time in the search for norms: the working arrays stay in a 1 MB cache
GROUP_WEIGHTS = (
    1 << 20
)  # weights whose rows are encoded together, with one guess about their columns; long columns are fast
COLUMNS = 16  # values rounded between two updates of the rest of their block
FLOOR = 1e-3  # smallest mean square of a column, of the mean over its block
BINS_PER_E = 1024  # bins of magnitude for every factor e
SMALLEST = 2.0**-12  # of the block's root mean square; below it every table gives its innermost centroid
GRID_STEP = 0.03  # ratio of two neighboring norms of the grid, less 1
GRID_LOW, GRID_HIGH = 0.65, 1.36  # of the L2 norm; 99 % of normal blocks have their best norm inside, at every b
REFINEMENTS = 2  # rounds of codes -> least-squares norm -> codes


def encode(weight: np.ndarray, spec: ModuleSpec, power: float = 0.0) -> Encoded:
    """Norms of least squared error (to the grid's resolution), and codes; a drop-in for reference.encode.

    weight: float32 [..., N, K], finite. power: an input matters as its column's root mean square to this power; at 0
    codes are the nearest ones. Columns are those of a group of rows (`row_groups`): cut there, the pieces of a matrix
    get the codes of the whole. Raises ValueError when a value is not finite or a norm exceeds float16.
    """
    cut = blocks(weight, spec.block_size)
    matrices = cut.reshape(-1, *(cut.shape[-3:] if cut.ndim > 2 else (1, *cut.shape[-2:])))  # [matrices, N, blocks, B]
    codes = np.empty(matrices.shape, np.uint8)
    norms = np.empty(matrices.shape[:-1], np.float16)
    for index, matrix in enumerate(matrices):
        for rows in row_groups(len(matrix), spec.in_features):
            group = matrix[rows]
            factors = None if power == 0 else feedback_factors(_column_squares(group), spec.in_features, power)
            codes[index][rows], norms[index][rows] = _encode_group(group, spec.bits, factors)
    return Encoded(codes.reshape(*weight.shape[:-1], -1), norms.reshape(*weight.shape[:-1], -1))


def row_groups(rows: int, in_features: int) -> Iterator[slice]:
    """The rows of an [N, K] that are encoded together."""
    step = max(GROUP_WEIGHTS // in_features, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _encode_group(rows: np.ndarray, bits: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and norms of some rows: [n, k, B] -> uint8 [n, k, B], float16 [n, k]."""
    size = rows.shape[-1]
    rotated = rotate(rows.reshape(-1, size).astype(np.float32, copy=False), size)
    step = CHUNK // size
    norms = np.concatenate([best_norms(rotated[at : at + step], bits) for at in range(0, len(rotated), step)])
    norms = to_float16(norms)
    if factors is None:
        return codes_under(rotated, norms, bits).reshape(rows.shape), norms.reshape(rows.shape[:-1])
    normal = (rotated * _scale(norms, size)[:, None]).reshape(rows.shape)
    return shaped_codes(normal, bits, factors), norms.reshape(rows.shape[:-1])


def _column_squares(matrix: np.ndarray) -> np.ndarray:
    """Sums over the rows of the squares of [N, blocks, B]: float64 [blocks, B]."""
    return np.einsum("nkb,nkb->kb", matrix, matrix, dtype=np.float64)


def feedback_factors(square: np.ndarray, in_features: int, power: float) -> np.ndarray:
    """Which share of a rotated value's rounding error each later value of the block takes: float32 [blocks, B, B].

    square: float64 [blocks, B], sum of squares of every column. With D the importance of the inputs, row j of block k
    is row j of the upper U, U^T U = (H_B D H_B)^-1, over its diagonal. Inputs that only pad the last block hardly
    count.
    """
    if not np.isfinite(square).all():
        raise ValueError("the weight holds NaN or infinity")
    size = square.shape[1]
    average = square.sum(axis=1, keepdims=True) / size
    square = np.where(average > 0, np.maximum(square, FLOOR * average), 1.0)
    inverse = square ** (-power / 2)  # of the importance
    inverse.reshape(-1)[in_features:] = inverse.max() / FLOOR
    rotation = hadamard(size)
    lower = np.linalg.cholesky((rotation * inverse[:, None, :]) @ rotation)
    factors = lower / np.diagonal(lower, axis1=1, axis2=2)[:, None, :]
    return np.ascontiguousarray(factors.swapaxes(1, 2), np.float32)


def shaped_codes(normal: np.ndarray, bits: int, factors: np.ndarray) -> np.ndarray:
    """Codes by error feedback of normalized values float32 [n, blocks, B]: uint8 [n, blocks, B]."""
    table = np.array(codebook(bits), np.float32)
    midpoints = ((np.array(codebook(bits))[1:] + np.array(codebook(bits))[:-1]) / 2).astype(np.float32)
    free = np.ascontiguousarray(normal.transpose(1, 2, 0))  # [blocks, B, n]: a column of values lies together
    codes = np.zeros(free.shape, np.uint8)
    size = free.shape[1]
    for start in range(0, size, COLUMNS):
        stop = min(start + COLUMNS, size)
        errors = np.empty((len(free), stop - start, free.shape[2]), np.float32)
        for j in range(start, stop):
            for midpoint in midpoints:  # the number of midpoints below: faster than a binary search (encoders.py)
                codes[:, j] += free[:, j] > midpoint
            errors[:, j - start] = free[:, j] - table[codes[:, j]]
            free[:, j + 1 : stop] -= factors[:, j, j + 1 : stop, None] * errors[:, j - start, None]
        free[:, stop:] -= factors[:, start:stop, stop:].swapaxes(1, 2) @ errors
    return codes.transpose(2, 0, 1)


def codes_under(rotated: np.ndarray, norms: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes of rotated blocks float32 [n, B] under given norms [n]: uint8 [n, B]."""
    return nearest(rotated * _scale(norms, rotated.shape[-1])[:, None], bits)


def _scale(norms: np.ndarray, size: int) -> np.ndarray:
    """What makes rotated blocks of these norms normal: float32 [n]. A zero block stays zero."""
    return np.sqrt(np.float32(size)) / np.where(norms > 0, norms, 1).astype(np.float32)


def best_norms(rotated: np.ndarray, bits: int) -> np.ndarray:
    """The norm of least squared error of every block: float32 [n, B] -> float32 [n], 0 for a zero block."""
    size = rotated.shape[-1]
    root_mean_square = np.sqrt(np.einsum("nb,nb->n", rotated, rotated) / size)
    if not np.isfinite(root_mean_square).all():
        raise ValueError("the weight holds NaN or infinity")
    safe = np.where(root_mean_square > 0, root_mean_square, 1)
    z = np.abs(rotated) / safe[:, None]
    bins = _bin(z)
    scale, gain = _search(z, bins, bits, norm_grid(GRID_LOW, GRID_HIGH))
    # A block whose energy sits in a few values (a constant or Walsh-aligned one) may need a much larger norm.
    largest = z.max(axis=1) / codebook(bits)[-1]
    far = np.flatnonzero(largest > GRID_HIGH)
    if far.size:
        far_scale, far_gain = _search(z[far], bins[far], bits, norm_grid(GRID_HIGH, largest.max()))
        better = far_gain > gain[far]
        scale[far[better]] = far_scale[better]
    for _ in range(REFINEMENTS):
        shifts = np.rint(np.log(np.maximum(scale, np.float32(SMALLEST))) * BINS_PER_E).astype(np.int64)
        centroids = binned_centroids(bits)[bins + (MARGIN - shifts[:, None])]
        scale = _dot(z, centroids) / _dot(centroids, centroids)
    return scale * root_mean_square * np.sqrt(np.float32(size))


def _search(z: np.ndarray, bins: np.ndarray, bits: int, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best scale [n] of a grid (least squares at the best point), and the energy <z, c>^2 / <c, c> it keeps."""
    table = binned_centroids(bits)
    scale, gain = np.ones(len(z), np.float32), np.full(len(z), -1, np.float32)
    centroids = np.empty_like(z)
    for shift in shifts:
        np.take(table[MARGIN - shift :], bins, out=centroids, mode="clip")
        product, energy = _dot(z, centroids), _dot(centroids, centroids)
        point = product / energy
        kept = product * point
        better = kept > gain
        scale[better], gain[better] = point[better], kept[better]
    return scale, gain


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nb,nb->n", a, b)


def norm_grid(low: float, high: float) -> np.ndarray:
    """Norms from `low` to `high` times the L2 norm, as shifts of the bins."""
    points = np.arange(np.log(low), np.log(high) + GRID_STEP, GRID_STEP)
    return np.rint(points * BINS_PER_E).astype(int)


LOWEST = round(np.log(SMALLEST) * BINS_PER_E)
MARGIN = 4 * BINS_PER_E  # norms and magnitudes reach e**4 times the L2 norm (sqrt(128) is e**2.4)


def _bin(z: np.ndarray) -> np.ndarray:
    """The bin of every magnitude, 0 for SMALLEST and below: float32 [...] -> int64 [...]."""
    bins = np.log(np.maximum(z, np.float32(SMALLEST))) * np.float32(BINS_PER_E)
    return np.rint(bins).astype(np.int64) - LOWEST


@cache
def binned_centroids(bits: int) -> np.ndarray:
    """The centroid of every bin's magnitude; bin i is element i + MARGIN. float32 [bins]."""
    magnitudes = np.exp(np.arange(LOWEST - MARGIN, MARGIN) / BINS_PER_E)
    table = np.array(codebook(bits), np.float32)
    return table[nearest(magnitudes.astype(np.float32), bits)]
