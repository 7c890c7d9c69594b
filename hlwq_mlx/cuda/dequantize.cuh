// The weight in the rotated basis, for products of many rows: codes uint32 [N, Kp * b / 32], norms half [N, Kp / B],
// table float [2^b] -> out T [N, Kp]. A thread decodes CODES codes, the fewest that are whole words and 16 bytes of T,
// STEPS times, a block of threads apart: neighbors read and write neighboring bytes, and STEPS loads are in flight.
#pragma once
#include "decode.cuh"

template <typename T, int BITS, int BLOCK, int CODES, int STEPS>
__device__ void hlwq_dequantize(
    const uint32_t* codes, const __half* norms, const float* table, size_t units, T* out) {
  constexpr int WORDS = CODES * BITS / 32;
  __shared__ float table_s[1 << BITS];
  hlwq_stage_table<BITS>(table, table_s);
  const size_t first = size_t(blockIdx.x) * blockDim.x * STEPS + threadIdx.x;
  uint32_t words[STEPS][WORDS];
  float norm[STEPS];
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const size_t unit = min(first + s * blockDim.x, units - 1);
    hlwq_load<WORDS>(codes + unit * WORDS, words[s]);
    norm[s] = float(norms[unit * CODES / BLOCK]);
  }
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const size_t unit = first + s * blockDim.x;
    if (unit >= units) return;
#pragma unroll
    for (int g = 0; g < CODES / 8; g++) {
      float c[8];
      hlwq_decode<BITS>(words[s], g, table_s, c);
      alignas(16) T values[8];
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = T(c[i] * norm[s]);
#pragma unroll
      for (int i = 0; i < int(sizeof(values)) / 16; i++)
        ((uint4*)(out + unit * CODES + g * 8))[i] = ((const uint4*)values)[i];
    }
  }
}
