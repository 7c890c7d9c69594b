// The weight in the rotated basis, for products of many rows: codes uint32 [N, Kp * b / 32], norms half [N, Kp / B]
// -> out T [N, Kp]. One chunk a thread.
#ifdef HLWQ_ENTRIES
  threadgroup uint lookup_s[HLWQ_ENTRIES];
  for (uint i = thread_index_in_threadgroup; i < HLWQ_ENTRIES; i += threads_per_threadgroup.x) lookup_s[i] = lookup[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  const size_t chunk = thread_position_in_grid.x;
  const size_t chunks = size_t(norms_shape[0]) * norms_shape[1] * HLWQ_BLOCK / HLWQ_CHUNK;
  if (chunk >= chunks) return;
  uint words[HLWQ_WORDS];
  hlwq_load(codes + chunk * HLWQ_WORDS, words);
  const float scale = float(norms[chunk * HLWQ_CHUNK / HLWQ_BLOCK]) * HLWQ_SCALE;
  HLWQ_UNROLL for (int g = 0; g < HLWQ_CHUNK / HLWQ_GROUP; g++) {
    float c[HLWQ_GROUP];
    HLWQ_DECODE(words, g, c);
    HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i += 4) {
      vec<T, 4> v;
      v.x = T(c[i] * scale);
      v.y = T(c[i + 1] * scale);
      v.z = T(c[i + 2] * scale);
      v.w = T(c[i + 3] * scale);
      *(device vec<T, 4>*)(out + chunk * HLWQ_CHUNK + g * HLWQ_GROUP + i) = v;
    }
  }
