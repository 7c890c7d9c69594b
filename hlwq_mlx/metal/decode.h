// Packed codes to centroids, in registers. Included in every kernel that reads codes.
//
// The host puts literals in front of this text (hlwq_mlx/metal/decoder.py):
//   HLWQ_BITS    bits of a code
//   HLWQ_BLOCK   codes that share a norm
//   HLWQ_SCALE   what a sum of decoded values is multiplied by at the end
//   HLWQ_DEGREE  1, 3, 5 or 7, with HLWQ_C0, HLWQ_C1, HLWQ_C2: centroids by a polynomial; or
//   HLWQ_PAIRS   centroids two at a time from a table of 256 half2 in threadgroup memory (4 bits); or
//   HLWQ_TABLE   centroids one at a time from a table of float there.
//
// Why threadgroup memory: an array in constant or thread memory, indexed at run time, cost other projects 1.6 to 2.3
// times the time. Up to 32 entries lie in different banks, so 32 lanes never wait for each other.
// Why arithmetic: an odd polynomial of the level t = code - (2^b - 1) / 2 is a few FMAs and no lookup.
// In monic form a polynomial of degree 5 is t * ((t^2 + C1)^2 + C0): the leading factor waits until the end (SCALE).
//
// Why half: on Apple GPUs an integer to float conversion and a shift run at a quarter of the FMA rate. Masked bits of a
// code, read as half, are the subnormal code * 2^-24 (MLX's own fp4 and fp8 decoders rely on half subnormals too), so
// one mask serves two codes 16 bits apart and one FMA scales, converts and centers a code.

#define HLWQ_UNROLL _Pragma("clang loop unroll(full)")
#define HLWQ_CHUNK (HLWQ_BITS == 8 ? 16 : 32)                         // codes that a lane loads at a time
#define HLWQ_WORDS (HLWQ_CHUNK * HLWQ_BITS / 32)                      // words of a chunk
#define HLWQ_GROUP (HLWQ_BITS == 2 ? 16 : HLWQ_BITS == 8 ? 4 : 8)     // codes that are decoded at a time
#define HLWQ_CENTER (0.5f * float((1 << HLWQ_BITS) - 1))

// Words of a chunk: 16-byte or 8-byte loads where the chunk's size keeps them aligned. MLX puts inputs of fewer than
// eight elements in constant memory, hence two spaces.
#if HLWQ_BITS == 4 || HLWQ_BITS == 8
#define HLWQ_VECTOR uint4
#elif HLWQ_BITS == 2 || HLWQ_BITS == 6
#define HLWQ_VECTOR uint2
#else
#define HLWQ_VECTOR uint
#endif
#define HLWQ_LOAD(space)                                                      \
  METAL_FUNC void hlwq_load(const space uint* from, thread uint* words) {     \
    constexpr int wide = sizeof(HLWQ_VECTOR) / sizeof(uint);                  \
    HLWQ_UNROLL for (int i = 0; i < HLWQ_WORDS; i += wide) {                  \
      HLWQ_VECTOR v = *(const space HLWQ_VECTOR*)(from + i);                  \
      HLWQ_UNROLL for (int j = 0; j < wide; j++) words[i + j] = hlwq_at(v, j); \
    }                                                                         \
  }
METAL_FUNC uint hlwq_at(uint v, int) { return v; }
METAL_FUNC uint hlwq_at(uint2 v, int i) { return v[i]; }
METAL_FUNC uint hlwq_at(uint4 v, int i) { return v[i]; }
HLWQ_LOAD(device)
HLWQ_LOAD(constant)

// Code `index` of a chunk; the index is known when the loop around is unrolled.
METAL_FUNC uint hlwq_code(const thread uint* words, int index) {
  int bit = index * HLWQ_BITS;
  int shift = bit & 31;
  uint value = words[bit >> 5] >> shift;
  if (shift + HLWQ_BITS > 32) value |= words[(bit >> 5) + 1] << (32 - shift);
  return value & ((1u << HLWQ_BITS) - 1u);
}

#if defined(HLWQ_DEGREE)
METAL_FUNC float hlwq_polynomial(float t) {
#if HLWQ_DEGREE == 1
  return t;
#elif HLWQ_DEGREE == 3
  return t * fma(t, t, HLWQ_C0);
#elif HLWQ_DEGREE == 5
  float v = fma(t, t, HLWQ_C1);
  return t * fma(v, v, HLWQ_C0);
#else
  float v = fma(t, t, HLWQ_C2);
  return t * fma(fma(v, v, HLWQ_C1), v, HLWQ_C0);
#endif
}

// Two codes at bits `low` and `low` + 16 of a word, centered.
METAL_FUNC float2 hlwq_levels(uint word, int low) {
  half2 h = as_type<half2>(word & (((1u << HLWQ_BITS) - 1u) * 0x00010001u << low));
  float scale = float(1u << (24 - low));
  return float2(fma(float(h.x), scale, -HLWQ_CENTER), fma(float(h.y), scale, -HLWQ_CENTER));
}

// Group `group` of a chunk: HLWQ_GROUP values, SCALE still to be applied.
METAL_FUNC void hlwq_decode(const thread uint* words, int group, thread float* values) {
#if HLWQ_BITS == 2 || HLWQ_BITS == 4 || HLWQ_BITS == 8
  uint word = words[group];
  constexpr int half_group = HLWQ_GROUP / 2;
  constexpr int direct = HLWQ_BITS == 2 ? 5 : HLWQ_BITS == 4 ? 2 : 1;  // codes of a half-word inside half's mantissa
  uint rest = word >> (direct * HLWQ_BITS);
  HLWQ_UNROLL for (int i = 0; i < half_group; i++) {
    float2 t = i < direct ? hlwq_levels(word, i * HLWQ_BITS) : hlwq_levels(rest, (i - direct) * HLWQ_BITS);
    values[i] = hlwq_polynomial(t.x);
    values[i + half_group] = hlwq_polynomial(t.y);
  }
#else
  HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i++)
    values[i] = hlwq_polynomial(float(hlwq_code(words, group * HLWQ_GROUP + i)) - HLWQ_CENTER);
#endif
}
#define HLWQ_DECODE(words, group, values) hlwq_decode(words, group, values)

#elif defined(HLWQ_PAIRS)
METAL_FUNC void hlwq_decode(const thread uint* words, int group, thread float* values, const threadgroup uint* pairs) {
  HLWQ_UNROLL for (int i = 0; i < 4; i++) {
    half2 pair = as_type<half2>(pairs[(words[group] >> (8 * i)) & 0xffu]);
    values[2 * i] = float(pair.x);
    values[2 * i + 1] = float(pair.y);
  }
}
#define HLWQ_ENTRIES 256
#define HLWQ_DECODE(words, group, values) hlwq_decode(words, group, values, lookup_s)

#else
METAL_FUNC void hlwq_decode(const thread uint* words, int group, thread float* values, const threadgroup uint* table) {
  HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i++)
    values[i] = as_type<float>(table[hlwq_code(words, group * HLWQ_GROUP + i)]);
}
#define HLWQ_ENTRIES (1 << HLWQ_BITS)
#define HLWQ_DECODE(words, group, values) hlwq_decode(words, group, values, lookup_s)
#endif
