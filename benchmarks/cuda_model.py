"""A MODEL, not a measurement: the share of a card's memory bandwidth that our 4-bit kernels can reach.

    python -m benchmarks.cuda_model            # needs Triton, no GPU

The kernels are compiled for each card and their machine instructions counted; as they are fully unrolled, a count over
all of a lane's weights is exact. A multiprocessor issues four instructions of 32 lanes a clock, and half
of that rate for the shifts, permutes and logic of the decoder. The time that takes, against the time to read the bytes
at 92 % of the memory's nominal rate (a usual ceiling), bounds the share of bandwidth. Latency, traffic between caches,
the start and end of a kernel and the clock under load are left out: at M = 8 an H200 reached 49 % (exact) and 63 %
(int8) of its read bandwidth where the bound is 92 %. Cards with less bandwidth for each multiprocessor come closer.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

N, K = 24576, 4096  # gate and up projections of Qwen3-8B
READABLE = 0.92
ISSUE, LOGIC = 128, 64  # lanes a clock and multiprocessor
LOGIC_OPCODES = ("LOP3", "SHF", "PRMT", "IADD3", "ISETP", "SEL", "LEA", "SGXT", "BMSK", "VIADD", "VIMNMX", "I2F")
BYTES_A_WEIGHT = (4 + 16 / 128) / 8


class Card(NamedTuple):
    """Vendor's numbers: compute capability, multiprocessors, boost clock in GHz, memory in GB/s."""

    capability: int
    processors: int
    clock: float
    memory: float


CARDS = {
    "RTX 3090": Card(86, 82, 1.695, 936),
    "RTX 4090": Card(89, 128, 2.52, 1008),
    "RTX 5090": Card(120, 170, 2.407, 1792),
    "RTX PRO 6000": Card(120, 188, 2.617, 1792),
    "A100 80GB": Card(80, 108, 1.41, 2039),
    "H200": Card(90, 132, 1.98, 4800),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_model", description=__doc__.splitlines()[0])
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), metavar="CARD", help=", ".join(CARDS))
    cards = parser.parse_args(argv).cards
    print(f"MODEL from instruction counts, {N}x{K}, 4 bits: instructions a weight (logic) -> bound on the share")
    kinds = [(m, mode) for m in (1, 8, 16) for mode in ("exact", "int8")]
    print("| card | " + " | ".join(f"M = {m} {mode}" for m, mode in kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for name in cards:
        card, cells = CARDS[name], []
        for m, mode in kinds:
            total, logic = instructions(m, mode, card)
            cells.append(f"{total:.1f} ({logic:.1f}) -> {share(total, logic, card):.0%}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


def share(total: float, logic: float, card: Card) -> float:
    """The bound: bytes over the longer of reading and computing, relative to the nominal memory rate."""
    clocks = max(total / ISSUE, logic / LOGIC)
    compute = clocks / (card.processors * card.clock * 1e9)
    memory = BYTES_A_WEIGHT / (card.memory * 1e9)
    return memory / max(memory / READABLE, compute)


def instructions(m: int, mode: str, card: Card) -> tuple[float, float]:
    """Machine instructions a weight, and those of the logic pipe, of the kernel that M rows take on this card."""
    import torch

    from convert.codebook import codebook
    from hlwq_cuda.kernels import gemm, gemm_mma, gemv, gemv_gluon
    from hlwq_cuda.kernels.plain import Activation
    from hlwq_cuda.kernels.tables import make_table

    meta = torch.device("meta")
    values = torch.empty((m, K), dtype=torch.int8 if mode == "int8" else torch.float16, device=meta)
    activation = Activation(values, torch.empty((m, K // 128), device=meta), torch.empty((m, K // 32), device=meta))
    codes = torch.empty((N, K // 8), dtype=torch.int32, device=meta)
    norms = torch.empty((N, K // 128), dtype=torch.float16, device=meta)
    table = make_table(codebook(4), 4).to(meta)
    out = torch.empty((m, N), dtype=torch.bfloat16, device=meta)
    weight = (codes, norms, table, None, out, 4, 128, mode)
    launch = {"PDL": card.capability >= 90}
    if m == 1:
        recorder = Recorder(gemv_gluon, "gemv_gluon_kernel")
        config = gemv.pick(N, K // 32, True, card.processors)
        with recorder:
            gemv.gemv(activation, *weight, config, launch)
        outputs, lanes = config.rows, 32 * config.warps
    else:
        recorder = Recorder(gemm_mma, "gemm_mma_kernel")
        config = gemm.pick(m, N, K // 32, mode == "int8", card.processors)
        with recorder:
            gemm.gemm(activation, *weight, config, launch)
        outputs, lanes = 16 * config.output_tiles, 32 * config.warps
    opcodes = disassemble(recorder.compile(card.capability))
    weights = outputs * K / lanes
    return len(opcodes) / weights, sum(opcode.startswith(LOGIC_OPCODES) for opcode in opcodes) / weights


class Recorder:
    """Stands in for a module's kernel, to compile what would be launched for a GPU that is not here."""

    def __init__(self, module, name: str) -> None:
        self.module, self.name, self.kernel = module, name, getattr(module, name)

    def __enter__(self) -> None:
        setattr(self.module, self.name, self)

    def __exit__(self, *exception) -> None:
        setattr(self.module, self.name, self.kernel)

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **keywords) -> None:
        self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False)) | keywords

    def compile(self, capability: int) -> bytes:
        """The machine code (cubin) of the recorded launch."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
        from triton.tools.tensor_descriptor import TensorDescriptor

        constexprs = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if name in constexprs:
                signature[name], constants[(position,)] = "constexpr", value
                continue
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{_TYPES[str(value.base.dtype)]}{list(value.block_shape)}>"
                continue
            signature[name] = _SCALARS.get(type(value)) or "*" + _TYPES[str(value.dtype)]
            if type(value) not in _SCALARS or (isinstance(value, int) and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        make = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = make(self.kernel, signature, constants, attributes)
        options = {name: self.arguments[name] for name in ("num_warps", "num_stages") if name in self.arguments}
        return triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["cubin"]


_SCALARS = {int: "i32", float: "fp32"}
_TYPES = {
    "torch.int8": "i8",
    "torch.int32": "i32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
}


def disassemble(cubin: bytes) -> list[str]:
    """Opcodes of the code, by the disassembler that Triton's package carries."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M)
    return [opcode for opcode in opcodes if opcode != "NOP"]


if __name__ == "__main__":
    sys.exit(main())
