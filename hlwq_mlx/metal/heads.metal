// The heads of one token, ready for attention: y T [(H + 2 HK) * D], the products of q, k and v
// -> q T [H, D] and k T [HK, D], normed (HLWQ_NORMS, with scales T [D]) and rotated by position, and v T [HK, D] as it is.
// Rotary embedding as in MLX, not traditional: of the first DIMS values i and i + DIMS / 2 turn by position * inv_freq[i].
// One simdgroup a head; a lane holds the values lane + 32 j, so both of a pair.
  constexpr int V = D / 32, PAIRS = DIMS / 64;
  const uint lane = thread_index_in_simdgroup;
  const int head = int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup);
  if (head >= H + 2 * HK) return;
  const bool of_q = head < H, of_v = head >= H + HK;
  float values[V];
  for (int j = 0; j < V; j++) values[j] = float(y[head * D + lane + 32 * j]);
#ifdef HLWQ_NORMS
  if (!of_v) {
    float squares = 0.0f;
    for (int j = 0; j < V; j++) squares = fma(values[j], values[j], squares);
    const float factor = rsqrt(simd_sum(squares) / float(D) + HLWQ_EPS);
    for (int j = 0; j < V; j++)
      values[j] *= factor * (of_q ? float(q_scale[lane + 32 * j]) : float(k_scale[lane + 32 * j]));
  }
#endif
  if (!of_v) {
    for (int j = 0; j < PAIRS; j++) {
      const float angle = float(position) * inv_freq[lane + 32 * j];
      const float sine = fast::sin(angle), cosine = fast::cos(angle);  // fast: as MLX's own kernel has it
      const float a = values[j], b = values[j + PAIRS];
      values[j] = a * cosine - b * sine;
      values[j + PAIRS] = a * sine + b * cosine;
    }
  }
  device T* to = of_q ? q + head * D : of_v ? v + (head - H - HK) * D : k + (head - H) * D;
  for (int j = 0; j < V; j++) to[lane + 32 * j] = T(values[j]);
