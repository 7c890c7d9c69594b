// The weight in the rotated basis, for products of many rows: codes uint32 [N, Kp * b / 32], norms half [N, Kp / B]
// -> out T [N, Kp]. Eight codes a thread where they are whole words, so that neighbors write neighboring 16 bytes.
  constexpr int SPLIT = HLWQ_BITS == 4 ? 4 : 1;  // threads a chunk
  constexpr int CODES = HLWQ_CHUNK / SPLIT, WORDS = HLWQ_WORDS / SPLIT;
  const float* lookup = nullptr;
#ifndef HLWQ_LOW0
  __shared__ float table_s[1 << HLWQ_BITS];
  for (int i = threadIdx.x; i < (1 << HLWQ_BITS); i += blockDim.x) table_s[i] = table[i];
  __syncthreads();
  lookup = table_s;
#endif
  const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= size_t(N) * KP / CODES) return;
  uint32_t words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++) words[i] = codes[index * WORDS + i];
  const float norm = float(norms[index * CODES / HLWQ_BLOCK]);
#pragma unroll
  for (int g = 0; g < CODES / 8; g++) {
    float c[8];
    hlwq_decode(words, g, c, lookup);
    alignas(16) T values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = T(c[i] * norm);
#pragma unroll
    for (int i = 0; i < int(sizeof(values)) / 16; i++)
      ((uint4*)(out + index * CODES + g * 8))[i] = ((const uint4*)values)[i];
  }
