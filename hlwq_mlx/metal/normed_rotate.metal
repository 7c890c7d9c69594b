// out = rms_norm(x) * scale times H_B, block by block: x T [K], scale T [K] -> out T [Kp], for the product that follows.
// HLWQ_ADD: of x + add, which is written out too, sum_out T [K].
//
// One threadgroup: the sum of squares of all, then one simdgroup a block as in rotate.metal, x read anew. float32 inside.
  constexpr int V = BLOCK / 32;
#ifdef HLWQ_ADD
#define HLWQ_X(k) float(T(float(x[k]) + float(add[k])))
#else
#define HLWQ_X(k) float(x[k])
#endif
  threadgroup float squares_s[32];
  const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const uint K = uint(scale_shape[0]), blocks = (K + BLOCK - 1) / BLOCK;

  float squares = 0.0f;
  for (uint k = thread_index_in_threadgroup; k < K; k += threads_per_threadgroup.x) {
    float value = HLWQ_X(k);
    squares = fma(value, value, squares);
  }
  squares = simd_sum(squares);
  if (lane == 0) squares_s[simdgroup] = squares;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = simd_sum(lane < simdgroups_per_threadgroup ? squares_s[lane] : 0.0f);
  const float factor = rsqrt(squares / float(K) + HLWQ_EPS);

  for (uint block = simdgroup; block < blocks; block += simdgroups_per_threadgroup) {
    const uint start = block * BLOCK + lane * V;
    float v[V];
    for (uint i = 0; i < V; i++) {
      const uint k = start + i;
      v[i] = 0.0f;
      if (k < K) {
        const float value = HLWQ_X(k);
#ifdef HLWQ_ADD
        sum_out[k] = T(value);
#endif
        v[i] = value * factor * float(scale[k]);
      }
    }
    hlwq_transform<V>(v, lane);
    for (uint i = 0; i < V; i++) out[start + i] = T(v[i]);
  }
