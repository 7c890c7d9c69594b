"""The next token from logits, on the device: greedy, or temperature and top-p (nucleus, Holtzman et al. 2020).

Sorting 150,000 logits takes longer than the head of the model. Instead:

    maximum     grid over the vocabulary: largest logit of every tile; clears the histogram
    histogram   grid: weights exp((logit - largest) / temperature), summed by their distance from the largest
    pick        grid: finds in the histogram where the sum reaches top_p, draws from the tile's logits above
    best        one program: the best of the tiles; writes the token

A draw is a race of exponential variates (the least E_i / weight_i wins: Gumbel-max), so it needs no normalization.
The histogram's bins are 1/128 wide in log probability: the cut falls between tokens whose probabilities differ by at
most 0.8 %, and ties stay together. Weights are summed as integers: the result does not depend on the order, and equal
seeds give equal tokens. Random numbers are Philox of (seed, token, position), so a graph needs no generator state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import integers
from hlwq_cuda.kernels.device import allow_next_kernel, wait_for_previous_kernel

TILE = 1024
BINS = 2048
_BINS_PER_NAT = tl.constexpr(128.0)
_UNIT = tl.constexpr(1073741824.0)  # 2**30: weight 1 as an integer


@triton.jit
def maximum_kernel(
    logits,  # [V]
    tile_value,  # float32 [TILES]
    tile_index,  # int32 [TILES]
    histogram,  # int64 [BINS]
    V,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    tile = tl.program_id(0)
    index = tile * TILE + tl.arange(0, TILE)
    wait_for_previous_kernel(PDL)
    x = tl.load(logits + index, mask=index < V, other=float("-inf")).to(tl.float32)
    value, winner = tl.max(x, 0, return_indices=True)
    tl.store(tile_value + tile, value)
    tl.store(tile_index + tile, tile * TILE + winner)
    if tile == 0:
        tl.store(histogram + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))


@triton.jit
def _bin(x, largest, temperature, BINS: tl.constexpr):
    """The bin of a logit; the last one takes everything farther than BINS / 128 from the largest."""
    distance = (largest - x) / temperature
    return tl.minimum(distance * _BINS_PER_NAT, BINS - 1.0).to(tl.int32), tl.exp(-distance)


@triton.jit
def histogram_kernel(
    logits,  # [V]
    tile_value,  # float32 [TILES]
    settings,  # float32 [2]: temperature, top_p
    histogram,  # int64 [BINS], zero
    V,
    TILES,
    TILES_POW2: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tiles = tl.arange(0, TILES_POW2)
    wait_for_previous_kernel(PDL)
    largest = tl.max(tl.load(tile_value + tiles, mask=tiles < TILES, other=float("-inf")), 0)
    x = tl.load(logits + index, mask=index < V, other=float("-inf")).to(tl.float32)
    bin, weight = _bin(x, largest, tl.load(settings), BINS)
    units = (weight * _UNIT).to(tl.int64)
    # most tokens of a real model are in the last bin: one atomic a tile, not one a token, to that address
    last = bin == BINS - 1
    tl.atomic_add(histogram + bin, units, mask=(index < V) & (bin < BINS - 1), sem="relaxed")
    tl.atomic_add(histogram + BINS - 1, tl.sum(tl.where(last & (index < V), units, 0), 0), sem="relaxed")


@triton.jit
def pick_kernel(
    logits,  # [V]
    tile_value,  # float32 [TILES]: largest logits
    settings,  # float32 [2]
    seed,  # int64 [1]
    position,  # int64 [1]
    histogram,  # int64 [BINS]
    score,  # float32 [TILES]
    tile_index,  # int32 [TILES]
    V,
    TILES,
    TILES_POW2: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    tile = tl.program_id(0)
    index = tile * TILE + tl.arange(0, TILE)
    tiles = tl.arange(0, TILES_POW2)
    temperature = tl.load(settings)
    top_p = tl.load(settings + 1)
    key = tl.load(seed)
    wait_for_previous_kernel(PDL)
    step = tl.load(position).to(tl.int32)
    random, _, _, _ = tl.philox(key, index, step + 0 * index, 0 * index, 0 * index)

    # a bin is kept when the bins before it do not reach top_p of the total
    counts = tl.load(histogram + tl.arange(0, BINS))
    before = tl.cumsum(counts, 0) - counts
    target = (tl.sum(counts, 0).to(tl.float64) * top_p).to(tl.int64)
    kept = tl.sum(((before < target) | (tl.arange(0, BINS) == 0)).to(tl.int32), 0)

    largest = tl.max(tl.load(tile_value + tiles, mask=tiles < TILES, other=float("-inf")), 0)
    x = tl.load(logits + index, mask=index < V, other=float("-inf")).to(tl.float32)
    bin, _ = _bin(x, largest, temperature, BINS)
    uniform = ((random >> 8).to(tl.float32) + 0.5) * (2.0**-24)  # in (0, 1)
    exponential = tl.where(uniform < 0.001, uniform * (1.0 + 0.5 * uniform), -tl.log(1.0 - uniform))
    race = (x - largest) / temperature - tl.log(exponential)
    value, winner = tl.max(tl.where((index < V) & (bin < kept), race, float("-inf")), 0, return_indices=True)
    tl.store(score + tile, value)
    tl.store(tile_index + tile, tile * TILE + winner)


@triton.jit
def best_kernel(
    score,  # float32 [TILES]
    tile_index,  # int32 [TILES]
    token,  # int64 [1]
    TILES,
    TILES_POW2: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next_kernel(PDL)
    tiles = tl.arange(0, TILES_POW2)
    wait_for_previous_kernel(PDL)
    _, winner = tl.max(tl.load(score + tiles, mask=tiles < TILES, other=float("-inf")), 0, return_indices=True)
    tl.store(token, tl.load(tile_index + winner).to(tl.int64))


class Sampler:
    """Draws tokens from logits [V] into `token`, by kernels that a CUDA graph can hold.

    settings: float32 [2], temperature (> 0) and top_p in (0, 1]; seed: int64 [1]. Change them between replays at will.
    """

    def __init__(self, vocabulary: int, device: torch.device, launch: dict) -> None:
        self._vocabulary, self._launch = vocabulary, launch
        self._tiles = integers.cdiv(vocabulary, TILE)
        self._tiles_pow2 = integers.next_power_of_2(self._tiles)
        self._value = torch.empty(self._tiles, device=device)
        self._score = torch.empty(self._tiles, device=device)
        self._index = torch.empty(self._tiles, dtype=torch.int32, device=device)
        self._histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.settings = torch.tensor([1.0, 1.0], device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def greedy(self, logits: torch.Tensor, token: torch.Tensor) -> None:
        """token (int64 [1]) = the index of the largest logit, the first of equal ones."""
        self._maximum(logits)
        self._best(self._value, token)

    def sample(self, logits: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> None:
        """token (int64 [1]) = a draw by temperature and top-p; one (seed, position) always gives the same."""
        self._maximum(logits)
        size = {"TILE": TILE, "BINS": BINS, "TILES_POW2": self._tiles_pow2, "num_warps": 4, **self._launch}
        histogram_kernel[(self._tiles,)](
            logits, self._value, self.settings, self._histogram, self._vocabulary, self._tiles, **size
        )
        pick_kernel[(self._tiles,)](
            logits,
            self._value,
            self.settings,
            self.seed,
            position,
            self._histogram,
            self._score,
            self._index,
            self._vocabulary,
            self._tiles,
            **size,
        )
        self._best(self._score, token)

    def _maximum(self, logits: torch.Tensor) -> None:
        maximum_kernel[(self._tiles,)](
            logits,
            self._value,
            self._index,
            self._histogram,
            self._vocabulary,
            TILE=TILE,
            BINS=BINS,
            num_warps=4,
            **self._launch,
        )

    def _best(self, score: torch.Tensor, token: torch.Tensor) -> None:
        best_kernel[(1,)](
            score, self._index, token, self._tiles, TILES_POW2=self._tiles_pow2, num_warps=1, **self._launch
        )
