"""Which way of decoding is fastest on this Mac: measured by `python -m hlwq_mlx tune`, remembered per GPU.

Without a measurement the first of `ways` is used.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import cache
from pathlib import Path

import mlx.core as mx

from hlwq_mlx.metal.decoder import Way, decoder, ways

SHAPE = (4096, 4096)  # N, K of the product that is timed
MATRICES = 32  # different weights in turn, more than any cache holds
REPEATS = 7


def preferred_way(codebook: tuple[float, ...]) -> Way:
    """The way measured for this GPU if there is one and it serves the codebook, else the first of `ways`."""
    possible = ways(codebook)
    stored = _stored().get(_device(), {}).get(str(len(codebook)))
    return next((way for way in possible if way.value == stored), possible[0])


def tune(codebooks: dict[int, tuple[float, ...]]) -> dict[int, dict[str, float]]:
    """Time every way of each codebook: {bits: {way: microseconds of one product}}. Stores the winners."""
    from hlwq_mlx import metal

    times = {}
    for bits, codebook in codebooks.items():
        times[bits] = {way.value: _microseconds(metal, codebook, way) for way in ways(codebook)}
    winners = {str(2**bits): min(by_way, key=by_way.get) for bits, by_way in times.items()}
    everything = {**_stored(), _device(): winners}
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_text(json.dumps(everything, indent=2) + "\n")
    staging.replace(path)
    _stored.cache_clear()
    return times


def _microseconds(metal, codebook: tuple[float, ...], way: Way) -> float:
    """Median over REPEATS of one product of one row, among MATRICES different matrices."""
    outputs, columns = SHAPE
    bits = len(codebook).bit_length() - 1
    chosen = decoder(codebook, 128, way)
    codes = [mx.random.randint(0, 2**31, (outputs, columns * bits // 32)).astype(mx.uint32) for _ in range(MATRICES)]
    norms = mx.random.uniform(0.5, 1.5, (outputs, columns // 128)).astype(mx.float16)
    x = mx.random.normal((1, columns)).astype(mx.float16)
    mx.eval(codes, norms, x, metal.gemv(x, codes[0], norms, chosen))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        mx.eval([metal.gemv(x, matrix, norms, chosen) for matrix in codes])
        times.append((time.perf_counter() - start) / MATRICES)
    return 1e6 * statistics.median(times)


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hlwq", "metal_ways.json")


@cache
def _stored() -> dict[str, dict[str, str]]:
    """{GPU: {entries of the codebook: way}}."""
    try:
        return json.loads(_path().read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:
        raise ValueError(f"{_path()} is not JSON; delete it or run `python -m hlwq_mlx tune` again") from None


@cache
def _device() -> str:
    return str(mx.device_info().get("device_name", "unknown"))
