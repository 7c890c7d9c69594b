"""Runs the source of an `mx.fast.metal_kernel` on a CPU, and judges it.

MLX itself generates the full Metal source on Linux while a function is traced for export; this package compiles that
very text with clang, runs its threadgroups as fibers with 32-lane collectives, and in checking mode reports data races,
missing barriers, out-of-bounds and uninitialized accesses, divergence in collectives and too much threadgroup memory.

    with metal_cpu.emulated():         # mx.fast.metal_kernel now builds emulated kernels
        y = some_mlx_function(x)       # every Metal dispatch inside runs here, checked

source.py    rules of the Metal language that clang would not enforce, and the few edits of the text
compiler.py  clang, with address spaces enforced and accesses instrumented; objects cached by hash
kernel.py    the stand-in for mx.fast.metal_kernel
shim/        metal_stdlib in C++;   runtime/  fibers, collectives, barriers, checker

What it cannot tell: whether Apple's compiler accepts the text, how fast it is, the order of a hardware reduction,
fast-math and denormals, and memory effects finer than a barrier.
"""

from tests.metal_cpu.compiler import CompileError, clang_missing
from tests.metal_cpu.kernel import EmulatedKernel, EmulationError, emulated

__all__ = ["CompileError", "EmulatedKernel", "EmulationError", "clang_missing", "emulated"]
