"""The `search` encoder in torch, for a GPU: the norms and codes of search.py, step by step.

Both compute in float32 and add up in other orders. Where two norms serve a block equally well to seven digits they may
choose differently, and where a value lies on a cell's edge the values after it make up for the choice: up to 6 bits
that is one to four blocks in a thousand, at 8 bits, where the error itself is in the fifth digit, three in a hundred.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from convert import search
from convert.codebook import codebook
from convert.format import ModuleSpec
from convert.reference import Encoded, hadamard, to_float16

if TYPE_CHECKING:
    import torch


class DeviceEncoder:
    """An encoder for the pipeline that runs on a torch device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, weight: np.ndarray, spec: ModuleSpec, power: float = 0.0) -> Encoded:
        """As search.encode: float32 [..., N, K]."""
        import torch

        matrices = weight.reshape(-1, *weight.shape[-2:]) if weight.ndim > 1 else weight[None, None]
        found = [encode(torch.from_numpy(matrix).to(self._device), spec, power) for matrix in matrices]
        codes, norms = (np.stack([each.cpu().numpy() for each in pair]) for pair in zip(*found, strict=True))
        return Encoded(codes.reshape(*weight.shape[:-1], -1), norms.reshape(*weight.shape[:-1], -1))


def encode(weight: torch.Tensor, spec: ModuleSpec, power: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, Kp] and norms float16 [N, Kp / B] of a float32 [N, K] weight on its device, as search.encode."""
    import torch

    size = spec.block_size
    padded = torch.nn.functional.pad(weight, (0, spec.padded_in_features - spec.in_features))
    cut = padded.reshape(len(weight), spec.blocks, size)
    codes = torch.empty_like(cut, dtype=torch.uint8)
    norms = torch.empty(cut.shape[:2], dtype=torch.float16, device=weight.device)
    for rows in search.row_groups(len(weight), spec.in_features):
        factors = None
        if power:
            square = cut[rows].square().sum(0).cpu().numpy().astype(np.float64)
            factors = torch.from_numpy(search.feedback_factors(square, spec.in_features, power)).to(weight.device)
        rotated = cut[rows] @ _rotation(size, weight.device)
        exact = best_norms(rotated.reshape(-1, size), spec.bits)
        largest = float(exact.max()) if len(exact) else 0.0
        if not largest <= 65504:  # also NaN
            to_float16(exact.cpu().numpy())  # raises, with the words of the numpy encoder
        norms[rows] = exact.reshape(norms[rows].shape).half()
        normal = rotated * _scale(norms[rows], size)[..., None]
        codes[rows] = _shaped_codes(normal, spec.bits, factors)
    return codes.reshape(len(weight), -1), norms


def _scale(norms: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    return np.sqrt(np.float32(size)).item() / torch.where(norms > 0, norms.float(), torch.ones_like(norms.float()))


def _shaped_codes(normal: torch.Tensor, bits: int, factors: torch.Tensor | None) -> torch.Tensor:
    """search.shaped_codes: float32 [n, blocks, B] -> uint8 [n, blocks, B]."""
    import torch

    table, midpoints = _tables(bits, normal.device)
    if factors is None:
        return torch.bucketize(normal, midpoints).to(torch.uint8)
    free = normal.permute(1, 2, 0).contiguous()
    codes = torch.empty_like(free, dtype=torch.uint8)
    size = free.shape[1]
    for start in range(0, size, search.COLUMNS):
        stop = min(start + search.COLUMNS, size)
        errors = torch.empty_like(free[:, start:stop])
        for j in range(start, stop):
            code = torch.bucketize(free[:, j].contiguous(), midpoints)
            codes[:, j] = code.to(torch.uint8)
            errors[:, j - start] = free[:, j] - table[code]
            free[:, j + 1 : stop] -= factors[:, j, j + 1 : stop, None] * errors[:, j - start, None]
        free[:, stop:] -= factors[:, start:stop, stop:].mT @ errors
    return codes.permute(2, 0, 1)


def best_norms(rotated: torch.Tensor, bits: int) -> torch.Tensor:
    """search.best_norms: float32 [n, B] -> float32 [n]."""
    import torch

    size = rotated.shape[-1]
    root_mean_square = (rotated.square().sum(1) / size).sqrt()
    if not bool(torch.isfinite(root_mean_square).all()):
        raise ValueError("the weight holds NaN or infinity")
    z = rotated.abs() / torch.where(root_mean_square > 0, root_mean_square, 1.0)[:, None]
    bins = _bin(z) - search.LOWEST
    scale, gain = _search(z, bins, bits, search.norm_grid(search.GRID_LOW, search.GRID_HIGH))
    largest = z.amax(1) / codebook(bits)[-1]
    far = (largest > search.GRID_HIGH).nonzero()[:, 0]
    if len(far):
        grid = search.norm_grid(search.GRID_HIGH, float(largest.max()))
        far_scale, far_gain = _search(z[far], bins[far], bits, grid)
        scale[far] = torch.where(far_gain > gain[far], far_scale, scale[far])
    for _ in range(search.REFINEMENTS):
        shifts = _bin(scale)
        centroids = _centroids(bits, z.device)[bins + (search.MARGIN - shifts[:, None])]
        scale = (z * centroids).sum(1) / centroids.square().sum(1)
    return scale * root_mean_square * np.sqrt(np.float32(size)).item()


def _bin(z: torch.Tensor) -> torch.Tensor:
    """The bin of every magnitude, 0 for 1: int64, any shape."""
    return (z.clamp_min(search.SMALLEST).log() * search.BINS_PER_E).round().long()


def _search(z: torch.Tensor, bins: torch.Tensor, bits: int, grid: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    table = _centroids(bits, z.device)
    scale, gain = torch.ones_like(z[:, 0]), torch.full_like(z[:, 0], -1)
    for shift in grid.tolist():
        centroids = table[(bins + (search.MARGIN - shift)).clamp_max(len(table) - 1)]
        product = (z * centroids).sum(1)
        point = product / centroids.square().sum(1)
        better = product * point > gain
        scale, gain = torch.where(better, point, scale), torch.where(better, product * point, gain)
    return scale, gain


# Kept on the device: a copy from the host would wait for all work in flight, once a matrix.
@lru_cache(maxsize=32)
def _centroids(bits: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(search.binned_centroids(bits)).to(device)


@lru_cache(maxsize=32)
def _tables(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids and midpoints, float32."""
    import torch

    table = np.array(codebook(bits))
    both = (table, (table[1:] + table[:-1]) / 2)
    table, midpoints = (torch.from_numpy(each.astype(np.float32)).to(device) for each in both)
    return table, midpoints


@lru_cache(maxsize=32)
def _rotation(size: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(hadamard(size).astype(np.float32)).to(device)
