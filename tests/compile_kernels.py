"""Compiles the GEMV kernels for every supported GPU, without one: run as a script, outside Triton's interpreter.

    python tests/compile_kernels.py              # a selection that covers every kind and every GPU
    python tests/compile_kernels.py --all

One line of JSON for each kernel.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from hlwq_cuda.kernels.dot import KINDS
from hlwq_cuda.kernels.gemv import AHEAD, gemv_kernel
from hlwq_cuda.kernels.gemv_gluon import gemv_gluon_kernel

CAPABILITIES = (80, 86, 89, 90, 100, 120)
TYPES = {
    "values": "*i32",
    "scales": "*fp32",
    "half_sums": "*fp32",
    "mean_squares": "*fp32",
    "codes": "*i32",
    "norms": "*fp16",
    "table": "*i32",
    "bias": "*fp16",
    "out": "*fp16",
    "N": "i32",
    "eps": "fp32",
}


def compile_gemv(capability: int, bits: int, mode: str, gluon: bool, units: int = 64):
    """The compiled kernel for K = 2048 and B = 128, four rows a thread block."""
    kernel, source = (gemv_gluon_kernel, GluonASTSource) if gluon else (gemv_kernel, ASTSource)
    values = {
        "KP": 2048,
        "B": 128,
        "BITS": bits,
        "MODE": mode,
        "ROWS": 4,
        "UNITS": units,
        "HAS_BIAS": True,
        "NORMED": True,
        "PTX": True,
        "AHEAD": AHEAD[mode],
    }
    values |= {"PDL": capability >= 90, "num_warps": units // 32}
    names = kernel.arg_names
    signature = {name: TYPES.get(name, "constexpr") for name in names}
    constants = {(i,): values[name] for i, name in enumerate(names) if name not in TYPES}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if TYPES.get(name, "")[:1] == "*"}
    target = GPUTarget("cuda", capability, 32)
    source = source(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": units // 32})


def main() -> None:
    jobs = [(capability, *kind, gluon) for capability in CAPABILITIES for kind in KINDS for gluon in (False, True)]
    if "--all" not in sys.argv:  # kind i on GPU i, round the list
        count = len(CAPABILITIES)
        jobs = [(CAPABILITIES[(i + g) % count], *kind, g) for i, kind in enumerate(KINDS) for g in (False, True)]
    for capability, bits, mode, gluon in jobs:
        compiled = compile_gemv(capability, bits, mode, gluon)
        name = "gluon" if gluon else "plain"
        facts = {"kernel": name, "capability": capability, "bits": bits, "mode": mode}
        print(json.dumps(facts | {"shared_bytes": compiled.metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
