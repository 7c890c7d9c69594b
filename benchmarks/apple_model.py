"""A model, not a measurement: what the Metal kernels cost a weight, and the tokens/s that follow on Apple GPUs.

    python -m benchmarks.apple_model --output benchmarks/results/apple_model.json     # needs clang++-19

Operations are counted by one rule for every kernel: MLX writes the full Metal source, clang compiles it to optimized
LLVM IR without vectorizing, and the instructions of the loop over K are counted and divided by the weights it covers.
Free: moves, address modes, half to float in an operand. Shifts and integer/float conversions take four cycles on Apple
GPUs where everything else takes one, but in a pipeline of their own (github.com/philipturner/metal-benchmarks).

Kernels: ours by each way; MLX's affine kernel (qmv_fast), cut at run time from the headers of the installed mlx; and
that of a peer with such codes, from the installed package jang (in the extra `test`).

Time of a token = max(bytes / (bandwidth * efficiency), weights * slots / (lanes * clock * .6)) + launches * 3 us,
the launches counted as of 32 layers of Qwen3's form. (Qwen3.5's recurrent layers take more, whatever the weights.)
Efficiency is set by the published speed of MLX's own 4-bit models where there is one, else .80.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from convert.codebook import codebook
from hlwq_mlx import metal
from hlwq_mlx.metal.decoder import Way, decoder
from tests.metal_cpu import compiler, emulated
from tests.metal_cpu import source as metal_source
from tests.metal_cpu.kernel import EmulatedKernel

COLUMNS, OUTPUTS = 4096, 4096
WEIGHTS_9B = 5.1e9 * 8 / 4.5  # Qwen3.5-9B: MLX's 4-bit file is 5.1 GB at 4.5 bits a weight
LAYERS, LAUNCH_SECONDS = 32, 3e-6
BESIDE = 5  # launches beside the layers: embedding, norm, rotation, head, choice of a token
# Launches a layer, of affine: norm, q, k, v, 2 norms of heads, 2 rotary, 2 cache writes, attention, o, sum, norm, gate,
# up, SwiGLU, down, sum.
AFFINE = 19
# Ours fused: norm, qkv, heads, 2 cache writes, attention, rotation, o + sum, norm, gate/up + SwiGLU, rotation, down and
# sum.
FUSED = 12
# Ours of several rows: norm, rotation, qkv, 2 norms of heads, 2 rotary, 2 cache writes, attention, rotation, o, sum,
# norm, rotation, gate/up, SwiGLU, rotation, down, sum.
SEVERAL_ROWS = 20
ALU_EFFICIENCY = 0.6
ROWS = (2, 3, 4, 5, 6, 8)  # of x, at once


class Chip(NamedTuple):
    gigabytes_per_second: float
    cores: int  # of 128 lanes
    gigahertz: float
    published: float | None = None  # tokens/s of Qwen3.5-9B in MLX's affine 4 bits


CHIPS = {
    "M1": Chip(68.25, 8, 1.278),
    "M1 Pro": Chip(200, 16, 1.296),
    "M1 Max": Chip(400, 32, 1.296),
    "M2": Chip(100, 10, 1.398),
    "M2 Max": Chip(400, 38, 1.398),
    "M3": Chip(100, 10, 1.38),
    "M3 Max": Chip(400, 40, 1.38),
    "M3 Ultra": Chip(819, 80, 1.38, published=101),  # Rapid-MLX issues 586, 636
    "M4": Chip(120, 10, 1.47, published=22),  # jitesh.dev, 2026-03
    "M4 Pro": Chip(273, 20, 1.578, published=43.4),  # Rapid-MLX issue 567
    "M4 Max": Chip(546, 40, 1.578),
}


class Count(NamedTuple):
    """Instructions of the loop over K, each divided by the weights of one pass."""

    simple: float  # FMA, add, and, compare: one cycle
    slow: float  # shifts and conversions: four, in their own pipeline
    loads: float  # device and threadgroup memory, of any width
    lookups: float  # the loads from threadgroup memory among them
    conflicts: float  # cycles of a lookup of 32 lanes

    @property
    def operations(self) -> float:
        return self.simple + self.slow + self.loads

    @property
    def slots(self) -> float:
        """Cycles of a lane: one issue an instruction, or the slow pipeline or threadgroup memory if that takes longer.

        A core starts four simdgroup instructions a cycle and (assumed) one lookup.
        """
        return max(self.operations, 4 * self.slow, 4 * self.lookups * self.conflicts)


# loops of constant length are unrolled whatever their size, the loop over K is not
UNROLL = [f"-mllvm={option}" for option in ("-unroll-runtime=false", "-unroll-allow-partial=false")]
UNROLL += ["-mllvm=-unroll-threshold=100000", "-mllvm=-unroll-full-max-count=64"]
SIMPLE = re.compile(
    r"= (?:tail )?(?:f(?:add|sub|mul|neg|cmp)|and|or|xor|add|sub|mul|icmp|select"
    r"|call [^@]*@llvm\.(?:fma|fmuladd|[us]min|[us]max))\b"
)
# a shift by 16 is how LLVM reads the upper half of a word; Apple's registers have 16-bit halves
SLOW = re.compile(r"= (?:(?:shl|lshr|ashr)(?! .*, 16$)|uitofp|sitofp|fptoui|fptosi)\b")
LOAD = re.compile(r"= load\b")
LOOKUP = re.compile(r"= load .* addrspace\(3\)")  # threadgroup memory


def count(name: str, text: str, weights: int, conflicts: float = 1.0) -> Count:
    """Count the largest loop of the kernel `name` in the Metal source `text`; one pass covers `weights` weights."""
    program = compiler.PRELUDE + metal_source.to_cpp(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cpp")
        path.write_text(program)
        flags = ["-O2", "-fno-vectorize", "-fno-slp-vectorize", *UNROLL, "-S", "-emit-llvm", "-o", "-"]
        done = subprocess.run(
            [compiler.CLANG, *compiler.LANGUAGE, *flags, str(path)], check=True, capture_output=True, text=True
        )
    function = next(f for f in done.stdout.split("\ndefine ")[1:] if name in f.split("\n", 1)[0]).split("\n}\n")[0]
    loop = _largest_loop(function)
    stray = [line.strip() for line in loop if "call" in line and "@llvm." not in line]
    if stray:
        raise RuntimeError(f"{name}: the loop calls a function, its operations would not be counted: {stray[0]}")
    totals = [sum(map(pattern_lanes(p), loop)) / weights for p in (SIMPLE, SLOW, LOAD, LOOKUP)]
    return Count(*totals, conflicts)


def pattern_lanes(pattern: re.Pattern):
    """Operations of a line: the lanes of a vector operation each count, a load of a vector is one."""

    def lanes(line: str) -> int:
        if not pattern.search(line):
            return 0
        vector = re.search(r"<(\d+) x ", line.split("= ", 1)[1])
        return int(vector[1]) if vector and pattern not in (LOAD, LOOKUP) else 1

    return lanes


def _largest_loop(function: str) -> list[str]:
    """The lines of the cycle of basic blocks with the most instructions."""
    blocks: dict[str, list[str]] = {"entry": []}
    for line in function.split("\n")[1:]:
        label = re.match(r"([\w.$-]+):", line)
        if label:
            blocks[label[1]] = []
        else:
            blocks[next(reversed(blocks))].append(line)
    after = {name: set(re.findall(r"label %([\w.$-]+)", "\n".join(lines))) for name, lines in blocks.items()}

    def reachable(start: str) -> set[str]:
        found, todo = set(), list(after[start])
        while todo:
            block = todo.pop()
            if block not in found:
                found.add(block)
                todo += after.get(block, ())
        return found

    reach = {name: reachable(name) for name in blocks}
    cycles = [{other for other in reach[name] if name in reach[other]} for name in blocks if name in reach[name]]
    return max(([line for block in cycle for line in blocks[block]] for cycle in cycles), key=len)


def generated(launch) -> tuple[str, str]:
    """(name, Metal source) of the one kernel that `launch()` starts."""
    found: list[tuple[str, str]] = []

    class Recorder(EmulatedKernel):
        def __call__(self, *, inputs, **call):
            call.pop("init_value", None)
            found.append(self.generate([mx.array(value) for value in inputs], **call)[:2])
            return [mx.zeros(shape, d) for shape, d in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

    with emulated():
        original, mx.fast.metal_kernel = mx.fast.metal_kernel, Recorder
        try:
            launch()
        finally:
            mx.fast.metal_kernel = original
    (pair,) = found
    return pair


def ours(bits: int, way: Way, rows: int = 1) -> Count:
    codes = mx.zeros((OUTPUTS, COLUMNS * bits // 32), mx.uint32)
    norms, x = mx.zeros((OUTPUTS, COLUMNS // 128), mx.float16), mx.zeros((rows, COLUMNS), mx.float16)
    metal._kernel.cache_clear()
    name, text = generated(lambda: metal.gemv(x, codes, norms, decoder(codebook(bits), 128, way)))
    # 256 entries: the expected most of 32 lanes that meet in one of 32 banks; up to 32 entries are one a bank
    conflicts = 3.5 if way is Way.PAIRS else 1.0
    return count(name, text, 4 * (16 if bits == 8 else 32), conflicts)  # rows a simdgroup, codes a chunk


def mlx_affine() -> Count:
    """MLX's qmv_fast, 4 bits, group 64: 4 rows and 16 weights a lane in a pass."""
    header = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels" / "quantized.h"
    text = header.read_text()
    signatures = (
        "inline constexpr short get_pack_factor",
        "inline constexpr short get_bytes_per_pack",
        "inline U load_vector(",
        "inline U qdot(",
        "METAL_FUNC void qmv_fast_impl(",
    )
    functions = "#define SIMD_SIZE 32\n" + "\n".join(_function(text, signature) for signature in signatures)
    body = """qmv_fast_impl<T, 64, 4>(w, scales, biases, x, y, sizes[0], sizes[1], threadgroup_position_in_grid,
      simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"""
    groups = mx.zeros((OUTPUTS, COLUMNS // 64), mx.float16)
    arrays = [mx.zeros((OUTPUTS, COLUMNS // 8), mx.uint32), groups, groups, mx.zeros((1, COLUMNS), mx.float16)]
    names = ["w", "scales", "biases", "x", "sizes"]

    def launch() -> None:
        kernel = mx.fast.metal_kernel("affine", names, ["y"], body, header=functions)
        kernel(
            inputs=[*arrays, mx.array([COLUMNS, OUTPUTS])],
            template=[("T", mx.float16)],
            grid=(32, OUTPUTS // 4, 1),
            threadgroup=(32, 2, 1),
            output_shapes=[(1, OUTPUTS)],
            output_dtypes=[mx.float16],
        )

    return count(*generated(launch), weights=4 * 16)


def _function(text: str, signature: str) -> str:
    """The template function with this signature, by its braces."""
    start = text.rindex("template <", 0, text.index(signature))
    depth, end = 1, text.index("{", text.index(signature)) + 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start:end]


def jang() -> Count:
    """The decode kernel of jang 2.5.50 (a peer), from the installed package: the layout of qmv_fast, a cubic a code."""
    from jang_tools.jangh import kernels as peer

    codes, scales = mx.zeros((1, OUTPUTS, COLUMNS // 8), mx.uint32), mx.zeros((1, OUTPUTS), mx.float16)
    x, expert = mx.zeros((1, COLUMNS), mx.float16), mx.array([0])
    peer._qmv_kernel.cache_clear()
    name, text = generated(lambda: peer.gather_qmv(x, codes, scales, None, expert, 4, x_per_dispatch=True))
    peer._qmv_kernel.cache_clear()
    return count(name, text, weights=4 * 16)


def tokens_per_second(chip: Chip, bits_per_weight: float, slots: float, launches: int) -> float:
    """Of a 9-billion-parameter model; `launches`: a layer."""
    efficiency = 0.80
    if chip.published:
        left = 1 / chip.published - _launch_seconds(AFFINE)
        efficiency = WEIGHTS_9B * 4.5 / 8 / (chip.gigabytes_per_second * 1e9 * left)
    memory = WEIGHTS_9B * bits_per_weight / 8 / (chip.gigabytes_per_second * 1e9 * efficiency)
    arithmetic = WEIGHTS_9B * slots / (chip.cores * 128 * chip.gigahertz * 1e9 * ALU_EFFICIENCY)
    return 1 / (max(memory, arithmetic) + _launch_seconds(launches))


def _launch_seconds(launches: int) -> float:
    """Of a token."""
    return (LAYERS * launches + BESIDE) * LAUNCH_SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="a JSON file")
    args = parser.parse_args()
    kernels = {
        "HLWQ 4 bits, polynomial": (ours(4, Way.POLYNOMIAL), 4.125),
        "HLWQ 4 bits, pairs": (ours(4, Way.PAIRS), 4.125),
        "HLWQ 4 bits, table": (ours(4, Way.TABLE), 4.125),
        "HLWQ 2 bits, table": (ours(2, Way.TABLE), 2.125),
        "HLWQ 3 bits, table": (ours(3, Way.TABLE), 3.125),
        "MLX affine 4 bits": (mlx_affine(), 4.5),
        "jang 4 bits, cubic": (jang(), 4 + 16 / COLUMNS),
    }
    for rows in ROWS:
        kernels[f"HLWQ 4 bits, table, M = {rows}"] = (ours(4, Way.TABLE, rows), 4.125)
    out: dict = {"note": "a model, not a measurement"}
    out |= {"operations a weight": {}, "tokens/s, 9B": {}, "time of M rows over one": {}}
    print(f"{'operations a weight':40} {'all':>6} {'simple':>7} {'slow':>6} {'loads':>6} {'slots':>6}")
    for name, (c, _) in kernels.items():
        row = [round(value, 3) for value in (c.operations, c.simple, c.slow, c.loads, c.slots)]
        out["operations a weight"][name] = row
        print(f"{name:40} {row[0]:6.2f} {row[1]:7.2f} {row[2]:6.2f} {row[3]:6.2f} {row[4]:6.2f}")
    one_row = {name: value for name, value in kernels.items() if "M =" not in name}
    print("\npredicted tokens/s of a 9B: " + ", ".join(one_row))
    for chip_name, chip in CHIPS.items():
        row = {}
        for name, (c, bits) in one_row.items():
            # jang's rotations are not counted
            launches = FUSED if name.startswith("HLWQ") else AFFINE
            row[name] = round(tokens_per_second(chip, bits, c.slots, launches), 1)
        out["tokens/s, 9B"][chip_name] = {**row, "published, MLX affine": chip.published}
        print(f"{chip_name:9}", *(f"{value:6.1f}" for value in row.values()), "published", chip.published)
    print("\npredicted time of a step of M rows over that of one row, M =", *ROWS)
    alone, bits = kernels["HLWQ 4 bits, table"]
    for chip_name, chip in CHIPS.items():
        times = [kernels[f"HLWQ 4 bits, table, M = {rows}"][0].slots for rows in ROWS]
        speed = tokens_per_second(chip, bits, alone.slots, FUSED)
        out["time of M rows over one"][chip_name] = row = {
            rows: round(speed / tokens_per_second(chip, bits, slots, SEVERAL_ROWS), 2)
            for rows, slots in zip(ROWS, times, strict=True)
        }
        print(f"{chip_name:9}", *(f"{value:6.2f}" for value in row.values()))
    if args.output:
        Path(args.output).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
