"""How the kernels turn a code into its centroid: chosen per codebook, handed to the kernels as literals.

The table of config.json is the truth: the kernels look it up in threadgroup memory, or use a polynomial fitted to it
where the fit is good.
Squared error that a polynomial adds on Lloyd-Max tables, in percent of the quantization error: 2 bits degree 3 none;
3 bits degree 3 .30, degree 5 .001; 4 bits degree 5 .33, degree 7 .015; 5 bits degree 7 .64; 6 and 8 need a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np

DEGREES = (1, 3, 5, 7)
ADDED_ERROR = 0.005  # a polynomial may add this share of the codebook's own squared error


class Way(str, Enum):
    """Where a centroid comes from."""

    POLYNOMIAL = "polynomial"  # arithmetic
    PAIRS = "pairs"  # two codes a lookup in threadgroup memory; 4 bits
    TABLE = "table"  # one code a lookup


@dataclass(frozen=True, eq=False)  # one object a codebook: compared and hashed by identity, at each call
class Decoder:
    """One codebook, block size and way, as the kernels take them.

    `defines` goes in front of decode.h; `lookup` holds the words of the table that is staged in threadgroup memory
    (empty for a polynomial); `values` are the centroids that the kernels really use, over sqrt(B).
    """

    bits: int
    block_size: int
    way: Way
    defines: str
    lookup: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Polynomial:
    """c(t) = scale * t * p(t^2), p monic in the form of decode.h, t = code - (2^b - 1) / 2."""

    scale: float
    constants: tuple[float, ...]  # C0, C1, C2
    added_error: float  # share of the codebook's own squared error

    @property
    def degree(self) -> int:
        """Of c."""
        return 2 * len(self.constants) + 1

    def __call__(self, t: np.ndarray) -> np.ndarray:
        return self.scale * t * _monic(t * t, self.constants)


def ways(codebook: tuple[float, ...]) -> tuple[Way, ...]:
    """The ways that serve this codebook, the one preferred without a measurement first.

    The table first: it is exact, and benchmarks/apple_model.py counts fewest operations for it (4 bits: 3.9 a weight,
    a polynomial 5.9, MLX's affine kernel 4.5). Others measured such a table at the time of an affine kernel on an M4,
    and a cubic by arithmetic at .985 of it; `python -m hlwq_mlx tune` decides.
    """
    found = [Way.TABLE] + ([Way.POLYNOMIAL] if polynomial(codebook) else [])
    return (*found, Way.PAIRS) if len(codebook) == 16 else tuple(found)


@cache
def decoder(codebook: tuple[float, ...], block_size: int, way: Way) -> Decoder:
    """The decoder of `codebook` by `way`. ValueError when `ways` does not list it."""
    if way not in ways(codebook):
        raise ValueError(f"no {way.value} decoder for this {len(codebook)}-entry codebook")
    bits = len(codebook).bit_length() - 1
    centroids = np.array(codebook) / math.sqrt(block_size)
    scale, lookup, lines = 1.0, np.empty(0, np.uint32), []
    if way is Way.POLYNOMIAL:
        fitted = polynomial(codebook)
        scale = fitted.scale / math.sqrt(block_size)
        lines = [f"HLWQ_DEGREE {fitted.degree}"]
        lines += [f"HLWQ_C{i} ({value:.9e}f)" for i, value in enumerate(fitted.constants)]
        centroids = fitted(_levels(len(codebook))) / math.sqrt(block_size)
    elif way is Way.PAIRS:
        lines = ["HLWQ_PAIRS 1"]
        centroids = centroids.astype(np.float16)
        lookup = np.stack([np.tile(centroids, 16), np.repeat(centroids, 16)], axis=1).reshape(-1).view(np.uint32)
    else:
        lines = ["HLWQ_TABLE 1"]
        lookup = centroids.astype(np.float32).view(np.uint32)
    lines += [f"HLWQ_BITS {bits}", f"HLWQ_BLOCK {block_size}", f"HLWQ_SCALE ({scale:.9e}f)"]
    defines = "".join(f"#define {line}\n" for line in lines)
    return Decoder(bits, block_size, way, defines, tuple(map(int, lookup)), tuple(map(float, centroids)))


@cache
def polynomial(codebook: tuple[float, ...]) -> Polynomial | None:
    """The polynomial of least degree that adds at most ADDED_ERROR, or None: weighted least squares on the levels."""
    table, levels = np.array(codebook), _levels(len(codebook))
    mass, own_error = _cells(table)
    for degree in DEGREES:
        powers = np.stack([levels**power for power in range(1, degree + 1, 2)], axis=1)
        weight = np.sqrt(mass)
        odd, *_ = np.linalg.lstsq(powers * weight[:, None], table * weight, rcond=None)
        added = float(mass @ (powers @ odd - table) ** 2) / own_error
        if added <= ADDED_ERROR:
            return Polynomial(float(odd[-1]), _monic_constants(odd / odd[-1]), added)
    return None


def _levels(count: int) -> np.ndarray:
    return np.arange(count) - (count - 1) / 2


def _cells(table: np.ndarray) -> tuple[np.ndarray, float]:
    """Of a standard normal variable: the probability of each code, and the squared error of the table."""
    edges = np.concatenate([[-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]])
    below = np.array([math.erfc(-edge / math.sqrt(2)) / 2 for edge in edges])
    density = np.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    mass = np.diff(below)
    return mass, float(1 + table @ (mass * table) + 2 * table @ np.diff(density))


def _monic_constants(odd: np.ndarray) -> tuple[float, ...]:
    """C0, C1, C2 of the monic p(u) = u^n + ... with coefficients `odd`, ascending, the last one 1."""
    if len(odd) == 1:
        return ()
    if len(odd) == 2:
        return (float(odd[0]),)
    if len(odd) == 3:  # (u + C1)^2 + C0
        shift = odd[1] / 2
        return (float(odd[0] - shift**2), float(shift))
    shift = odd[2] / 3  # v = u + C2 without a quadratic term: (v^2 + C1) v + C0
    linear = odd[1] - 3 * shift**2
    return (float(odd[0] - shift**3 - linear * shift), float(linear), float(shift))


def _monic(u: np.ndarray, constants: tuple[float, ...]) -> np.ndarray:
    if not constants:
        return np.ones_like(u)
    if len(constants) == 1:
        return u + constants[0]
    if len(constants) == 2:
        return (u + constants[1]) ** 2 + constants[0]
    v = u + constants[2]
    return (v * v + constants[1]) * v + constants[0]
