// Scalars, vectors and their constructors.
#pragma once
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// Element type and length; a scalar is a vector of one.
template <class T>
struct vector_traits {
  typedef T element;
  static constexpr int length = 1;
};
#define MSL_VECTOR_TRAITS(T, N)           \
  template <>                             \
  struct vector_traits<vec<T, N>> {       \
    typedef T element;                    \
    static constexpr int length = N;      \
  };
#define MSL_VECTORS(T)                                                             \
  MSL_VECTOR_TRAITS(T, 2) MSL_VECTOR_TRAITS(T, 3) MSL_VECTOR_TRAITS(T, 4)
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(char) MSL_VECTORS(signed char) MSL_VECTORS(uchar) MSL_VECTORS(bool) MSL_VECTORS(long)
MSL_VECTORS(ulong)
template <class T>
using element_t = typename vector_traits<std::remove_cv_t<T>>::element;
template <class T>
constexpr int length_v = vector_traits<std::remove_cv_t<T>>::length;
template <class T>
constexpr bool is_scalar_v = length_v<T> == 1;

template <class V, class A>
METAL_FUNC constexpr void append(V& to, int& at, A value) {
  if constexpr (is_scalar_v<A>) {
    to[at++] = element_t<V>(value);
  } else {
    for (int i = 0; i < length_v<A>; i++) to[at++] = element_t<V>(value[i]);
  }
}

// float4(a, b, c, d), float4(scalar), float4(vector), float4(xy, zw): every component must be given.
template <class T, int N, class... A>
METAL_FUNC vec<T, N> make_vector(A... parts) {
  vec<T, N> out;
  constexpr int given = (0 + ... + length_v<A>);
  int at = 0;
  if constexpr (sizeof...(A) == 0) {
    for (int i = 0; i < N; i++) out[i] = T(0);
  } else if constexpr (given == 1) {
    for (int i = 0; i < N; i++) out[i] = T((parts, ...));
  } else {
    static_assert(given == N, "vector constructor: wrong number of components");
    (append(out, at, parts), ...);
  }
  return out;
}

template <class To, class From>
METAL_FUNC To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, value);
}
}  // namespace metal

#define MSL_VECTOR_NAMES(T)                        \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTOR_NAMES(float) MSL_VECTOR_NAMES(half) MSL_VECTOR_NAMES(bfloat) MSL_VECTOR_NAMES(int) MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(short) MSL_VECTOR_NAMES(ushort) MSL_VECTOR_NAMES(char) MSL_VECTOR_NAMES(uchar) MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(long) MSL_VECTOR_NAMES(ulong)

// Constructor syntax: `float4(x)` is a macro, `float4 v` stays the type.
#define float2(...) ::metal::make_vector<float, 2>(__VA_ARGS__)
#define float3(...) ::metal::make_vector<float, 3>(__VA_ARGS__)
#define float4(...) ::metal::make_vector<float, 4>(__VA_ARGS__)
#define half2(...) ::metal::make_vector<half, 2>(__VA_ARGS__)
#define half4(...) ::metal::make_vector<half, 4>(__VA_ARGS__)
#define int2(...) ::metal::make_vector<int, 2>(__VA_ARGS__)
#define int4(...) ::metal::make_vector<int, 4>(__VA_ARGS__)
#define uint2(...) ::metal::make_vector<uint, 2>(__VA_ARGS__)
#define uint3(...) ::metal::make_vector<uint, 3>(__VA_ARGS__)
#define uint4(...) ::metal::make_vector<uint, 4>(__VA_ARGS__)
#define ushort2(...) ::metal::make_vector<ushort, 2>(__VA_ARGS__)
#define ushort4(...) ::metal::make_vector<ushort, 4>(__VA_ARGS__)
#define uchar4(...) ::metal::make_vector<uchar, 4>(__VA_ARGS__)
#define ulong2(...) ::metal::make_vector<ulong, 2>(__VA_ARGS__)

constexpr half operator""h(long double value) { return half(value); }
constexpr half operator""h(unsigned long long value) { return half(value); }
