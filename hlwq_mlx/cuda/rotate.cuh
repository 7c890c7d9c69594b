// out = x times H_B, block by block (docs/format.md, steps 1 and 2): x T [rows, K] -> out T [rows, Kp].
// One warp a block, B / 32 neighboring values a lane; float32 inside. The twin of hlwq_mlx/metal/rotate.metal.
// A thread block takes neighboring blocks of row blockIdx.x: the number of rows, which a prompt's length is, must not be
// in the text of a kernel, or every new length would be compiled.
#pragma once
#include "transform.cuh"

template <typename T, int BLOCK>
__device__ void hlwq_rotate(const T* x, int K, T* out) {
  constexpr int V = BLOCK / 32;
  const int blocks = (K + BLOCK - 1) / BLOCK;
  const int lane = threadIdx.x % 32, block = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  const size_t row = blockIdx.x;
  const int k = block * BLOCK + lane * V;
  float v[V];
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = k + i < K ? float(x[row * K + k + i]) : 0.0f;
  hlwq_transform<V, 32>(v, lane);
#pragma unroll
  for (int i = 0; i < V; i++) out[(row * blocks + block) * BLOCK + lane * V + i] = T(v[i] * rsqrtf(float(BLOCK)));
}
