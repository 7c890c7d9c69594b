// The CUDA that hlwq_mlx/cuda uses, in C++ on the fibers and collectives of tests/metal_cpu/runtime.
#pragma once
#include <cmath>
#include <cstring>

#include "runtime.h"

#define __device__
#define __shared__ static  // one thread block lives at a time; the driver registers each array with the checker
#define __align__(bytes) __attribute__((aligned(bytes)))

using __half = _Float16;
using __nv_bfloat16 = __bf16;
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Position {
  uint32_t x, y, z;
  explicit Position(const uint32_t* at) : x(at[0]), y(at[1]), z(at[2]) {}
};
#define threadIdx Position(emu_self()->position_in_threadgroup)
#define blockIdx Position(emu_self()->threadgroup_position)
#define blockDim Position(emu_self()->threads_per_threadgroup)
#define gridDim Position(emu_self()->threadgroups_per_grid)

template <typename A, typename B>
auto min(A a, B b) {
  return a < b ? a : b;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline void sincosf(float angle, float* sine, float* cosine) { *sine = std::sin(angle), *cosine = std::cos(angle); }
template <typename T>
T __ldcs(const T* from) {
  return *from;
}

#define CUDA_LINE int line = __builtin_LINE()  // the caller's line
inline void __syncthreads(CUDA_LINE) { emu_barrier(THREADGROUP_BARRIER, MEM_DEVICE | MEM_THREADGROUP, line); }
inline void __syncwarp(CUDA_LINE) { emu_barrier(SIMDGROUP_BARRIER, MEM_DEVICE | MEM_THREADGROUP, line); }

enum Operation : unsigned { SHUFFLE_XOR = 1, MATRIX_MULTIPLY };
inline float __shfl_xor_sync(uint32_t, float value, int mask, CUDA_LINE) {
  uint32_t active;
  const unsigned char* slots = emu_exchange(&value, sizeof value, line, SHUFFLE_XOR, &active);
  memcpy(&value, slots + SLOT_BYTES * (emu_self()->lane ^ mask), sizeof value);
  return value;
}

// mma.m16n8k16 with the fragments of the PTX manual: lane l holds the rows l / 4 and l / 4 + 8 of A, columns
// 2 (l % 4) and on; the column l / 4 of B; and the columns 2 (l % 4) and + 1 of D.
template <typename T>
void hlwq_mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, CUDA_LINE) {
  struct Fragments {
    T a[8], b[4];
  } mine;
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(&mine, words, sizeof words);
  uint32_t active;
  const unsigned char* slots = emu_exchange(&mine, sizeof mine, line, MATRIX_MULTIPLY, &active);
  auto fragments = [&](int lane) {
    Fragments of;
    memcpy(&of, slots + SLOT_BYTES * lane, sizeof of);
    return of;
  };
  const int self = emu_self()->lane;
  for (int i = 0; i < 4; i++) {
    const int row = self / 4 + i / 2 * 8, column = self % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const T a = fragments(row % 8 * 4 + k % 8 / 2).a[k / 8 * 4 + row / 8 * 2 + k % 2];
      const T b = fragments(column * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
      d[i] += float(a) * float(b);
    }
  }
}
