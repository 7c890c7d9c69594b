// simdgroup_matrix 8x8: two neighboring columns a lane, in the lane order that MLX's steel kernels rely on.
#pragma once
namespace metal {
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8);
  vec<T, 2> elements;
  METAL_FUNC simdgroup_matrix() { memset(&elements, 0xff, sizeof elements); }
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    for (uint i = 0; i < 2; i++) elements[i] = row() == column() + i ? diagonal : T(0);
  }
  static METAL_FUNC uint row() { return ((self_lane() >> 2) & 4) + ((self_lane() >> 1) & 3); }
  static METAL_FUNC uint column() { return ((self_lane() >> 1) & 4) + ((self_lane() & 1) << 1); }
  static METAL_FUNC uint lane_of(uint r, uint c) { return (r & 4) << 2 | (c & 4) << 1 | (r & 3) << 1 | ((c >> 1) & 1); }
  METAL_FUNC vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int R, int C>
inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> out;
  out.elements[0] = out.elements[1] = value;
  return out;
}
inline void all_lanes(unsigned operation, int line) {
  if (exchange<char>(0, operation, line).active != 0xffffffffu) emu_fault("matrix operation with inactive lanes", line);
}
#define MSL_MATRIX_MEMORY(space)                                                                                   \
  template <class T>                                                                                               \
  inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const space T* from, ulong stride = 8,                  \
                             ulong2 origin = ulong2(0, 0), bool transpose = false, MSL_LINE) {                     \
    all_lanes(MATRIX_LOAD, line);                                                                                  \
    for (uint i = 0; i < 2; i++) {                                                                                 \
      uint r = transpose ? m.column() + i : m.row(), c = transpose ? m.row() : m.column() + i;                     \
      m.elements[i] = from[(origin.y + r) * stride + origin.x + c];                                                \
    }                                                                                                              \
  }                                                                                                                \
  template <class T>                                                                                               \
  inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, space T* to, ulong stride = 8,                   \
                              ulong2 origin = ulong2(0, 0), bool transpose = false, MSL_LINE) {                    \
    all_lanes(MATRIX_STORE, line);                                                                                 \
    for (uint i = 0; i < 2; i++) {                                                                                 \
      uint r = transpose ? m.column() + i : m.row(), c = transpose ? m.row() : m.column() + i;                     \
      to[(origin.y + r) * stride + origin.x + c] = m.elements[i];                                                  \
    }                                                                                                              \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                          MSL_LINE) {
  struct Operands {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  auto lanes = exchange(Operands{a.elements, b.elements}, MATRIX_MULTIPLY, line);
  if (lanes.active != 0xffffffffu) emu_fault("matrix operation with inactive lanes", line);
  vec<D, 2> out;
  for (uint i = 0; i < 2; i++) {
    uint column = d.column() + i;
    float sum = float(c.elements[i]);
    for (uint k = 0; k < 8; k++)
      sum = __builtin_fmaf(float(lanes[d.lane_of(d.row(), k)].a[k & 1]), float(lanes[d.lane_of(k, column)].b[column & 1]),
                           sum);
    out[i] = D(sum);
  }
  d.elements = out;
}
}  // namespace metal
