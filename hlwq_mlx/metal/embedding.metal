// Rows of the weight itself (docs/format.md, step 5): ids [rows], codes uint32 [V, Kp * b / 32], norms half [V, Kp / B]
// -> out T [rows, K]. One simdgroup a block: decode, rotate back as in rotate.metal, crop to K.
// `table` holds c / sqrt(B) and is read from device memory: a few blocks a token.
  constexpr int V = BLOCK / 32;
  const uint lane = thread_index_in_simdgroup;
  const uint blocks = uint(norms_shape[1]);
  const uint index = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
  if (index >= uint(ids_shape[0]) * blocks) return;
  const uint row = index / blocks, block = index % blocks;
  const size_t source = size_t(ids[row]);
  const float norm = float(norms[source * blocks + block]);
  const size_t words = (source * blocks + block) * (BLOCK * BITS / 32);

  float v[V];
  for (uint i = 0; i < V; i++) {
    uint bit = (lane * V + i) * BITS;
    uint shift = bit & 31;
    uint code = codes[words + (bit >> 5)] >> shift;
    if (shift + BITS > 32) code |= codes[words + (bit >> 5) + 1] << (32 - shift);
    v[i] = norm * table[code & ((1u << BITS) - 1u)];
  }
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
  const float scale = rsqrt(float(BLOCK));
  for (uint i = 0; i < V; i++) {
    uint k = block * BLOCK + lane * V + i;
    if (k < uint(K)) out[size_t(row) * K + k] = T(v[i] * scale);
  }
