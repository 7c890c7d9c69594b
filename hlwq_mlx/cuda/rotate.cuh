// out = x times H_B, block by block (docs/format.md, steps 1 and 2): x T [ROWS, K] -> out T [ROWS, Kp].
// One warp a block, B / 32 neighboring values a lane; float32 inside. The twin of hlwq_mlx/metal/rotate.metal.
#pragma once
#include "transform.cuh"

template <typename T, int BLOCK, int ROWS, int K>
__device__ void hlwq_rotate(const T* x, T* out) {
  constexpr int V = BLOCK / 32, BLOCKS = (K + BLOCK - 1) / BLOCK;
  const int lane = threadIdx.x % 32, index = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (index >= ROWS * BLOCKS) return;
  const int row = index / BLOCKS, k = index % BLOCKS * BLOCK + lane * V;
  float v[V];
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = k + i < K ? float(x[size_t(row) * K + k + i]) : 0.0f;
  hlwq_transform<V, 32>(v, lane);
#pragma unroll
  for (int i = 0; i < V; i++) out[size_t(index) * BLOCK + lane * V + i] = T(v[i] * rsqrtf(float(BLOCK)));
}
