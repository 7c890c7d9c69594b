// Packed codes to centroids: the parts that gemv.cuh and dequantize.cuh share.
#pragma once

// `table` float [2^BITS] to shared memory, by all threads of the block. Up to 32 entries lie in different banks.
template <int BITS>
__device__ void hlwq_stage_table(const float* table, float* shared) {
  for (int i = threadIdx.x; i < 1 << BITS; i += blockDim.x) shared[i] = table[i];
  __syncthreads();
}

// WORDS words of a row, in the widest loads that are aligned. Weights are read once: past L1.
template <int WORDS>
__device__ void hlwq_load(const uint32_t* from, uint32_t (&words)[WORDS]) {
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = __ldcs((const uint4*)(from + i));
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else if constexpr (WORDS == 2) {
    const uint2 v = __ldcs((const uint2*)from);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = __ldcs(from + i);
  }
}

// Eight neighboring codes as centroids; `group` is known when the loop around is unrolled.
template <int BITS, int WORDS>
__device__ void hlwq_decode(const uint32_t (&words)[WORDS], int group, const float* table, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int bit = (group * 8 + i) * BITS, shift = bit & 31;
    uint32_t code = words[bit >> 5] >> shift;
    if (shift + BITS > 32) code |= words[(bit >> 5) + 1] << (32 - shift);
    values[i] = table[code & ((1u << BITS) - 1u)];
  }
}
