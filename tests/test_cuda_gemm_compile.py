"""The kernels with inline assembly compile for GPUs that are not here (the interpreter can't run them)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

TESTS = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels carry NVIDIA's assembler for Linux only")
@pytest.mark.parametrize(
    ("capability", "bits", "mode", "block", "width"),
    [(90, 4, "int8", 128, 1024), (80, 6, "exact", 64, 576), (120, 3, "int8", 32, 1024)],
)
def test_compiles(capability: int, bits: int, mode: str, block: int, width: int):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, TESTS / "compile_gemm_kernels.py", capability, bits, mode, block, width]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = {name: (int(total), int(tensor)) for name, total, tensor in map(str.split, result.stdout.splitlines())}
    assert counts["gemm"][1] > 0  # the product runs on tensor cores
    assert counts["dequantize"][0] > counts["dequantize"][1] == 0
    if mode == "int8":
        assert counts["dequantize_int8"][0] > counts["dequantize_int8"][1] == 0
        assert counts["quantize_rows"][1] > 0 and counts["product"][1] > 0
