// Rows of the weight itself (docs/format.md, step 5): ids [rows], codes uint32 [V, Kp * b / 32], norms half [V, Kp / B]
// -> out T [rows, K]. One simdgroup a block: decode, rotate back, crop to K.
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
  hlwq_transform<V>(v, lane);
  for (uint i = 0; i < V; i++) {
    uint k = block * BLOCK + lane * V + i;
    if (k < uint(K)) out[size_t(row) * K + k] = T(v[i]);
  }
