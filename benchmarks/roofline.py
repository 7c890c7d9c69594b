"""Draw the result of benchmarks.kernels: the bytes each kernel must read against the time that it takes.

    python -m benchmarks.roofline benchmarks/results/kernels-h200.json      # writes the .png beside it; matplotlib

The line is the roof: the time in which a kernel that only reads would read those bytes. A point's height above the line
is the time lost; an unquantized layer sits further right because it reads four times the bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

OURS = "HLWQ"
MARKERS = "osD^vP*X"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the .json that benchmarks.kernels wrote")
    path = parser.parse_args(argv).result
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    return 0


def draw(result: dict, path: Path) -> None:
    """One panel for each number of rows below 64: kernels bound by memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    timed = [record for record in result["records"] if "us" in record and record["m"] <= 64]
    rows = sorted({record["m"] for record in timed})
    names = list(dict.fromkeys(record["name"] for record in timed))
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.4), sharey=True, squeeze=False)
    limits = [min(r["bytes"] for r in timed) / 1.5, max(r["bytes"] for r in timed) * 1.5]
    for axis, m in zip(axes[0], rows, strict=True):
        roof = [size / result["read_bandwidth"] * 1e6 for size in limits]
        axis.plot([size / 1e6 for size in limits], roof, color="black", label="read bandwidth")
        for name, marker in zip(names, MARKERS, strict=False):
            points = sorted((r["bytes"] / 1e6, r["us"]) for r in timed if (r["name"], r["m"]) == (name, m))
            if points:
                ours = name.startswith(OURS)
                axis.plot(*zip(*points, strict=True), marker, ms=8 if ours else 6, alpha=1 if ours else 0.6, label=name)
        axis.set(xscale="log", yscale="log", title=f"M = {m}", xlabel="MB of weights read")
        axis.grid(True, which="both", alpha=0.2)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("")
    axes[0][0].set_ylabel("microseconds")
    axes[0][-1].legend(fontsize=8)
    shapes = ", ".join(dict.fromkeys(f"{r['n']}x{r['k']}" for r in timed))
    figure.suptitle(f"{result['gpu']}: {shapes}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
