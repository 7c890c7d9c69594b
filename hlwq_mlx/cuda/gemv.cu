// y = x W^T for few rows (docs/format.md, step 5): x T [rows, Kp] rotated, codes uint32 [.., N, Kp * b / 32],
// norms half [.., N, Kp / B] -> y T [M, N]; HLWQ_GATHER: y T [pairs, N], one row against the matrix experts[pair].
//
// A thread block computes OUTPUTS outputs, its threads share K: a thread takes one chunk of each of these rows at a time
// (32 codes, 16 bytes at 4 bits), so that OUTPUTS loads are in flight, and its activations serve all of them.
  constexpr int CHUNKS = KP / HLWQ_CHUNK, WARPS = THREADS / 32;
  const float* lookup = nullptr;
#ifndef HLWQ_LOW0
  __shared__ float table_s[1 << HLWQ_BITS];
  for (int i = threadIdx.x; i < (1 << HLWQ_BITS); i += THREADS) table_s[i] = table[i];
  __syncthreads();
  lookup = table_s;
#endif
  const int row0 = blockIdx.x * OUTPUTS;
#ifdef HLWQ_GATHER
  const size_t pair = blockIdx.z, matrix = size_t(experts[pair]) * N;
  const T* xs = x + pair / (gridDim.z / XROWS) * KP;
#else
  const size_t pair = 0, matrix = 0;
  const T* xs = x;
#endif
  float sum[M][OUTPUTS] = {};
#pragma unroll(M == 1 ? 2 : 1)
  for (int chunk = threadIdx.x; chunk < CHUNKS; chunk += THREADS) {
    uint32_t words[OUTPUTS][HLWQ_WORDS];
    float norm[OUTPUTS];
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) {
      const size_t row = matrix + min(row0 + r, N - 1);
      hlwq_load(codes + (row * CHUNKS + chunk) * HLWQ_WORDS, words[r]);
      norm[r] = float(norms[row * (KP / HLWQ_BLOCK) + chunk * HLWQ_CHUNK / HLWQ_BLOCK]);
    }
    hlwq_multiply<T, M, OUTPUTS, KP>(xs + chunk * HLWQ_CHUNK, words, norm, lookup, sum);
  }

  __shared__ float parts[WARPS][M * OUTPUTS];
#pragma unroll
  for (int i = 0; i < M * OUTPUTS; i++) {
    float total = sum[i / OUTPUTS][i % OUTPUTS];
#pragma unroll
    for (int stride = 16; stride; stride /= 2) total += __shfl_xor_sync(0xffffffffu, total, stride);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = total;
  }
  __syncthreads();
  if (threadIdx.x < M * OUTPUTS) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) total += parts[warp][threadIdx.x];
    const int m = threadIdx.x / OUTPUTS, row = row0 + threadIdx.x % OUTPUTS;
    if (row < N) y[(pair + m) * N + row] = T(total);
  }
