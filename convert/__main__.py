"""`python -m convert`: quantize a model directory."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# one BLAS thread each: the conversion runs its own, and the environment is read when numpy loads
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from convert.errors import ConvertError
from convert.format import FormatError
from convert.pipeline import convert
from convert.plan import make_plan
from convert.recipe import make_recipe
from convert.source import open_source, refuse_quantized
from convert.target import TARGETS, open_target
from convert.writer import check_output


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--recipe", default="uniform")
    parser.add_argument("--embed-bits", type=int)
    parser.add_argument("--head-bits", type=int)
    parser.add_argument("--block-size", type=int)
    arguments = parser.parse_args(argv)
    try:
        check_output(arguments.output)
        recipe = make_recipe(arguments.recipe, arguments.bits, arguments.embed_bits, arguments.head_bits)
        source = open_source(arguments.model)
        refuse_quantized(source.directory)
        target = open_target(arguments.target, source.directory)
        plan = make_plan(target.tensors, recipe, arguments.block_size)
        report = convert(
            target,
            plan,
            arguments.output,
            source_identity=source.identity,
            max_shard_bytes=5 * 10**9,
            threads=os.cpu_count() or 1,
        )
    except (ConvertError, FormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{report.output}: {report.bits_per_weight:.3f} bits a weight, {report.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
