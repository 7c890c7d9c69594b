// y = x W^T for few rows on tensor cores (docs/format.md, steps 1, 2 and 5): 4 bits, T half or bfloat16.
// codes uint32 [.., N, Kp / 8], norms half [.., N, Kp / B], table float [16] -> y T [M, N]; with `experts` uint32
// [pairs]: y T [pairs, N], one row against the matrix experts[pair].
// M == 1: x T [rows, K] as a layer gets it; M > 1: x T [M, Kp], rotated.
//
// Codes are the 16 x 16 operand of mma.m16n8k16 and rows of x its 16 x 8 operand, so eight rows cost what one costs. K
// may run in any order that both operands share: lane l takes quarter l % 4 of every block of the rows l / 4 and
// l / 4 + 8, in loads of B / 8 bytes. A thread block, one a multiprocessor, computes 16 outputs, then the 16 that lie
// gridDim.x further; its warps take 256 columns in turn. What it prepares (pairs, x) is prepared once, and codes of the
// next RING pieces are always on their way. Small loads (x, the table) are issued first, or they would wait behind.
//
// Two codes are one lookup in shared memory, where each lane has its own copy of the 256 pairs: no bank conflicts, and
// two integer instructions a pair. Decoding in registers (prmt) took four to five, and that pipe runs at half the issue
// rate: counted in the machine code, 24576 x 4096 needed 17 us of it where an H200's memory needs 12.
// M == 1: a warp rotates the columns that it uses while its codes are on their way, which saves a launch.
//
// M == 1 may do more of a decoder's step, for fewer launches; a null pointer leaves a part out:
//   add, scale   x := rms_norm(x + add) * scale, and x + add goes to `sum_out`; `scale` alone: rms_norm(x) * scale
//   SWIGLU       of N / 2 gates and N / 2 others: y = silu(gate) * other, [N / 2]
//   residual     y += residual
#pragma once
#include "decode.cuh"
#include "transform.cuh"

constexpr int HLWQ_COLUMNS = 256, HLWQ_MAX_WARPS = 16, HLWQ_RING = 2;

// The centroids of the two codes of a byte.
template <typename T>
__device__ uint32_t hlwq_pair(const float* table, int byte) {
  alignas(4) const T two[2] = {T(table[byte & 15]), T(table[byte >> 4 & 15])};
  return *(const uint32_t*)two;
}

// The pairs of all bytes, 32 times: pairs[byte][lane]. Neighboring threads write different banks. `first`: this thread's
// first pair, loaded long before.
template <typename T>
__device__ void hlwq_stage_pairs(uint32_t first, const float* table, uint32_t* pairs) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    const uint32_t v = byte == threadIdx.x ? first : hlwq_pair<T>(table, byte);
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

// V columns of a row from k on; zeros beyond K.
template <typename T, int V>
__device__ void hlwq_load_columns(const T* row, int k, int K, T (&values)[V]) {
  if (k + V <= K && size_t(row + k) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < V / 8; i++) ((uint4*)values)[i] = ((const uint4*)(row + k))[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = k + i < K ? row[k + i] : T(0.0f);
  }
}

// The columns of a warp, V a lane, rotated to `out`, which is the warp's and 16-byte aligned.
template <typename T, int BLOCK, int V>
__device__ void hlwq_rotate_columns(float (&v)[V], int lane, T* out) {
  hlwq_transform<V, BLOCK / V>(v, lane);
  alignas(16) T rotated[V];
#pragma unroll
  for (int i = 0; i < V; i++) rotated[i] = T(v[i] * rsqrtf(float(BLOCK)));
#pragma unroll
  for (int i = 0; i < V / 8; i++) ((uint4*)(out + lane * V))[i] = ((const uint4*)rotated)[i];
}

// What a lane holds of x: V columns, with `add` added in; and of `scale`.
template <typename T, int V>
struct HlwqColumns {
  alignas(16) T x[V], scale[V];

  __device__ void load(const T* row, const T* add, const T* weights, int k, int K) {
    hlwq_load_columns(row, k, K, x);
    if (add) {
      alignas(16) T more[V];
      hlwq_load_columns(add, k, K, more);
#pragma unroll
      for (int i = 0; i < V; i++) x[i] = T(float(x[i]) + float(more[i]));
    }
    if (weights) hlwq_load_columns(weights, k, K, scale);
  }

  __device__ float square_sum() const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < V; i++) total = fmaf(float(x[i]), float(x[i]), total);
    return total;
  }
};

// A lane's codes of 16 rows and the columns of a warp, and their norms. EXACT: all warps always have columns.
template <int BLOCK, int EXACT>
struct HlwqCodes {
  static constexpr int UNROLL = HLWQ_COLUMNS / BLOCK, WORDS = BLOCK / 32;  // blocks; words of a quarter of one
  uint32_t words[UNROLL][2][WORDS];
  alignas(16) __half norm[2][UNROLL];

  // `row`: of the first 8, the lane's; `last`: no row beyond is read
  __device__ void load(const uint32_t* codes, const __half* norms, int row, int last, int blocks, int chunk, int quarter) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const size_t first = size_t(min(row + 8 * i, last)) * blocks + chunk * UNROLL;
#pragma unroll
      for (int u = 0; u < UNROLL; u++)
        if (EXACT || chunk * UNROLL + u < blocks)
          hlwq_load<WORDS>(codes + ((first + u) * 4 + quarter) * WORDS, words[u][i]);
      if constexpr (EXACT && UNROLL % 4 == 0) {
#pragma unroll
        for (int u = 0; u < UNROLL; u += 4) *(uint2*)(norm[i] + u) = __ldcs((const uint2*)(norms + first + u));
      } else if constexpr (EXACT && UNROLL == 2) {
        *(uint32_t*)norm[i] = __ldcs((const uint32_t*)(norms + first));
      } else {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
          if (EXACT || chunk * UNROLL + u < blocks) norm[i][u] = norms[first + u];
      }
    }
  }
};

// The pieces of work of a warp in their order: `step` of the columns, then `tile` of a pair (SWIGLU), then `group` of rows.
struct HlwqPiece {
  int step, tile, group;

  __device__ void advance(int steps, int tiles) {
    if (++step < steps) return;
    step = 0;
    if (++tile < tiles) return;
    tile = 0;
    group += gridDim.x;
  }
};

template <typename T, int BLOCK, int M, int EXACT, int SWIGLU>
__device__ void hlwq_gemv_mma(
    const T* x, const T* add, const T* scale, float eps, const uint32_t* codes, const __half* norms, const float* table,
    const uint32_t* experts, int pairs_a_row, int N, int K, const T* residual, T* y, T* sum_out) {
  using Codes = HlwqCodes<BLOCK, EXACT>;
  constexpr int V = HLWQ_COLUMNS / 32, TILES = SWIGLU ? 2 : 1;
  static_assert(!SWIGLU || M == 1, "one row");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int quarter = lane % 4, row_of_8 = lane / 4;
  const int blocks = (K + BLOCK - 1) / BLOCK, chunks = (blocks + Codes::UNROLL - 1) / Codes::UNROLL;
  const int steps = (chunks + warps - 1) / warps;
  const int outputs = N / TILES, groups = (outputs + 15) / 16;
  const size_t pair = blockIdx.z, matrix = experts ? size_t(experts[pair]) * N * blocks : 0;
  const T* xs = x + pair / pairs_a_row * K;
  codes += matrix * (BLOCK / 8), norms += matrix;

  extern __shared__ uint4 hlwq_shared[];
  uint32_t* pairs_s = (uint32_t*)hlwq_shared;                                    // [256][32]
  float* squares_s = (float*)(pairs_s + 256 * 32);                               // [HLWQ_MAX_WARPS]
  auto parts_s = (float(*)[HLWQ_MAX_WARPS][16][M])(squares_s + HLWQ_MAX_WARPS);  // [2 * TILES]
  T* rotated = (T*)(parts_s + 2 * TILES) + warp * steps * HLWQ_COLUMNS;          // [steps * HLWQ_COLUMNS], this warp's

  const uint32_t first_pair = hlwq_pair<T>(table, threadIdx.x);
  HlwqColumns<T, V> columns;
  if (M == 1) columns.load(xs, add, scale, warp * HLWQ_COLUMNS + lane * V, K);
  Codes ring[HLWQ_RING];
  HlwqPiece ahead = {0, 0, int(blockIdx.x)}, now = ahead;
  auto load_ahead = [&](Codes& into) {
    if (ahead.group < groups)
      into.load(codes + size_t(ahead.tile) * outputs * blocks * (BLOCK / 8), norms + size_t(ahead.tile) * outputs * blocks,
                ahead.group * 16 + row_of_8, outputs - 1, blocks, ahead.step * warps + warp, quarter);
    ahead.advance(steps, TILES);
  };
  load_ahead(ring[0]);

  hlwq_stage_pairs<T>(first_pair, table, pairs_s);
  float factor = 1;
  if (scale) {
    float squares = columns.square_sum();
    for (int step = 1; step < steps; step++) {
      HlwqColumns<T, V> more;
      more.load(xs, add, nullptr, (step * warps + warp) * HLWQ_COLUMNS + lane * V, K);
      squares += more.square_sum();
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, mask);
    if (lane == 0) squares_s[warp] = squares;
    __syncthreads();
    squares = 0;
    for (int i = 0; i < warps; i++) squares += squares_s[i];
    factor = rsqrtf(squares / K + eps);
  }
  if (M == 1) {
    for (int step = 0; step < steps; step++) {
      const int k = (step * warps + warp) * HLWQ_COLUMNS + lane * V;
      if (step) columns.load(xs, add, scale, k, K);
      if (add && blockIdx.x == 0)
#pragma unroll
        for (int i = 0; i < V; i++)
          if (k + i < K) sum_out[k + i] = columns.x[i];
      float values[V];
#pragma unroll
      for (int i = 0; i < V; i++) values[i] = float(columns.x[i]) * (scale ? factor * float(columns.scale[i]) : 1.0f);
      hlwq_rotate_columns<T, BLOCK>(values, lane, rotated + step * HLWQ_COLUMNS);
    }
  }
#pragma unroll
  for (int r = 1; r < HLWQ_RING; r++) load_ahead(ring[r]);
  __syncthreads();

  float sum[4] = {};
  int buffer = 0;  // of two for the parts of a group: one is summed while the other is written
  while (now.group < groups) {
#pragma unroll
    for (int r = 0; r < HLWQ_RING; r++) {
      if (now.group >= groups) break;
      Codes& piece = ring[r];
      const int chunk = now.step * warps + warp;
#pragma unroll
      for (int u = 0; u < Codes::UNROLL; u++) {
        const int block = chunk * Codes::UNROLL + u;
        if (!EXACT && block >= blocks) break;
        const T* operand = M == 1 ? rotated + (now.step * Codes::UNROLL + u) * BLOCK : xs + (row_of_8 * blocks + block) * BLOCK;
        float part[2][4] = {};  // two sums, so that a product need not wait for the one before
#pragma unroll
        for (int w = 0; w < Codes::WORDS; w++) {
          uint4 v = {0, 0, 0, 0};
          if (row_of_8 < M) v = *(const uint4*)(operand + (quarter * Codes::WORDS + w) * 8);
          uint32_t a[4], b[4];
          hlwq_decode_pairs(pairs_s, lane, piece.words[u][0][w], a);
          hlwq_decode_pairs(pairs_s, lane, piece.words[u][1][w], b);
          hlwq_mma<T>(part[0], a[0], b[0], a[1], b[1], v.x, v.y);
          hlwq_mma<T>(part[1], a[2], b[2], a[3], b[3], v.z, v.w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[i] = fmaf(float(piece.norm[i / 2][u]), part[0][i] + part[1][i], sum[i]);
      }
      asm volatile("" ::: "memory");
      load_ahead(piece);

      const int tile = now.tile, group = now.group;
      now.advance(steps, TILES);
      if (now.step != 0) continue;  // more columns of these rows
      auto parts = parts_s + buffer * TILES;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = 2 * quarter + i % 2;
        if (m < M) parts[tile][warp][row_of_8 + i / 2 * 8][m] = sum[i];
        sum[i] = 0;
      }
      if (tile + 1 < TILES) continue;
      __syncthreads();
      buffer ^= 1;
      for (int i = threadIdx.x; i < 16 * M; i += blockDim.x) {
        const int m = i / 16, at = i % 16, row = group * 16 + at;
        float total = 0, other = 0;
        for (int j = 0; j < warps; j++) {
          total += parts[0][j][at][m];
          if (SWIGLU) other += parts[TILES - 1][j][at][m];
        }
        if (SWIGLU) total *= other / (1 + expf(-total));
        const size_t to = (pair + m) * outputs + row;
        if (row < outputs) y[to] = T(residual ? total + float(residual[to]) : total);
      }
    }
  }
}
