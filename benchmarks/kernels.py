"""Matrix kernels on one GPU against the unquantized layer and other projects' 4-bit layers.

    python -m benchmarks.kernels                                     # M = 1, 8, 16, 2048 on the four shapes of Qwen3-8B
    python -m benchmarks.kernels --rows 2 4 32 --shapes 4096x14336 --only "HLWQ int8" "bf16 cuBLAS"
    python -m benchmarks.kernels --output benchmarks/results/kernels-h200   # .json and .md; then benchmarks.roofline

Every figure is the median over CUDA-graph replays with weights rotated past the L2 cache (cuda_timing.py). `share` is
the bytes of the weight over the time, relative to what a kernel that only reads reaches on the same GPU. A result is
checked before it is timed: a layer whose product is further from the unquantized one than its grid explains is reported
as wrong. Up to 64 rows our kernels take rotated activations, as in the fused decode step, where the rotation is part of
the kernel before; from 65 rows on the figure is the whole op. Peers: benchmarks/cuda_peers.py; a peer that is not
installed or fails is reported as such. MLX's affine 4-bit layers are timed beside ours by benchmarks.mlx_cuda.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SHAPES = ("4096x4096", "6144x4096", "24576x4096", "4096x12288")  # N x K: o, q/k/v, gate/up, down of Qwen3-8B
ROWS = (1, 8, 16, 2048)
OURS = ("HLWQ exact", "HLWQ int8")
LIBRARIES = ("torch", "triton", "torchao", "bitsandbytes", "gemlite", "polarquant")


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.kernels needs an NVIDIA GPU; benchmarks.cuda_model estimates other cards without one")
        return 1
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    result = measure(shapes, arguments.rows, arguments.only)
    print(table(result))
    if arguments.output:
        path = Path(arguments.output)
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(result) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    out.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="outputs x inputs")
    out.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M", help="rows of activations")
    out.add_argument("--only", nargs="+", metavar="NAME", help="implementations to run, by the names of the table")
    out.add_argument("--output", metavar="PATH", help="write PATH.json and PATH.md")
    return out


def measure(shapes: list[tuple[int, int]], rows: list[int], only: list[str] | None) -> dict:
    """Time everything; one record a shape, number of rows and implementation."""
    import torch

    from benchmarks.cuda_hlwq import hlwq
    from benchmarks.cuda_peers import PEERS
    from benchmarks.cuda_timing import read_bandwidth

    builders = {name: partial(hlwq, mode=name.split()[1]) for name in OURS} | PEERS
    if only:
        builders = {name: builders[name] for name in only}
    bandwidth = read_bandwidth()
    records = []
    for n, k in shapes:
        weight = torch.randn((n, k), device="cuda", dtype=torch.bfloat16)
        for m in rows:
            x = torch.randn((m, k), device="cuda", dtype=torch.bfloat16)
            for name, build in builders.items():
                try:
                    outcome = run(build, weight, x, bandwidth)
                except Exception as error:  # another project's failure is a result; ours stops the benchmark
                    if name in OURS:
                        raise
                    outcome = {"error": f"failed: {type(error).__name__}: {error}"}
                record = {"n": n, "k": k, "m": m, "name": name, **outcome}
                records.append(record)
                print(json.dumps(record), file=sys.stderr, flush=True)
    names = f" --only {' '.join(map(repr, only))}" if only else ""
    sizes = " ".join(f"{n}x{k}" for n, k in shapes)
    return {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.kernels --shapes {sizes} --rows {' '.join(map(str, rows))}{names}",
        "read_bandwidth": bandwidth,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "records": records,
    }


def run(build, weight, x, bandwidth: float) -> dict:
    """Check one implementation, then time it; what went wrong otherwise."""
    import torch

    from benchmarks.cuda_timing import time_calls

    try:
        entry = build(weight, x)
    except ImportError as error:
        return {"error": f"not installed ({error})"}
    expected = x.float() @ weight.float().T
    error = ((entry.calls[0]().float() - expected).norm() / expected.norm()).item()
    if not error <= entry.tolerance:  # NaN too
        return {"error": f"wrong: relative error {error:.3g} of at most {entry.tolerance}"}
    us, spread = time_calls(entry.calls)
    torch.cuda.empty_cache()
    share = entry.weight_bytes / (us * 1e-6) / bandwidth
    return {"us": us, "spread_us": spread, "bytes": entry.weight_bytes, "share": share, "relative_error": error}


def table(result: dict) -> str:
    """Markdown: one table for each number of rows, implementations down, shapes across."""
    records = result["records"]
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in records))
    lines = [f"{result['gpu']}, {result['read_bandwidth'] / 1e12:.2f} TB/s read by a kernel that only reads"]
    lines.append(", ".join(f"{name} {number}" for name, number in result["libraries"].items() if number))
    for m in dict.fromkeys(r["m"] for r in records):
        lines += ["", f"M = {m}: microseconds (share of the read bandwidth; times the speed of bf16)", ""]
        lines.append("| N x K | " + " | ".join(f"{n}x{k}" for n, k in shapes) + " |")
        lines.append("|---" * (len(shapes) + 1) + "|")
        for name in dict.fromkeys(r["name"] for r in records):
            cells = [_cell(records, n, k, m, name) for n, k in shapes]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(records: list[dict], n: int, k: int, m: int, name: str) -> str:
    at_shape = {r["name"]: r for r in records if (r["n"], r["k"], r["m"]) == (n, k, m)}
    record = at_shape.get(name, {"error": ""})
    if "error" in record:
        return record["error"].split(":")[0].split(" (")[0]
    base = at_shape.get("bf16 cuBLAS", {}).get("us")
    ratio = f"; {base / record['us']:.2f}x" if base else ""
    spread = f" ± {record['spread_us']:.2f}" if "spread_us" in record else ""
    return f"{record['us']:.2f}{spread} ({record['share']:.0%}{ratio})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
