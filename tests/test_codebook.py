"""codebook.py: the tables are the converged Lloyd-Max quantizers that docs/format.md lists."""

from __future__ import annotations

import numpy as np
import pytest

from convert.codebook import codebook, expected_error, lloyd_max
from convert.format import SUPPORTED_BITS

ERRORS = {2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644}
POSITIVE_HALF_4 = (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590)


@pytest.mark.parametrize("bits", ERRORS)
def test_errors_of_the_format(bits: int):
    assert expected_error(codebook(bits)) == pytest.approx(ERRORS[bits], abs=5e-7)  # the page prints six decimals


def test_error_at_8_bits_is_near_the_asymptote():
    panter_dite = np.sqrt(3) * np.pi / 2 / 4**8
    assert expected_error(codebook(8)) == pytest.approx(panter_dite, rel=0.02)
    assert expected_error(codebook(8)) < panter_dite


def test_positive_half_of_4_bits():
    assert codebook(4)[8:] == pytest.approx(POSITIVE_HALF_4, abs=5e-7)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_tables_are_symmetric_ascending_and_rounded(bits: int):
    table = codebook(bits)
    assert len(table) == 2**bits and list(table) == sorted(set(table))
    assert all(low == -high for low, high in zip(table, reversed(table), strict=True))
    assert all(round(value, 8) == value for value in table)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_centroid_is_the_mean_of_its_cell(bits: int):
    """Lloyd's condition, by numerical integration that shares nothing with the solver."""
    centroids = lloyd_max(bits)
    edges = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [12.0]])  # P(X > 12) is 2e-33
    for centroid, low, high in zip(centroids, edges[:-1], edges[1:], strict=True):
        points = np.linspace(low, high, 501)
        density = np.exp(-points * points / 2)
        weights = density * np.where((points == low) | (points == high), 0.5, 1.0)  # trapezoid rule
        assert centroid == pytest.approx(np.sum(weights * points) / np.sum(weights), abs=1e-4 * (high - low))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_expected_error_is_what_random_numbers_show(bits: int):
    x = np.random.default_rng(bits).standard_normal(400_000)
    table = np.array(codebook(bits))
    midpoints = (table[1:] + table[:-1]) / 2
    errors = (x - table[np.searchsorted(midpoints, x)]) ** 2
    tolerance = 5 * errors.std() / np.sqrt(len(x))  # five standard errors of the mean
    assert errors.mean() == pytest.approx(expected_error(codebook(bits)), abs=tolerance)
