// The Walsh-Hadamard transform of LANES * V values, V neighboring ones a lane, not scaled; 32 / LANES of them a warp.
#pragma once

template <int V, int LANES>
__device__ void hlwq_transform(float (&v)[V], int lane) {
#pragma unroll
  for (int stride = 1; stride < V; stride *= 2) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int stride = 1; stride < LANES; stride *= 2) {
    const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < V; i++) v[i] = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], stride));
  }
}
