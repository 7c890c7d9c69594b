"""Time GPU calls as a decode step runs them: from a CUDA graph, with weights that are not in the L2 cache.

A graph holds one call per copy of the weights; the copies together exceed the cache several times, so every call reads
device memory. The figure is the median over replays divided by the number of calls; the whole is repeated, and the
difference between repeats is reported, because a difference between kernels below it is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROTATED_BYTES = 320 << 20  # more than five times the 60 MB of an H200's L2
MIN_COPIES = 4
REPLAYS = 11
REPEATS = 3


class Timing(NamedTuple):
    """Microseconds a call: the median of the repeats, and their range."""

    us: float
    spread_us: float


def copies_for(bytes_per_copy: int) -> int:
    """Copies of the weights that one graph cycles through."""
    return max(MIN_COPIES, -(-ROTATED_BYTES // bytes_per_copy))


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time `calls`, which do the same work on different weights. The first also warms up (compilation, handles)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    medians = [median(_replay_us(graph) for _ in range(REPLAYS)) / len(calls) for _ in range(REPEATS)]
    return Timing(median(medians), max(medians) - min(medians))


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def read_bandwidth() -> float:
    """Bytes a second that a kernel which only reads reaches on 2 GiB: the ceiling of every weight-bound kernel."""
    words = torch.randint(0, 2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps in ((4096, 8), (8192, 8), (16384, 16)):
        sums = torch.empty(len(words) // block, dtype=torch.int32, device="cuda")
        grid = (len(sums),)

        def call(block: int = block, warps: int = warps, sums: torch.Tensor = sums, grid: tuple = grid) -> None:
            _read[grid](words, sums, block, num_warps=warps)

        best = max(best, words.nbytes / time_calls([call]).us * 1e6)
    return best


@triton.jit
def _read(words_ptr, sums_ptr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.load(words_ptr + offset)))
