"""Lloyd-Max codebooks of the standard normal distribution (docs/format.md, step 3; Lloyd 1957, Max 1960)."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np


@cache
def codebook(bits: int) -> tuple[float, ...]:
    """The ascending, symmetric table of 2**bits centroids that the format stores, rounded to 8 decimals."""
    upper = [round(float(value), 8) for value in lloyd_max(bits)]
    return tuple(-value for value in reversed(upper)) + tuple(upper)


def lloyd_max(bits: int) -> np.ndarray:
    """The positive half of the table, float64 [2**(bits-1)], converged to rounding.

    An optimal quantizer has every centroid at the mean of its cell and every cell edge halfway between centroids.
    Lloyd's iteration takes thousands of rounds at 8 bits; Newton's method on the same equations (the Jacobian is
    tridiagonal: an edge moves two means) takes five from the asymptotic optimum, whose centroids are spread like a
    normal distribution of variance 3 (Panter and Dite 1951).
    """
    levels = 2**bits
    spread = NormalDist(0.0, math.sqrt(3.0))
    centroids = np.array([spread.inv_cdf((i + 0.5) / levels) for i in range(levels // 2, levels)])
    for _ in range(20):
        means, from_lower_edge, from_upper_edge = _cell_means(centroids)
        jacobian = np.diag((from_lower_edge + from_upper_edge) / 2)
        jacobian += np.diag(from_upper_edge[:-1] / 2, 1) + np.diag(from_lower_edge[1:] / 2, -1)
        step = np.linalg.solve(np.eye(len(centroids)) - jacobian, means - centroids)
        centroids = centroids + step
        if np.abs(step).max() < 1e-11:
            return centroids
    raise ArithmeticError(f"the Lloyd-Max equations did not converge at {bits} bits")


def expected_error(table: tuple[float, ...]) -> float:
    """Mean squared error of a standard normal variable under a symmetric ascending `table`, nearest centroid."""
    upper = np.array(table[len(table) // 2 :])
    lower_edge, upper_edge = _edges(upper)
    mass = _upper_tail(lower_edge) - _upper_tail(upper_edge)
    mean_times_mass = _density(lower_edge) - _density(upper_edge)
    return float(1.0 + 2.0 * np.sum(upper**2 * mass - 2.0 * upper * mean_times_mass))


def _cell_means(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of each cell, and its derivative by the cell's lower and upper edge."""
    lower, upper = _edges(centroids)
    mass = _upper_tail(lower) - _upper_tail(upper)
    means = (_density(lower) - _density(upper)) / mass
    by_lower = _density(lower) * (means - lower) / mass
    by_lower[0] = 0.0  # the edge at zero is fixed by symmetry
    by_upper = np.zeros_like(means)  # and the last edge is at infinity
    by_upper[:-1] = _density(upper[:-1]) * (upper[:-1] - means[:-1]) / mass[:-1]
    return means, by_lower, by_upper


def _edges(centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lower = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2])
    return lower, np.append(lower[1:], np.inf)


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _upper_tail(x: np.ndarray) -> np.ndarray:
    """P(X > x), by erfc so that differences in the tail keep their digits."""
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])
