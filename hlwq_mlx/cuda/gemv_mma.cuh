// y = x W^T for few rows on tensor cores (docs/format.md, steps 1, 2 and 5): 4 bits, T half or bfloat16.
// codes uint32 [.., N, Kp / 8], norms half [.., N, Kp / B], table float [16] -> y T [M, N]; with `experts` uint32
// [pairs]: y T [pairs, N], one row against the matrix experts[pair].
// M == 1: x T [rows, K] as a layer gets it; M > 1: x T [M, Kp], rotated.
//
// A thread block computes 16 * TILES outputs; its warps take 512 columns in turn. Codes are the 16 x 16 operand of
// mma.m16n8k16 and rows of x its 16 x 8 operand, so eight rows cost what one costs. K may run in any order that both
// operands share: lane l takes quarter l % 4 of every block of the rows l / 4 and l / 4 + 8, in loads of B / 8 bytes.
//
// Two codes are one lookup in shared memory, where each lane has its own copy of the 256 pairs: no bank conflicts, and
// two integer instructions a pair. Decoding in registers (prmt) took four to five, and that pipe runs at half the issue
// rate: counted in the machine code, 24576 x 4096 needed 17 us of it where an H200's memory needs 12. Measured: 24.8 us
// on an H200 then, without the rotation, and 25.8 on an H100 now, with it.
// M == 1: a warp rotates the columns that it uses while its codes are on their way, which saves a launch.
#pragma once
#include "decode.cuh"
#include "transform.cuh"

constexpr int HLWQ_COLUMNS = 512;  // of a warp at a time: 16 a lane

// The centroids of two codes for each byte, 32 times: pairs[byte][lane]. Neighboring threads write different banks.
template <typename T>
__device__ void hlwq_stage_pairs(const float* table, uint32_t* pairs) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    alignas(4) const T two[2] = {T(table[byte & 15]), T(table[byte >> 4])};
    const uint32_t v = *(const uint32_t*)two;
#pragma unroll
    for (int i = 0; i < 8; i++) *(uint4*)(pairs + byte * 32 + (byte + i) % 8 * 4) = {v, v, v, v};
  }
}

// Eight codes to four pairs, from the copy of this lane.
__device__ inline void hlwq_decode_pairs(const uint32_t* pairs, int lane, uint32_t word, uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t row = i ? word >> (8 * i - 7) : word << 7;  // of 128 bytes
    out[i] = *(const uint32_t*)((const char*)pairs + (row & 0x7f80u | 4 * lane));
  }
}

template <typename T>
constexpr bool hlwq_is_half = false;
template <>
constexpr bool hlwq_is_half<__half> = true;

#ifdef __CUDACC__
// d += A B: A 16 x 16 (rows l / 4 and l / 4 + 8 of lane l), B 16 x 8, d 16 x 8 in float.
template <typename T>
__device__ void hlwq_mma(
    float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#define HLWQ_MMA(type)                                                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                      \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                      \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (hlwq_is_half<T>)
    HLWQ_MMA("f16");
  else
    HLWQ_MMA("bf16");
}
#endif

// Sixteen columns of x from k on; zeros beyond K.
template <typename T, int K>
__device__ void hlwq_load_columns(const T* x, int k, T (&values)[16]) {
  if (k + 16 <= K && size_t(x + k) % 16 == 0) {
    ((uint4*)values)[0] = ((const uint4*)(x + k))[0];
    ((uint4*)values)[1] = ((const uint4*)(x + k))[1];
  } else {
#pragma unroll
    for (int i = 0; i < 16; i++) values[i] = k + i < K ? x[k + i] : T(0.0f);
  }
}

// The columns of a warp, 16 a lane, rotated to `out`, which is the warp's and 16-byte aligned.
template <typename T, int BLOCK>
__device__ void hlwq_rotate_columns(T (&values)[16], int lane, T* out) {
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; i++) v[i] = float(values[i]);
  hlwq_transform<16, BLOCK / 16>(v, lane);
#pragma unroll
  for (int i = 0; i < 16; i++) values[i] = T(v[i] * rsqrtf(float(BLOCK)));
  ((uint4*)(out + lane * 16))[0] = ((const uint4*)values)[0];
  ((uint4*)(out + lane * 16))[1] = ((const uint4*)values)[1];
}

// A lane's codes of 16 rows and 512 columns, and their norms.
template <int BLOCK, int BLOCKS>
struct HlwqCodes {
  static constexpr int UNROLL = HLWQ_COLUMNS / BLOCK, WORDS = BLOCK / 32;  // blocks; words of a quarter of one
  uint32_t words[UNROLL][2][WORDS];
  __half norm[UNROLL][2];

  // `row`: of the first 8 rows, the lane's; `last`: the matrix's last
  __device__ void load(const uint32_t* codes, const __half* norms, size_t matrix, int row, int last, int chunk, int quarter) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int block = chunk * UNROLL + u;
      if (BLOCKS % UNROLL != 0 && block >= BLOCKS) break;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const size_t at = (matrix + min(row + 8 * i, last)) * BLOCKS + block;
        hlwq_load<WORDS>(codes + (at * 4 + quarter) * WORDS, words[u][i]);
        norm[u][i] = norms[at];
      }
    }
  }
};

template <typename T, int BLOCK, int M, int N, int K, int WARPS, int TILES>
__device__ void hlwq_gemv_mma(
    const T* x, const uint32_t* codes, const __half* norms, const float* table, const uint32_t* experts,
    int pairs_a_row, T* y) {
  constexpr int BLOCKS = (K + BLOCK - 1) / BLOCK, ROWS = 16 * TILES;
  using Codes = HlwqCodes<BLOCK, BLOCKS>;
  constexpr int CHUNKS = (BLOCKS + Codes::UNROLL - 1) / Codes::UNROLL;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quarter = lane % 4, group = lane / 4;
  const int row0 = blockIdx.x * ROWS;
  const size_t pair = blockIdx.z, matrix = experts ? size_t(experts[pair]) * N : 0;
  const T* xs = x + pair / pairs_a_row * K;
  __shared__ __align__(16) uint32_t pairs_s[256 * 32];
  __shared__ __align__(16) T rotated_s[M == 1 ? WARPS * HLWQ_COLUMNS : 8];
  __shared__ float parts_s[WARPS][ROWS][M];
  T* rotated = rotated_s + (M == 1 ? warp * HLWQ_COLUMNS : 0);

  float sum[TILES][4] = {};
  Codes now, next;
  next.load(codes, norms, matrix, row0 + group, N - 1, warp, quarter);
  for (int chunk = warp; chunk < CHUNKS; chunk += WARPS) {
    alignas(16) T columns[16];
    if (M == 1) hlwq_load_columns<T, K>(xs, chunk * HLWQ_COLUMNS + lane * 16, columns);
    if (chunk == warp) {  // once: every warp has a first chunk
      hlwq_stage_pairs<T>(table, pairs_s);
      __syncthreads();
    }
    if (M == 1) {
      __syncwarp();
      hlwq_rotate_columns<T, BLOCK>(columns, lane, rotated);
      __syncwarp();
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      now = next;
      asm volatile("" ::: "memory");  // one tile ahead: loads of more take the registers of a second thread block
      if (t + 1 < TILES)
        next.load(codes, norms, matrix, row0 + 16 * (t + 1) + group, N - 1, chunk, quarter);
      else if (chunk + WARPS < CHUNKS)
        next.load(codes, norms, matrix, row0 + group, N - 1, chunk + WARPS, quarter);
#pragma unroll
      for (int u = 0; u < Codes::UNROLL; u++) {
        const int block = chunk * Codes::UNROLL + u;
        if (BLOCKS % Codes::UNROLL != 0 && block >= BLOCKS) break;
        const T* operand = M == 1 ? rotated + u * BLOCK : xs + (group * BLOCKS + block) * BLOCK;
        float part[2][4] = {};  // two sums, so that a product need not wait for the one before
#pragma unroll
        for (int w = 0; w < Codes::WORDS; w++) {
          uint4 v = {0, 0, 0, 0};
          if (group < M) v = *(const uint4*)(operand + (quarter * Codes::WORDS + w) * 8);
          uint32_t a[4], b[4];
          hlwq_decode_pairs(pairs_s, lane, now.words[u][0][w], a);
          hlwq_decode_pairs(pairs_s, lane, now.words[u][1][w], b);
          hlwq_mma<T>(part[0], a[0], b[0], a[1], b[1], v.x, v.y);
          hlwq_mma<T>(part[1], a[2], b[2], a[3], b[3], v.z, v.w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[t][i] = fmaf(float(now.norm[u][i / 2]), part[0][i] + part[1][i], sum[t][i]);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int m = 2 * quarter + i % 2;
      if (m < M) parts_s[warp][16 * t + group + i / 2 * 8][m] = sum[t][i];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * M; i += 32 * WARPS) {
    const int m = i / ROWS, row = row0 + i % ROWS;
    float total = 0;
#pragma unroll
    for (int j = 0; j < WARPS; j++) total += parts_s[j][i % ROWS][m];
    if (row < N) y[(pair + m) * N + row] = T(total);
  }
}
