"""`python -m hlwq_mlx selfcheck` and `tune`: does every kernel work on this machine, and which way is fastest."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys

import mlx.core as mx


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 when all is well."""
    parser = argparse.ArgumentParser(prog="python -m hlwq_mlx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("selfcheck", help="every kernel against plain MLX operations, with GB/s")
    commands.add_parser("tune", help="time the ways of decoding on this Mac and remember the fastest")
    arguments = parser.parse_args(argv)
    device = mx.device_info().get("device_name", "unknown GPU")
    print(f"MLX {importlib.metadata.version('mlx')}, {device}", flush=True)
    try:
        return {"selfcheck": _selfcheck, "tune": _tune}[arguments.command]()
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _selfcheck() -> int:
    from hlwq_mlx.selfcheck import selfcheck

    failed = 0
    for result in selfcheck():
        failed += not result.passed
        speed = "" if result.gigabytes_per_second is None else f"{result.gigabytes_per_second:8.1f} GB/s"
        verdict = "pass" if result.passed else f"FAIL, {result.error:.3g} times the bound"
        print(f"{result.name:44} {verdict}{speed}", flush=True)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


def _tune() -> int:
    if not mx.metal.is_available():
        raise RuntimeError("tune chooses among the Metal kernels, and this MLX has no Metal GPU")
    from hlwq_mlx.checkpoint import SUPPORTED_BITS, codebook
    from hlwq_mlx.tune import tune

    for bits, times in tune({bits: codebook(bits) for bits in SUPPORTED_BITS}).items():
        best = min(times, key=times.get)
        print(f"{bits} bits: " + ", ".join(f"{way} {us:.1f} us" for way, us in times.items()) + f"; using {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
