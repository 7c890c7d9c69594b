// Rows of the weight itself (docs/format.md, step 5): ids [rows], codes uint32 [.., Kp * b / 32], norms half [.., Kp / B],
// table c / sqrt(B) -> out T [rows, K]. One warp a block: decode, rotate back, crop to K.
// The twin of hlwq_mlx/metal/embedding.metal.
#pragma once
#include "transform.cuh"

template <typename T, int BITS, int BLOCK, int K>
__device__ void hlwq_embedding(
    const uint32_t* ids, const uint32_t* codes, const __half* norms, const float* table, T* out) {
  constexpr int V = BLOCK / 32, BLOCKS = (K + BLOCK - 1) / BLOCK;
  const int lane = threadIdx.x % 32, block = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (block >= BLOCKS) return;
  const size_t row = blockIdx.x, source = size_t(ids[row]) * BLOCKS + block, words = source * (BLOCK * BITS / 32);
  const float norm = float(norms[source]);
  float v[V];
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int bit = (lane * V + i) * BITS, shift = bit & 31;
    uint32_t code = codes[words + (bit >> 5)] >> shift;
    if (shift + BITS > 32) code |= codes[words + (bit >> 5) + 1] << (32 - shift);
    v[i] = norm * table[code & ((1u << BITS) - 1u)];
  }
  hlwq_transform<V, 32>(v, lane);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int k = block * BLOCK + lane * V + i;
    if (k < K) out[row * K + k] = T(v[i] * rsqrtf(float(BLOCK)));
  }
}
