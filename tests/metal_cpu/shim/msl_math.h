// Common, math and integer functions, mapped over vectors. Half and bfloat results are rounded from float.
#pragma once
namespace metal {
using std::conditional_t;
using std::enable_if_t;
using std::is_same_v;
using std::true_type;
using std::false_type;
using std::integral_constant;
using std::bool_constant;

#define MSL_UNARY(name, expression)                                          \
  template <class T>                                                         \
  METAL_FUNC T name(T value) {                                               \
    if constexpr (is_scalar_v<T>) {                                          \
      float x = float(value);                                                \
      return T(expression);                                                  \
    } else {                                                                 \
      T out = value;                                                         \
      for (int i = 0; i < length_v<T>; i++) out[i] = name(element_t<T>(value[i])); \
      return out;                                                            \
    }                                                                        \
  }
MSL_UNARY(exp, expf(x)) MSL_UNARY(exp2, exp2f(x)) MSL_UNARY(log, logf(x)) MSL_UNARY(log2, log2f(x))
MSL_UNARY(sqrt, sqrtf(x)) MSL_UNARY(rsqrt, 1.0f / sqrtf(x)) MSL_UNARY(sin, sinf(x)) MSL_UNARY(cos, cosf(x))
MSL_UNARY(tanh, tanhf(x)) MSL_UNARY(floor, floorf(x)) MSL_UNARY(ceil, ceilf(x)) MSL_UNARY(round, roundf(x))
MSL_UNARY(rint, rintf(x)) MSL_UNARY(trunc, truncf(x)) MSL_UNARY(fabs, fabsf(x))

template <class T>
METAL_FUNC T fma(T a, T b, T c) {
  if constexpr (is_same_v<T, float>) {
    return __builtin_fmaf(a, b, c);
  } else if constexpr (is_scalar_v<T>) {
    return T(__builtin_fma(double(a), double(b), double(c)));
  } else {
    T out = a;
    for (int i = 0; i < length_v<T>; i++) out[i] = fma(element_t<T>(a[i]), element_t<T>(b[i]), element_t<T>(c[i]));
    return out;
  }
}
template <class T>
METAL_FUNC T max(T a, T b) {
  if constexpr (is_scalar_v<T>) {
    return a < b ? b : a;
  } else {
    T out = a;
    for (int i = 0; i < length_v<T>; i++) out[i] = a[i] < b[i] ? b[i] : a[i];
    return out;
  }
}
template <class T>
METAL_FUNC T min(T a, T b) {
  if constexpr (is_scalar_v<T>) {
    return b < a ? b : a;
  } else {
    T out = a;
    for (int i = 0; i < length_v<T>; i++) out[i] = b[i] < a[i] ? b[i] : a[i];
    return out;
  }
}
template <class T>
METAL_FUNC T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
METAL_FUNC T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
template <class T>
METAL_FUNC T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <class T>
METAL_FUNC bool isnan(T x) {
  return float(x) != float(x);
}
template <class T>
METAL_FUNC bool isinf(T x) {
  return __builtin_isinf(float(x));
}
template <class T>
METAL_FUNC element_t<T> dot(T a, T b) {
  element_t<T> sum = a[0] * b[0];
  for (int i = 1; i < length_v<T>; i++) sum += a[i] * b[i];
  return sum;
}
template <class T>
METAL_FUNC T extract_bits(T value, uint offset, uint bits) {
  if (bits == 0) return T(0);
  return T((std::make_unsigned_t<T>(value) >> offset) & (~0ul >> (64 - bits)));
}
template <class T>
METAL_FUNC T popcount(T x) {
  return T(__builtin_popcountll(std::make_unsigned_t<T>(x)));
}
namespace fast {
using metal::cos;
using metal::exp;
using metal::fma;
using metal::rsqrt;
using metal::sin;
using metal::tanh;
}  // namespace fast
namespace precise {
using metal::cos;
using metal::exp;
using metal::fma;
using metal::rsqrt;
using metal::sin;
using metal::tanh;
}  // namespace precise
}  // namespace metal
