// out = x times H_B, block by block (docs/format.md, steps 1 and 2): x T [rows, K] -> out T [rows, Kp].
//
// One simdgroup a block, B / 32 neighboring values a lane. float32 inside. A last block beyond K is padded with zeros.
  constexpr int V = BLOCK / 32;
  const uint lane = thread_index_in_simdgroup;
  const uint K = uint(x_shape[1]), blocks = (K + BLOCK - 1) / BLOCK;
  const uint index = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
  if (index >= uint(x_shape[0]) * blocks) return;
  const uint row = index / blocks, k = (index % blocks) * BLOCK + lane * V;

  float v[V];
  for (uint i = 0; i < V; i++) v[i] = k + i < K ? float(x[size_t(row) * K + k + i]) : 0.0f;
  hlwq_transform<V>(v, lane);
  for (uint i = 0; i < V; i++) out[size_t(index) * BLOCK + lane * V + i] = T(v[i]);
