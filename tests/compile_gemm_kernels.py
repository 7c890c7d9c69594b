"""Compile the kernels with inline assembly for a GPU that is not here: test_cuda_gemm_compile.py runs this.

python tests/compile_gemm_kernels.py CAPABILITY BITS MODE BLOCK K     # kernel, instructions, on tensor cores
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cuda_model import Recorder, disassemble
from convert.codebook import codebook
from hlwq_cuda import ops
from hlwq_cuda.kernels import dequantize, gemm, gemm_mma, prefill_int8, rotate
from hlwq_cuda.kernels.plain import Activation
from hlwq_cuda.kernels.tables import make_table

ROWS, OUTPUTS = 12, 40


def main(capability: int, bits: int, mode: str, block: int, width: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = empty(OUTPUTS, width * bits // 32, dtype=torch.int32)
    norms = empty(OUTPUTS, width // block, dtype=torch.float16)
    table = make_table(codebook(bits), bits).to("meta")
    values = empty(ROWS, width, dtype=torch.int8 if mode == "int8" else torch.float16)
    activation = Activation(values, empty(ROWS, width // block), empty(ROWS, width // 32))
    out = empty(ROWS, OUTPUTS, dtype=torch.bfloat16)
    config = gemm.pick(ROWS, OUTPUTS, width // 32, mode == "int8", 132)
    recorder = Recorder(gemm_mma, "gemm_mma_kernel")
    with recorder:
        weight = (codes, norms, table, None, out, bits, block, mode)
        gemm.gemm(activation, *weight, config, {"PDL": capability >= 90})
    report("gemm", recorder, capability)
    recorder = Recorder(dequantize, "dequantize_kernel")
    with recorder:
        dequantize.dequantize(codes, norms, table, empty(OUTPUTS, width, dtype=torch.bfloat16), bits, block)
    report("dequantize", recorder, capability)
    if mode == "int8" and bits <= ops.PREFILL_INT8_MAX_BITS:
        units, steps = empty(OUTPUTS, width, dtype=torch.int8), empty(OUTPUTS)
        recorder = Recorder(dequantize, "dequantize_int8_kernel")
        with recorder:
            dequantize.dequantize_int8(codes, norms, table, units, steps, bits, block)
        report("dequantize_int8", recorder, capability)
        recorder = Recorder(rotate, "quantize_rows_kernel")
        with recorder:
            rotate.quantize_rows(empty(ROWS, width, dtype=torch.bfloat16), block, {"PDL": capability >= 90})
        report("quantize_rows", recorder, capability)
        recorder = Recorder(prefill_int8, "product_kernel")
        with recorder:
            values, scales = empty(ROWS, width, dtype=torch.int8), empty(ROWS)
            tile = prefill_int8.pick(2048, 4096, 132, (capability // 10, capability % 10))
            prefill_int8.product(values, units, scales, steps, None, out, tile)
        report("product", recorder, capability)


def report(name: str, recorder: Recorder, capability: int) -> None:
    opcodes = disassemble(recorder.compile(capability))
    print(name, len(opcodes), sum(opcode.startswith(("HMMA", "IMMA", "HGMMA", "IGMMA")) for opcode in opcodes))


if __name__ == "__main__":
    capability, bits, mode, block, width = sys.argv[1:]
    main(int(capability), int(bits), mode, int(block), int(width))
