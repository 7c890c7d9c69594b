// Blocks of 32 V values times H, float32: a simdgroup holds a block, lane i its values [i V, i V + V).
// Its first stages stay in the lane, the other five are simd_shuffle_xor.
template <int V>
METAL_FUNC void hlwq_transform(thread float* v, uint lane) {
  for (uint stride = 1; stride < V; stride *= 2) {
    for (uint i = 0; i < V; i++) {
      if (i & stride) continue;
      float a = v[i], b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
  for (ushort stride = 1; stride < 32; stride *= 2) {
    for (uint i = 0; i < V; i++) {
      float other = simd_shuffle_xor(v[i], stride);
      v[i] = (lane & stride) ? other - v[i] : other + v[i];
    }
  }
  const float scale = rsqrt(float(32 * V));
  for (uint i = 0; i < V; i++) v[i] *= scale;
}
