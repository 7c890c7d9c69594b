// The Walsh-Hadamard transform of 32 * V values, V neighboring ones a lane, not scaled.
template <int V>
__device__ __forceinline__ void hlwq_transform(float (&v)[V], int lane) {
#pragma unroll
  for (int stride = 1; stride < V; stride *= 2) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (i & stride) continue;
      float a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      float other = __shfl_xor_sync(0xffffffffu, v[i], stride);
      v[i] = (lane & stride) ? other - v[i] : other + v[i];
    }
  }
}
