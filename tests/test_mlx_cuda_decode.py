"""The 4-bit decoder of the CUDA kernels, compiled for the CPU with prmt as the PTX manual has it: every code exact."""

from __future__ import annotations

import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert import packing
from convert.codebook import codebook
from hlwq_mlx import cuda
from tests.metal_cpu import require
from tests.metal_cpu.compiler import CLANG

pytestmark = require.emulator

PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
struct uint4 { uint32_t x, y, z, w; };
template <typename T> T __ldcs(const T* p) { return *p; }
float __half2float(int);
int __ushort_as_half(unsigned short);
float __uint_as_float(uint32_t);
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t nibble = selector >> (4 * i) & 15, byte = bytes >> (8 * (nibble & 7)) & 255;
    out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return out;
}
#define HLWQ_PRMT prmt
%s
int main(int, char** words) {
  for (char** word = words + 1; *word; word++) {
    uint32_t pairs[4];
    hlwq_decode8(strtoul(*word, nullptr, 10), pairs);
    printf("%%u %%u %%u %%u\n", pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
"""


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_every_code_in_every_position(dtype: mx.Dtype, tmp_path: Path):
    decoder = cuda.decoder(codebook(4), 128)
    assert decoder.in_bytes
    source = PROGRAM % (cuda._defines(decoder, dtype) + cuda._text("decode.cuh"))
    (tmp_path / "decode.cpp").write_text(source)
    # the conversions to float are declared only: decode.cuh's other functions are dropped, unused and inline
    command = [CLANG, "-std=c++17", "-O1", "-w", "decode.cpp", "-o", "decode"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    codes = np.stack([(np.arange(16) + i) % 16 for i in range(8)], axis=1).astype(np.uint8)
    words = packing.pack(np.tile(codes, 4), 4)[:, 0]
    out = subprocess.run([tmp_path / "decode", *map(str, words)], check=True, capture_output=True, text=True).stdout
    halves = np.array([line.split() for line in out.splitlines()], np.uint32).view(np.uint16)
    exact = mx.array(np.array(decoder.values)[codes], mx.float32).astype(dtype)
    assert np.array_equal(halves, np.array(exact.view(mx.uint16)))
