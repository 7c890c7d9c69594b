"""Compiles the kernels of a decode step, and of a prompt between its products, for three kinds of GPU, without one.

Run as a script, outside the interpreter.
Runs the step of a tiny model with every launch replaced by a compilation for its arguments. One line of JSON for each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hlwq_cuda.kernels import activation, attention, delta, gated, norm, rows, sample
from hlwq_cuda.kernels.plain import Activation

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiler:
    """Stands in for a kernel: a launch becomes a compilation."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Compiler:
        return self

    def __call__(self, *arguments, **named) -> None:
        kernel = self.kernel
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        signature, constants, aligned = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], aligned[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        facts = {"kernel": kernel.fn.__name__, "capability": self.capability, "shared_bytes": compiled.metadata.shared}
        print(json.dumps(facts), flush=True)


def compile_all(capability: int, format: str, head_dim: int, dtype: torch.dtype, qk_norm: bool) -> None:
    """Every kernel of a step and a prompt once: 4 heads in 2 groups, a cache of 256 tokens, blocks of 128."""
    Compiler.capability = capability
    launch = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    size = 4 * head_dim

    def row(length: int = size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(length, dtype=dtype)

    kind = {"int8": torch.int8, "exact": torch.float16, "plain": dtype}[format]
    squares = None if format == "plain" else row(-(-size // 128))
    out = Activation(row(dtype=kind), row(-(-size // 128)), row(-(-size // 32)), squares, 1e-6)
    norm.norm(row(), row(), row(dtype=dtype), 1e-6, row(), out, 128, format, launch)
    activation.silu_mul(row(2 * size), out, 128, format, launch)
    partials = attention.Partials.empty(4, 16, head_dim, torch.device("cpu"))
    gains = (row(head_dim, dtype), row(head_dim, dtype)) if qk_norm else None
    tables = (torch.empty(256, head_dim), torch.empty(256, head_dim))
    cache = torch.empty(2, 2, 256, head_dim, dtype=dtype)
    position = torch.zeros(1, dtype=torch.int64)
    attention.attention(row(2 * size), gains, tables, *cache, position, partials, 1e-6, 0.1, launch)
    attention.combine(partials, out, 128, format, launch)
    rows.add_norm(torch.empty(3, size), torch.empty(3, size, dtype=dtype), row(dtype=dtype), 1e-6, dtype)
    rows.silu_mul_rows(torch.empty(3, 2 * size, dtype=dtype))
    rows.split_heads(torch.empty(3, 2 * size, dtype=dtype), gains, tables, *cache, 5, 1e-6)
    gated.arrange(row(12 * head_dim), row(head_dim, torch.int32), row(8 * head_dim), 4, launch)
    gated.gate(row(), row(12 * head_dim), head_dim, out, 128, format, launch)
    shape = delta.Shape(2, 4, 128, 128, 4)
    weight = (torch.empty(1024, 4, dtype=dtype), row(4), row(4, dtype))
    memory = (torch.empty(4, 1024), torch.empty(4, 128, 128))
    delta.delta(row(1544, dtype), *weight, position, *memory, row(512), shape, launch)
    delta.gated_norm(row(512), row(512, dtype), row(128, dtype), 1e-6, out, 128, format, launch)
    sampler = sample.Sampler(5000, torch.device("cpu"), launch)
    sampler.sample(row(5000, dtype), position, position)


def main() -> None:
    for module in (activation, attention, delta, gated, norm, rows, sample):
        for name, kernel in list(vars(module).items()):
            launched = isinstance(kernel, triton.JITFunction) and kernel.fn.__module__ == module.__name__
            if launched and name.endswith("_kernel"):
                setattr(module, name, Compiler(kernel))
    compile_all(80, "exact", 64, torch.float16, False)
    compile_all(90, "int8", 128, torch.bfloat16, True)
    compile_all(120, "plain", 96, torch.bfloat16, True)


if __name__ == "__main__":
    main()
