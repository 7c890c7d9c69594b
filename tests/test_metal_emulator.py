"""The Metal emulator proves itself: three correct kernels agree with float64 and are clean, and every injected bug is
caught. The kernels are of the kinds that this project ships: a table in threadgroup memory with tails, shuffles, tiles.
"""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_cpu
from tests.metal_cpu import require

pytestmark = require.emulator

ROWS, COLUMNS, BLOCK = 30, 640, 128  # 30 rows: not whole groups of 4 and 8; 640: not whole steps of 512

# y[n] = sum over blocks of norms[n, block] * sum of table[code] * x; two simdgroups, four rows each
GEMV = """
  constexpr int R = 4;
  constexpr int WORDS = K / 8, BLOCKS = K / 128;
  threadgroup float table_s[16];
  uint lane = thread_index_in_simdgroup;
  uint tid = thread_index_in_threadgroup;
  if (tid < 16) table_s[tid] = table[tid];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int row0 = int(threadgroup_position_in_grid.y * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * R;
  const device half* xs = x;
  float sum[R] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int k = int(lane) * 16; k < K; k += 512) {
    for (int r = 0; r < R; r++) {
      int row = row0 + r;
      if (row < N) {
        uint2 w = *(const device uint2*)(codes + row * WORDS + k / 8);
        float part = 0.0f;
        for (int i = 0; i < 8; i += 4) {
          float4 a = float4(*(const device half4*)(xs + k + i));
          float4 b = float4(*(const device half4*)(xs + k + 8 + i));
          for (int j = 0; j < 4; j++) {
            part += table_s[(w.x >> (4 * (i + j))) & 0xf] * a[j];
            part += table_s[(w.y >> (4 * (i + j))) & 0xf] * b[j];
          }
        }
        sum[r] += part * float(norms[row * BLOCKS + k / 128]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    float total = simd_sum(sum[r]);
    if (lane == 0 && row0 + r < N) y[row0 + r] = total;
  }
"""

# out = x @ H_128 / sqrt(128), one simdgroup a block, four values a lane
ROTATE = """
  uint lane = thread_index_in_simdgroup;
  uint block = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
  if (block >= uint(x_shape[0])) return;
  const device float* from = x + block * 128 + lane * 4;
  float a = from[0] + from[1], b = from[0] - from[1], c = from[2] + from[3], d = from[2] - from[3];
  float v[4] = {a + c, b + d, a - c, b - d};
  for (ushort s = 1; s < 32; s <<= 1) {
    for (int i = 0; i < 4; i++) {
      float other = simd_shuffle_xor(v[i], s);
      v[i] = (lane & s) ? (other - v[i]) : (v[i] + other);
    }
  }
  for (int i = 0; i < 4; i++) out[block * 128 + lane * 4 + i] = v[i] * 0.08838834764831845f;
"""

# c = a @ b^T in tiles of 8 x 32, four simdgroups, through threadgroup memory
GEMM = """
  threadgroup float as[8 * 32];
  threadgroup float bs[32 * 32];
  threadgroup float cs[8 * 32];
  int M = a_shape[0], N = b_shape[0], K = a_shape[1];
  uint tid = thread_index_in_threadgroup;
  uint sg = simdgroup_index_in_threadgroup;
  int n0 = int(threadgroup_position_in_grid.x) * 32, m0 = int(threadgroup_position_in_grid.y) * 8;
  simdgroup_float8x8 acc = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k0 = 0; k0 < K; k0 += 32) {
    for (int i = int(tid); i < 1024; i += 128) bs[i] = n0 + i / 32 < N ? b[(n0 + i / 32) * K + k0 + i % 32] : 0.0f;
    for (int i = int(tid); i < 256; i += 128) as[i] = m0 + i / 32 < M ? a[(m0 + i / 32) * K + k0 + i % 32] : 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < 32; k += 8) {
      simdgroup_float8x8 fa, fb;
      simdgroup_load(fa, as + k, 32);
      simdgroup_load(fb, bs + sg * 8 * 32 + k, 32, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(acc, fa, fb, acc);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(acc, cs + sg * 8, 32);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(tid); i < 256; i += 128) {
    int m = m0 + i / 32, n = n0 + i % 32;
    if (m < M && n < N) c[m * N + n] = cs[i];
  }
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def gemv(source: str, x_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (ROWS, COLUMNS), dtype=np.uint32)
    words = (codes.reshape(ROWS, -1, 8) << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    table = np.sort(random.standard_normal(16)).astype(np.float32)
    norms = random.uniform(0.5, 1.5, (ROWS, COLUMNS // BLOCK)).astype(np.float16)
    x = (random.standard_normal(COLUMNS) * x_scale).astype(np.float16)
    weight = table.astype(np.float64)[codes] * np.repeat(norms.astype(np.float64), BLOCK, axis=1)
    kernel = mx.fast.metal_kernel("gemv", ["x", "codes", "table", "norms"], ["y"], source)
    (y,) = kernel(
        inputs=[mx.array(x), mx.array(words), mx.array(table), mx.array(norms)],
        template=[("K", COLUMNS), ("N", ROWS)],
        grid=(32, 2 * -(-ROWS // 8), 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(ROWS,)],
        output_dtypes=[mx.float32],
    )
    return np.array(y), weight @ x.astype(np.float64)


def rotate(source: str) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)  # 6 blocks: not whole groups of 4
    kernel = mx.fast.metal_kernel("rotate", ["x"], ["out"], source)
    (out,) = kernel(
        inputs=[mx.array(x)],
        grid=(32 * 8, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[mx.float32],
    )
    hadamard = np.ones((1, 1))
    while len(hadamard) < 128:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.array(out), x.astype(np.float64) @ hadamard / np.sqrt(128)


def gemm(source: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    a = random.standard_normal((11, 64)).astype(np.float32)
    b = random.standard_normal((40, 64)).astype(np.float32)
    kernel = mx.fast.metal_kernel("gemm", ["a", "b"], ["c"], source, header="#include <metal_simdgroup_matrix>\n")
    (c,) = kernel(
        inputs=[mx.array(a), mx.array(b)],
        grid=(128 * 2, 2, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(11, 40)],
        output_dtypes=[mx.float32],
    )
    return np.array(c), a.astype(np.float64) @ b.T.astype(np.float64)


KERNELS = {"gemv": (gemv, GEMV), "rotate": (rotate, ROTATE), "gemm": (gemm, GEMM)}


def error(result: tuple[np.ndarray, np.ndarray]) -> float:
    got, expected = result
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", KERNELS)
def test_correct_kernels_are_clean_and_right_in_every_order(name: str):
    run, source = KERNELS[name]
    for mode, order in (("check", 0), ("fast", 0), ("fast", 1), ("fast", 7)):
        with metal_cpu.emulated(mode, order):
            # float32 sums of at most 640 products of order one: 640 roundings of 2**-24, far below 1e-5
            assert error(run(source)) < 1e-5, (mode, order)


def nth(source: str, old: str, new: str, index: int) -> str:
    at = [m.start() for m in re.finditer(re.escape(old), source)][index]
    return source[:at] + new + source[at + len(old) :]


# what is wrong, kernel, text, replacement, which occurrence, how it must be caught: "WRONG" is by the numbers
BUGS = [
    ("no barrier after staging the table", "gemv", BARRIER, "", 0, "RACE|UNINITIALIZED"),
    ("a simdgroup barrier for two simdgroups", "gemv", "threadgroup_barrier", "simdgroup_barrier", 0, "RACE"),
    ("a barrier that orders no memory", "gemv", "mem_threadgroup)", "mem_none)", 0, "RACE"),
    ("a barrier that orders device memory only", "gemv", "mem_threadgroup)", "mem_device)", 0, "RACE"),
    ("pointer into the wrong space", "gemv", "const device half* xs", "const threadgroup half* xs", 0, "error"),
    ("cast to another space", "gemv", "(const device uint2*)", "(const threadgroup uint2*)", 0, "address space"),
    ("pointer without a space", "gemv", "const device half* xs", "const half* xs", 0, "address space"),
    ("lanes start one chunk late", "gemv", "int(lane) * 16", "int(lane + 1) * 16", 0, "WRONG"),
    ("codes in the wrong order", "gemv", "w.x >> (4 * (i + j))", "w.x >> (28 - 4 * (i + j))", 0, "WRONG"),
    ("half accumulator overflows", "gemv", "float part = 0.0f", "half part = 0.0h", 0, "WRONG"),
    ("no guard on the tail of K", "gemv", "k < K; k += 512", "k < 1024; k += 512", 0, "OUT OF BOUNDS"),
    ("no guard on loads of the tail of N", "gemv", "if (row < N)", "if (row <= N)", 0, "OUT OF BOUNDS"),
    ("no guard on stores of the tail of N", "gemv", " && row0 + r < N", "", 0, "OUT OF BOUNDS"),
    ("norm of the wrong block", "gemv", "k / 128]", "k / 64]", 0, "WRONG|OUT OF BOUNDS"),
    ("reduction inside a branch", "gemv", "float total = simd_sum(sum[r]);", "if (lane > 0) continue; float total = "
     "simd_sum(sum[r]);", 0, "DIVERGENCE"),
    ("index beyond the table", "gemv", "& 0xf]", "& 0x1f]", 0, "UNDEFINED out_of_bounds|OUT OF BOUNDS"),
    ("one table entry never staged", "gemv", "tid < 16", "tid < 15", 0, "UNINITIALIZED"),
    ("every lane stores the result", "gemv", "lane == 0 && ", "", 0, "RACE"),
    ("misaligned vector load", "gemv", "(xs + k + i)", "(xs + k + i + 1)", 0, "MISALIGNED"),
    ("row stride in bytes, not words", "gemv", "row * WORDS", "row * WORDS * 4", 0, "OUT OF BOUNDS"),
    ("rows of the other simdgroup", "gemv", "simdgroup_index_in_threadgroup) * R", "0) * R", 0, "RACE|WRONG"),
    ("write to an input", "gemv", "if (tid < 16)", "table[0] = 1.0f; if (tid < 16)", 0, "error"),
    ("a double", "gemv", "float total", "double total", 0, "not a Metal type"),
    ("a lambda", "gemv", "float total =", "auto f = [](float v) { return v; }; float total = f(1.0f) *", 0, "lambda"),
    ("shuffle beyond the simdgroup", "rotate", "s < 32", "s < 64", 0, "shuffle from a lane"),
    ("last stage missing", "rotate", "s < 32", "s < 16", 0, "WRONG"),
    ("sign of a stage flipped", "rotate", "(other - v[i]) : ", "(v[i] - other) : ", 0, "WRONG"),
    ("one lane returns early", "rotate", "return;", "return; if (lane == 31) return;", 0, "DIVERGENCE"),
    ("no guard on the last group", "rotate", "if (block >= uint(x_shape[0])) return;", "", 0, "OUT OF BOUNDS"),
    ("no barrier before the product", "gemm", BARRIER, "", 0, "RACE|UNINITIALIZED"),
    ("no barrier before the next tile is staged", "gemm", BARRIER, "", 1, "RACE"),
    ("no barrier before the copy out", "gemm", BARRIER, "", 2, "RACE|UNINITIALIZED"),
    ("operand not transposed", "gemm", "ulong2(0, 0), true", "ulong2(0, 0), false", 0, "WRONG"),
    ("barrier in a branch", "gemm", BARRIER, "if (sg < 2) " + BARRIER, 0, "DIVERGENCE|RACE"),
    ("barrier that one simdgroup skips", "gemv", "if (tid < 16)", "if (tid < 32) " + BARRIER + "\n  if (tid < 16)", 0,
     "DIVERGENCE"),
    ("more than 32 KiB of threadgroup memory", "gemm", "float bs[32 * 32]", "float bs[32 * 32 * 8]", 0, "LIMIT"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[bug[0] for bug in BUGS])
def test_injected_bug_is_caught(bug: tuple):
    _, name, old, new, index, expected = bug
    run, source = KERNELS[name]
    broken = nth(source, old, new, index)
    scale = 400.0 if "overflow" in bug[0] else 1.0  # sums beyond 65504, inputs within half's range
    with metal_cpu.emulated("check"):
        try:
            result = run(broken, scale) if scale != 1.0 else run(broken)
            verdict = "" if error(result) < 1e-5 else "WRONG"
        except (metal_cpu.CompileError, metal_cpu.EmulationError) as caught:
            verdict = str(caught)
    assert re.search(expected, verdict), verdict or "not caught"


def test_half_overflow_control():
    """The large inputs of the overflow bug are within reach of the correct kernel."""
    with metal_cpu.emulated("check"):
        assert error(gemv(GEMV, 400.0)) < 1e-5


def test_collectives_and_rounding_agree_with_numpy_and_mlx():
    source = """
      uint g = thread_position_in_grid.x;
      float v = x[g];
      o[g * 8 + 0] = simd_sum(v);
      o[g * 8 + 1] = simd_max(v);
      o[g * 8 + 2] = simd_shuffle_xor(v, 5);
      o[g * 8 + 3] = simd_shuffle_down(v, 3);
      o[g * 8 + 4] = simd_prefix_inclusive_sum(v);
      o[g * 8 + 5] = simd_broadcast(v, 7);
      o[g * 8 + 6] = float(half(v) * half(3.3f) + half(0.1f));
      o[g * 8 + 7] = float(bfloat(v) * bfloat(1.7f));
    """
    x = np.random.default_rng(3).standard_normal(128).astype(np.float32)
    with metal_cpu.emulated("check"):
        kernel = mx.fast.metal_kernel("collectives", ["x"], ["o"], source)
        (o,) = kernel(
            inputs=[mx.array(x)],
            grid=(128, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(128, 8)],
            output_dtypes=[mx.float32],
        )
    got, groups, lanes = np.array(o), x.reshape(4, 32), np.arange(32)
    expected = (
        np.repeat(groups.sum(1), 32),
        np.repeat(groups.max(1), 32),
        groups[:, lanes ^ 5].ravel(),
        groups[:, np.where(lanes + 3 < 32, lanes + 3, lanes)].ravel(),
        np.cumsum(groups, 1).ravel(),
        np.repeat(groups[:, 7], 32),
    )
    assert np.abs(got[:, :6] - np.stack(expected, 1)).max() < 1e-5  # order of at most 32 float32 additions
    half = x.astype(np.float16) * np.float16(3.3) + np.float16(0.1)
    assert np.array_equal(got[:, 6], half.astype(np.float32))
    bfloat = mx.array(x).astype(mx.bfloat16) * mx.array(1.7).astype(mx.bfloat16)
    assert np.array_equal(got[:, 7], np.array(bfloat.astype(mx.float32)))


def test_small_inputs_live_in_constant_memory():
    """MLX passes inputs of fewer than eight elements as `constant`: a `device` pointer to one does not compile."""
    source = "const device float* p = x; y[thread_position_in_grid.x] = p[thread_position_in_grid.x];"

    def copy(n: int) -> np.ndarray:
        kernel = mx.fast.metal_kernel("copy", ["x"], ["y"], source)
        x = mx.arange(n).astype(mx.float32)
        arguments = {"grid": (n, 1, 1), "threadgroup": (n, 1, 1), "output_shapes": [(n,)]}
        return np.array(kernel(inputs=[x], output_dtypes=[mx.float32], **arguments)[0])

    with metal_cpu.emulated("check"):
        assert np.array_equal(copy(8), np.arange(8))
        with pytest.raises(metal_cpu.CompileError, match=r"constant|address space"):
            copy(7)
