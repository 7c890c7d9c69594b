// y = x W^T for few rows, any bits and dtype (docs/format.md, step 5); gemv_mma.cuh serves the common ones.
// x T [rows, Kp] rotated, codes uint32 [.., N, Kp * b / 32], norms half [.., N, Kp / B], table float [2^b]
// -> y T [M, N]; with `experts` uint32 [pairs]: y T [pairs, N], one row against the matrix experts[pair].
//
// A thread block computes OUTPUTS outputs, its threads share K: a thread takes one chunk of each of these rows at a time
// (32 codes, 16 at 8 bits), so that OUTPUTS loads are in flight, and its activations serve all of them.
#pragma once
#include "decode.cuh"

template <typename T, int BITS, int BLOCK, int M, int OUTPUTS>
__device__ void hlwq_gemv(
    const T* x, const uint32_t* codes, const __half* norms, const float* table, const uint32_t* experts,
    int pairs_a_row, int N, int KP, T* y) {
  constexpr int CODES = BITS == 8 ? 16 : 32, WORDS = CODES * BITS / 32, MAX_WARPS = 4;
  const int chunks = KP / CODES, warps = blockDim.x / 32;
  __shared__ float table_s[1 << BITS];
  hlwq_stage_table<BITS>(table, table_s);
  const int row0 = blockIdx.x * OUTPUTS;
  const size_t pair = blockIdx.z, matrix = experts ? size_t(experts[pair]) * N : 0;
  const T* xs = x + pair / pairs_a_row * KP;
  float sum[M][OUTPUTS] = {};
  for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    uint32_t words[OUTPUTS][WORDS];
    float norm[OUTPUTS], part[M][OUTPUTS] = {};
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) {
      const size_t row = matrix + min(row0 + r, N - 1);
      hlwq_load<WORDS>(codes + (row * chunks + chunk) * WORDS, words[r]);
      norm[r] = float(norms[row * (KP / BLOCK) + chunk * CODES / BLOCK]);
    }
#pragma unroll
    for (int g = 0; g < CODES / 8; g++) {
      float c[OUTPUTS][8];
#pragma unroll
      for (int r = 0; r < OUTPUTS; r++) hlwq_decode<BITS>(words[r], g, table_s, c[r]);
#pragma unroll
      for (int m = 0; m < M; m++) {
        const T* from = xs + m * KP + chunk * CODES + g * 8;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = float(from[i]);
#pragma unroll
        for (int r = 0; r < OUTPUTS; r++)
#pragma unroll
          for (int i = 0; i < 8; i++) part[m][r] = fmaf(c[r][i], v[i], part[m][r]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < OUTPUTS; r++) sum[m][r] = fmaf(norm[r], part[m][r], sum[m][r]);
  }

  __shared__ float parts_s[MAX_WARPS][M * OUTPUTS];
#pragma unroll
  for (int i = 0; i < M * OUTPUTS; i++) {
    float total = sum[i / OUTPUTS][i % OUTPUTS];
#pragma unroll
    for (int stride = 16; stride; stride /= 2) total += __shfl_xor_sync(0xffffffffu, total, stride);
    if (threadIdx.x % 32 == 0) parts_s[threadIdx.x / 32][i] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < M * OUTPUTS; i += blockDim.x) {
    float total = 0;
    for (int warp = 0; warp < warps; warp++) total += parts_s[warp][i];
    const int row = row0 + i % OUTPUTS;
    if (row < N) y[(pair + i / OUTPUTS) * N + row] = T(total);
  }
}
