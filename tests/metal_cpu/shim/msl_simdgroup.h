// Barriers and simdgroup functions: every one passes through emu_exchange, so all 32 lanes must arrive together.
#pragma once
namespace metal {
enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(unsigned(a) | unsigned(b)); }

#define MSL_LINE int line = __builtin_LINE()  // the caller's line
inline void threadgroup_barrier(mem_flags flags, MSL_LINE) { emu_barrier(THREADGROUP_BARRIER, unsigned(flags), line); }
inline void simdgroup_barrier(mem_flags flags, MSL_LINE) { emu_barrier(SIMDGROUP_BARRIER, unsigned(flags), line); }

// The values that the lanes of this simdgroup brought to a collective.
template <class T>
struct Lanes {
  const unsigned char* slots;
  uint32_t active;
  METAL_FUNC bool has(uint lane) const { return lane < 32 && (active >> lane) & 1; }
  METAL_FUNC T operator[](uint lane) const {
    T value;
    __builtin_memcpy(&value, slots + SLOT_BYTES * lane, sizeof(T));
    return value;
  }
};

template <class T>
inline Lanes<T> exchange(T value, unsigned operation, int line) {
  static_assert(sizeof(T) <= SLOT_BYTES);
  Lanes<T> lanes;
  lanes.slots = emu_exchange(&value, sizeof(T), line, operation, &lanes.active);
  return lanes;
}

template <class T>
inline T from_lane(Lanes<T> lanes, uint lane, int line) {
  if (lane >= 32) emu_fault("simdgroup shuffle from a lane beyond 31", line);
  if (!lanes.has(lane)) emu_fault("simdgroup shuffle from an inactive lane", line);
  return lanes[lane];
}

// A tree over the active lanes.
template <class T, class F>
inline T reduce(Lanes<T> lanes, F combine) {
  T value[32];
  bool present[32];
  for (uint i = 0; i < 32; i++) {
    present[i] = lanes.has(i);
    if (present[i]) value[i] = lanes[i];
  }
  for (uint stride = 16; stride; stride >>= 1) {
    for (uint i = 0; i < stride; i++) {
      if (!present[i + stride]) continue;
      value[i] = present[i] ? combine(value[i], value[i + stride]) : value[i + stride];
      present[i] = true;
    }
  }
  return value[0];
}

METAL_FUNC uint self_lane() { return emu_self()->lane; }
enum Operation : unsigned {
  SUM = 1, PRODUCT, MAX, MIN, AND, OR, XOR, ALL, ANY, BALLOT, SHUFFLE, BROADCAST, BROADCAST_FIRST, SHUFFLE_XOR,
  SHUFFLE_UP, SHUFFLE_DOWN, INCLUSIVE_SUM, EXCLUSIVE_SUM, QUAD_SUM, QUAD_XOR, QUAD_BROADCAST, MATRIX_LOAD, MATRIX_STORE,
  MATRIX_MULTIPLY
};

#define MSL_REDUCTION(name, operation, expression)                                       \
  template <class T>                                                                     \
  inline T name(T value, MSL_LINE) {                                                     \
    return reduce(exchange(value, operation, line), [](T a, T b) { return T(expression); }); \
  }
MSL_REDUCTION(simd_sum, SUM, a + b) MSL_REDUCTION(simd_product, PRODUCT, a * b) MSL_REDUCTION(simd_max, MAX, max(a, b))
MSL_REDUCTION(simd_min, MIN, min(a, b)) MSL_REDUCTION(simd_and, AND, a & b) MSL_REDUCTION(simd_or, OR, a | b)
MSL_REDUCTION(simd_xor, XOR, a ^ b)

template <class T>
inline T simd_shuffle(T value, ushort lane, MSL_LINE) {
  return from_lane(exchange(value, SHUFFLE, line), lane, line);
}
template <class T>
inline T simd_broadcast(T value, ushort lane, MSL_LINE) {
  return from_lane(exchange(value, BROADCAST, line), lane, line);
}
template <class T>
inline T simd_broadcast_first(T value, MSL_LINE) {
  auto lanes = exchange(value, BROADCAST_FIRST, line);
  return lanes[__builtin_ctz(lanes.active)];
}
template <class T>
inline T simd_shuffle_xor(T value, ushort mask, MSL_LINE) {
  return from_lane(exchange(value, SHUFFLE_XOR, line), self_lane() ^ mask, line);
}
template <class T>
inline T simd_shuffle_up(T value, ushort delta, MSL_LINE) {
  auto lanes = exchange(value, SHUFFLE_UP, line);
  return self_lane() < delta ? value : from_lane(lanes, self_lane() - delta, line);
}
template <class T>
inline T simd_shuffle_down(T value, ushort delta, MSL_LINE) {
  auto lanes = exchange(value, SHUFFLE_DOWN, line);
  return self_lane() + delta > 31 ? value : from_lane(lanes, self_lane() + delta, line);
}
template <class T>
inline T simd_prefix_inclusive_sum(T value, MSL_LINE) {
  auto lanes = exchange(value, INCLUSIVE_SUM, line);
  T sum = T(0);
  for (uint i = 0; i <= self_lane(); i++)
    if (lanes.has(i)) sum = T(sum + lanes[i]);
  return sum;
}
template <class T>
inline T quad_sum(T value, MSL_LINE) {
  uint first = self_lane() & ~3u;
  auto lanes = exchange(value, QUAD_SUM, line);
  return T((lanes[first] + lanes[first + 1]) + (lanes[first + 2] + lanes[first + 3]));
}
template <class T>
inline T quad_shuffle_xor(T value, ushort mask, MSL_LINE) {
  return from_lane(exchange(value, QUAD_XOR, line), (self_lane() & ~3u) | ((self_lane() ^ mask) & 3), line);
}
}  // namespace metal
