// One chunk of OUTPUTS rows of codes against the same chunk of M rows of x.
#ifdef HLWQ_HALF_PRODUCTS
// half x: pairs of products add up in half over one word (four terms of at most |x| / 4 each cannot overflow), then in
// float. That is 3 instructions a weight less than converting every centroid to float.
__device__ __forceinline__ float hlwq_dot8(const uint32_t* pairs, uint4 x) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w};
  __half2 sum = __hmul2(*(const __half2*)&pairs[0], *(const __half2*)&xs[0]);
#pragma unroll
  for (int i = 1; i < 4; i++) sum = __hfma2(*(const __half2*)&pairs[i], *(const __half2*)&xs[i], sum);
  float2 both = __half22float2(sum);
  return both.x + both.y;
}
template <typename T, int M, int OUTPUTS, int KP>
__device__ __forceinline__ void hlwq_multiply(
    const T* x, uint32_t (&words)[OUTPUTS][HLWQ_WORDS], float (&norm)[OUTPUTS], const float*, float (&sum)[M][OUTPUTS]) {
  float part[M][OUTPUTS] = {};
#pragma unroll
  for (int g = 0; g < HLWQ_CHUNK / 8; g++) {
    uint32_t pairs[OUTPUTS][4];
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) hlwq_decode8(words[r][g], pairs[r]);
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint4 xs = *(const uint4*)(x + m * KP + g * 8);
#pragma unroll
      for (int r = 0; r < OUTPUTS; r++) part[m][r] += hlwq_dot8(pairs[r], xs);
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) sum[m][r] = fmaf(norm[r], part[m][r], sum[m][r]);
}
#else
template <typename T>
__device__ __forceinline__ void hlwq_load8(const T* from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) to[i] = float(from[i]);
}
__device__ __forceinline__ void hlwq_load8(const __nv_bfloat16* from, float (&to)[8]) {
  uint4 v = *(const uint4*)from;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
template <typename T, int M, int OUTPUTS, int KP>
__device__ __forceinline__ void hlwq_multiply(
    const T* x, uint32_t (&words)[OUTPUTS][HLWQ_WORDS], float (&norm)[OUTPUTS], const float* table,
    float (&sum)[M][OUTPUTS]) {
  float part[M][OUTPUTS] = {};
#pragma unroll
  for (int g = 0; g < HLWQ_CHUNK / 8; g++) {
    float c[OUTPUTS][8];
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) hlwq_decode(words[r], g, c[r], table);
#pragma unroll
    for (int m = 0; m < M; m++) {
      float xs[8];
      hlwq_load8(x + m * KP + g * 8, xs);
#pragma unroll
      for (int r = 0; r < OUTPUTS; r++)
#pragma unroll
        for (int i = 0; i < 8; i++) part[m][r] = fmaf(c[r][i], xs[i], part[m][r]);
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) sum[m][r] = fmaf(norm[r], part[m][r], sum[m][r]);
}
#endif
