// Packed codes to centroids, in registers. Included in every CUDA kernel that reads codes.
//
// The host puts literals in front of this text (hlwq_mlx/cuda/__init__.py):
//   HLWQ_BITS, HLWQ_BLOCK   bits of a code, codes that share a norm
//   HLWQ_LOW0, HLWQ_LOW1, HLWQ_HIGH0, HLWQ_HIGH1   4 bits, symmetric codebook: low and high bytes of the eight positive
//       centroids over sqrt(B), in half (HLWQ_HALF) or bfloat16, for prmt to choose from
//   otherwise a table of 2^b floats is staged in shared memory
#define HLWQ_CHUNK (HLWQ_BITS == 8 ? 16 : 32)  // codes that a thread loads at a time
#define HLWQ_WORDS (HLWQ_CHUNK * HLWQ_BITS / 32)

// Words of a chunk, in the widest loads that its size keeps aligned. Weights are read once: past L1.
__device__ __forceinline__ void hlwq_load(const uint32_t* from, uint32_t* words) {
  if (HLWQ_WORDS == 4) {
    uint4 v = __ldcs((const uint4*)from);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < HLWQ_WORDS; i++) words[i] = __ldcs(from + i);
  }
}

__device__ __forceinline__ float hlwq_low(uint32_t v) {
#ifdef HLWQ_HALF
  return __half2float(__ushort_as_half((unsigned short)v));
#else
  return __uint_as_float(v << 16);
#endif
}
__device__ __forceinline__ float hlwq_high(uint32_t v) {
#ifdef HLWQ_HALF
  return __half2float(__ushort_as_half((unsigned short)(v >> 16)));
#else
  return __uint_as_float(v & 0xffff0000u);
#endif
}

#ifdef HLWQ_LOW0
// The prmt instruction itself: __byte_perm masks the top bit of each selector nibble away.
#ifndef HLWQ_PRMT
#define HLWQ_PRMT hlwq_prmt
__device__ __forceinline__ uint32_t hlwq_prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}
#endif

// Eight codes to four pairs of 16-bit floats, exact. A negative code q < 8 has the magnitude of 7 - q: its three low
// bits are flipped. prmt looks four magnitudes up by their nibbles (only the low 16 bits of a selector count). Its sign
// mode, a nibble with the top bit set, replicates the byte's sign: 0x80 becomes 0xff for a positive code and stays 0x80
// for a negative one, so bit 6 tells the sign.
__device__ __forceinline__ void hlwq_decode8(uint32_t word, uint32_t* pairs) {
  uint32_t negative = ~word & 0x88888888u;
  uint32_t index = (word ^ (negative - (negative >> 3))) & 0x77777777u;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t low = HLWQ_PRMT(HLWQ_LOW0, HLWQ_LOW1, index >> (16 * i));
    uint32_t high = HLWQ_PRMT(HLWQ_HIGH0, HLWQ_HIGH1, index >> (16 * i));
    uint32_t sign = HLWQ_PRMT(0x80808080u, 0x80808080u, word >> (16 * i));
    high ^= ~(sign << 1) & 0x80808080u;
    pairs[2 * i] = HLWQ_PRMT(low, high, 0x5140);
    pairs[2 * i + 1] = HLWQ_PRMT(low, high, 0x7362);
  }
}
#endif

// Eight neighboring codes of a chunk as floats; `group` is known when the loop around is unrolled.
__device__ __forceinline__ void hlwq_decode(const uint32_t* words, int group, float* values, const float* table) {
#ifdef HLWQ_LOW0
  uint32_t pairs[4];
  hlwq_decode8(words[group], pairs);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = hlwq_low(pairs[i]);
    values[2 * i + 1] = hlwq_high(pairs[i]);
  }
#else
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int bit = (group * 8 + i) * HLWQ_BITS, shift = bit & 31;
    uint32_t code = words[bit >> 5] >> shift;
    if (shift + HLWQ_BITS > 32) code |= words[(bit >> 5) + 1] << (32 - shift);
    values[i] = table[code & ((1u << HLWQ_BITS) - 1u)];
  }
#endif
}
