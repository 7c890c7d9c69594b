// The heads of one token, ready for attention: y T [(H + 2 HK) * D], the products of q, k and v
// -> q T [H, D] and k T [HK, D], normed (where there are scales T [D]) and rotated by position, and v T [HK, D] as it is.
// Rotary embedding as in MLX, not traditional: of the first DIMS values i and i + DIMS / 2 turn by position * inv_freq[i].
// One warp a head; a lane holds the values lane + 32 j, so both of a pair. Four kernels of MLX and six views in one.
#pragma once

template <typename T, int D, int DIMS>
__device__ void hlwq_heads(
    const T* y, const T* q_scale, const T* k_scale, float eps, const float* inv_freq, const int* position, int H, int HK,
    T* q, T* k, T* v) {
  constexpr int V = D / 32, PAIRS = DIMS / 64;
  const int lane = threadIdx.x % 32, head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (head >= H + 2 * HK) return;
  const bool of_q = head < H, of_v = head >= H + HK;
  float values[V];
#pragma unroll
  for (int j = 0; j < V; j++) values[j] = float(y[head * D + lane + 32 * j]);
  const T* scale = of_q ? q_scale : k_scale;
  if (scale && !of_v) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < V; j++) squares = fmaf(values[j], values[j], squares);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
    const float factor = rsqrtf(squares / D + eps);
#pragma unroll
    for (int j = 0; j < V; j++) values[j] *= factor * float(scale[lane + 32 * j]);
  }
  if (!of_v) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
      float sine, cosine;
      sincosf(float(*position) * inv_freq[lane + 32 * j], &sine, &cosine);
      const float a = values[j], b = values[j + PAIRS];
      values[j] = a * cosine - b * sine;
      values[j + PAIRS] = a * sine + b * cosine;
    }
  }
  T* out = of_q ? q + head * D : of_v ? v + (head - H - HK) * D : k + (head - H) * D;
#pragma unroll
  for (int j = 0; j < V; j++) out[lane + 32 * j] = T(values[j]);
}
