// y = x W^T for few rows (docs/format.md, step 5): x T [rows, Kp] rotated, codes uint32 [.., N, Kp * b / 32],
// norms half [.., N, Kp / B] -> y T [M, N]; HLWQ_GATHER: y T [pairs, N], one row against the matrix experts[pair].
// HLWQ_RESIDUAL: + residual T [M, N]. HLWQ_SWIGLU: of N / 2 gates and N / 2 others, y = silu(gate) * other T [M, N / 2].
//
// The layout of MLX's affine kernel for few rows (qmv_fast): two simdgroups of four outputs each, a lane takes one chunk
// of every row at a time (32 codes: 16 bytes at 4 bits), its activations serve four outputs, simd_sum at the end. Rows
// beyond the last are clamped, not skipped, so that trip counts stay fixed. A norm is applied once a chunk to the sums of
// up to four rows of x; of more rows a second set of sums would not fit the registers, and it is applied to decoded
// values.
  constexpr int ROWS = 4;
#ifdef HLWQ_SWIGLU
  constexpr int OUTPUTS = ROWS / 2;  // of a simdgroup: its first rows are gates, the last ones their others
#else
  constexpr int OUTPUTS = ROWS;
#endif
  constexpr bool LATE = M <= 4;
#ifdef HLWQ_ENTRIES
  threadgroup uint lookup_s[HLWQ_ENTRIES];
  for (uint i = thread_index_in_threadgroup; i < HLWQ_ENTRIES; i += 64) lookup_s[i] = lookup[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  const uint lane = thread_index_in_simdgroup;
  const int N = codes_shape[codes_ndim - 2], KP = x_shape[1];
  const int row_words = KP / 32 * HLWQ_BITS, row_blocks = KP / HLWQ_BLOCK;
  const int outputs = N / (ROWS / OUTPUTS);
  const int row0 = (int(threadgroup_position_in_grid.y) * 2 + int(simdgroup_index_in_threadgroup)) * OUTPUTS;
  if (row0 >= outputs) return;
#ifdef HLWQ_GATHER
  const uint pair = threadgroup_position_in_grid.z;
  const size_t matrix = size_t(experts[pair]) * N;
  const device T* xs = x + size_t(pair / (threadgroups_per_grid.z / uint(x_shape[0]))) * KP;
#else
  const uint pair = 0;
  const size_t matrix = 0;
  const device T* xs = x;
#endif

  float sum[M][ROWS];
  HLWQ_UNROLL for (int m = 0; m < M; m++) {
    HLWQ_UNROLL for (int r = 0; r < ROWS; r++) sum[m][r] = 0.0f;
  }

  for (int k = int(lane) * HLWQ_CHUNK; k < KP; k += 32 * HLWQ_CHUNK) {
    uint words[ROWS][HLWQ_WORDS];
    float norm[ROWS];
    HLWQ_UNROLL for (int r = 0; r < ROWS; r++) {
      const size_t row = matrix + size_t(r / OUTPUTS * outputs + min(row0 + r % OUTPUTS, outputs - 1));
      hlwq_load(codes + row * row_words + k / 32 * HLWQ_BITS + (k & 31) * HLWQ_BITS / 32, words[r]);
      norm[r] = float(norms[row * row_blocks + k / HLWQ_BLOCK]);
    }
    float part[LATE ? M : 1][ROWS];
    HLWQ_UNROLL for (int m = 0; m < (LATE ? M : 1); m++) {
      HLWQ_UNROLL for (int r = 0; r < ROWS; r++) part[m][r] = 0.0f;
    }
    HLWQ_UNROLL for (int g = 0; g < HLWQ_CHUNK / HLWQ_GROUP; g++) {
      float c[ROWS][HLWQ_GROUP];
      HLWQ_UNROLL for (int r = 0; r < ROWS; r++) {
        HLWQ_DECODE(words[r], g, c[r]);
        if (!LATE) {
          HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i++) c[r][i] *= norm[r];
        }
      }
      HLWQ_UNROLL for (int m = 0; m < M; m++) {
        float a[HLWQ_GROUP];
        HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i += 4) {
          vec<T, 4> v = *(const device vec<T, 4>*)(xs + m * KP + k + g * HLWQ_GROUP + i);
          a[i] = float(v.x);
          a[i + 1] = float(v.y);
          a[i + 2] = float(v.z);
          a[i + 3] = float(v.w);
        }
        HLWQ_UNROLL for (int r = 0; r < ROWS; r++) {
          HLWQ_UNROLL for (int i = 0; i < HLWQ_GROUP; i++) {
            if (LATE)
              part[LATE ? m : 0][r] = fma(c[r][i], a[i], part[LATE ? m : 0][r]);
            else
              sum[m][r] = fma(c[r][i], a[i], sum[m][r]);
          }
        }
      }
    }
    if (LATE) {
      HLWQ_UNROLL for (int m = 0; m < M; m++) {
        HLWQ_UNROLL for (int r = 0; r < ROWS; r++) sum[m][r] = fma(norm[r], part[LATE ? m : 0][r], sum[m][r]);
      }
    }
  }
  HLWQ_UNROLL for (int m = 0; m < M; m++) {
    HLWQ_UNROLL for (int r = 0; r < OUTPUTS; r++) {
      float total = simd_sum(sum[m][r]) * HLWQ_SCALE;
#ifdef HLWQ_SWIGLU
      total *= simd_sum(sum[m][r + OUTPUTS]) * HLWQ_SCALE / (1.0f + exp(-total));
#endif
      const size_t at = size_t(pair + m) * outputs + row0 + r;
      if (lane == 0 && row0 + r < outputs) {
#ifdef HLWQ_RESIDUAL
        total += float(residual[at]);
#endif
        y[at] = T(total);
      }
    }
  }
