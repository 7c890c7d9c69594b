"""The table `recipes` of benchmarks/quality.py: uniform bits, the published models' bits, and `auto` at their sizes.

`auto` is measured with the codes of the encoder that then quantizes. The bits of every plan go to stderr.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING

from benchmarks import quality_peers as peers
from convert.allocate import AUTO_BITS, PROBE_BITS, Option, allocate, relative_error
from convert.calibrate import judging_windows
from convert.model_run import CALIBRATED, PROBE_WINDOWS
from convert.plan import column_power
from convert.recipe import SEEDS, fused_key
from convert.sensitivity import measure

if TYPE_CHECKING:
    from benchmarks.quality import Bench

SEARCH = "search"
OTHER = {SEARCH: CALIBRATED, CALIBRATED: SEARCH}


def recipes(bench: Bench, only: str) -> Iterator[tuple[str, float]]:
    """Every plan with both encoders, and uniform 4 against auto as the other encoder would have it."""
    fixed = {"uniform 4": dict.fromkeys(bench.linears, 4), "seeds": {name: _seed(name) for name in bench.linears}}

    @cache
    def sensitivities(encoder: str) -> dict[str, float]:
        return _sensitivities(bench, encoder)

    for encoder in (SEARCH, CALIBRATED):
        for name, bits in fixed.items():
            rows = {name: None, f"auto at the size of {name}": encoder}
            if name == "uniform 4":
                rows[f"auto by {OTHER[encoder]} at the size of {name}"] = OTHER[encoder]
            for row, measured_with in rows.items():
                if only not in f"{row}, {encoder}":
                    continue
                plan = _auto(bench, sensitivities(measured_with), _nbytes(bench, bits)) if measured_with else bits
                print(f"{row}, {encoder}: bits by layer\n{_by_layer(plan)}", file=sys.stderr)
                if encoder == SEARCH:
                    yield f"{row}, {encoder}", bench.apply(lambda n, w, b=plan: peers.hlwq(w, b[n], column_power(n)))
                else:
                    yield f"{row}, {encoder}", bench.calibrated(plan)


def _seed(name: str) -> int:
    return next(bits for pattern, bits in SEEDS.items() if bits and fnmatchcase(name, pattern))


def _by_layer(bits: Mapping[str, int]) -> str:
    """A line for every kind of matrix, a digit for every layer."""
    lines: dict[str, str] = {}
    for name, value in bits.items():
        kind = re.sub(r".*\.layers\.\d+\.", "", name)
        lines[kind] = lines.get(kind, "") + str(value)
    return "\n".join(f"  {digits} {kind}" for kind, digits in lines.items())


def _nbytes(bench: Bench, bits: Mapping[str, int]) -> int:
    return sum(spec.bytes_per_row * len(bench.linears[name]) for name, spec in bench.specs(bits).items())


def _sensitivities(bench: Bench, encoder: str) -> dict[str, float]:
    """As the commands measure them."""
    started = time.monotonic()
    bench.restore()
    specs = bench.specs(dict.fromkeys(bench.linears, PROBE_BITS))
    groups = {digest: (fused_key(name), specs[name]) for digest, name in bench.first_rows.items()}
    if encoder == SEARCH:
        windows = bench.calibration[:PROBE_WINDOWS]
        found = measure(bench.model, windows, lambda digests: groups.get(int(digests[0])))
    else:
        windows = judging_windows(bench.calibration)[:PROBE_WINDOWS]
        with bench.calibrated_codes(specs, alone=True) as codes:
            found = measure(bench.model, windows, lambda digests: groups.get(int(digests[0])), encoder=codes)
    kinds: dict[str, float] = {}
    for group, loss in found.items():
        kind = re.sub(r".*\.layers\.\d+\.", "", group)
        kinds[kind] = kinds.get(kind, 0.0) + loss
    shown = ", ".join(f"{kind} {1e3 * loss:.2f}" for kind, loss in kinds.items())
    print(
        f"sensitivities, {encoder}, in {time.monotonic() - started:.1f} s; "
        f"sums at {PROBE_BITS} bits in 1e-3 nats: {shown}",
        file=sys.stderr,
    )
    return found


def _auto(bench: Bench, sensitivities: Mapping[str, float], budget: int) -> dict[str, int]:
    members: dict[str, list[str]] = {}
    for name in bench.linears:
        members.setdefault(fused_key(name), []).append(name)
    sizes = {
        bits: {
            name: spec.bytes_per_row * len(bench.linears[name])
            for name, spec in bench.specs(dict.fromkeys(bench.linears, bits)).items()
        }
        for bits in AUTO_BITS
    }
    options = [
        [
            Option(bits, sum(sizes[bits][name] for name in names), sensitivities[group] * relative_error(bits))
            for bits in AUTO_BITS
        ]
        for group, names in members.items()
    ]
    chosen = allocate(options, budget)
    return {name: option.bits for names, option in zip(members.values(), chosen, strict=True) for name in names}
