/* The kernels for x86-64 with AVX-512 and its dot products of bytes (VNNI). */
#if defined(__x86_64__) || defined(_M_X64)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "activate.h"

#define INLINE static inline __attribute__((always_inline))

#include "panel512.h"

/* --- rounding activations ----------------------------------------------------------------------------------------- */

INLINE __m128i round16(const float *x, __m512 inverse) {
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse)));
}

static void quantize(const Shape *s, const float *x, int8_t *codes, float *scales, float *sums) {
  int wide = chunk_width(s);
  const __m128i split = s->bits == 4 ? _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
                                     : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (size_t i = (size_t)(s->width / wide) * wide; i < codes_row(s); i++) codes[i] = 0;
  for (int g = 0; g < s->groups; g++) {
    const float *group = x + (size_t)g * s->group;
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < s->group; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(group + i)));
    float largest = _mm512_reduce_max_ps(most);
    __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < s->group; i += 16) {
      __m128i rounded = round16(group + i, inverse);
      total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(rounded));
      int place = g * s->group + i, within = place % wide;
      int8_t *chunk = codes + place - within;
      if (s->bits == 8) {
        _mm_storeu_si128((__m128i *)(chunk + within), rounded);
      } else if (s->bits == 3) {
        int32_t apart[4];
        _mm_storeu_si128((__m128i *)apart, _mm_shuffle_epi8(rounded, split));
        for (int j = 0; j < 4; j++) memcpy(chunk + j * CHUNK + within / 4, &apart[j], 4);
      } else {
        __m128i apart = _mm_shuffle_epi8(rounded, split);
        _mm_storel_epi64((__m128i *)(chunk + within / 2), apart);
        _mm_storel_epi64((__m128i *)(chunk + CHUNK + within / 2), _mm_unpackhi_epi64(apart, apart));
      }
    }
    scales[g] = largest / 127;
    sums[g] = scales[g] * (float)_mm512_reduce_add_epi32(total);
  }
}

/* --- a few rows of activations ------------------------------------------------------------------------------------ */

typedef __m512i Codes;
typedef __m512 Numbers;
#define UNIT 64
#define LANES 16
#define LOWERED(bits) 0
#define RAISED 128

INLINE Codes load_codes(const uint8_t *codes) { return _mm512_loadu_si512(codes); }
INLINE Codes load_some(const uint8_t *codes, int bytes) { return _mm512_maskz_loadu_epi8(first_of_64(bytes), codes); }
INLINE Codes load_high(const uint8_t *high) { return spread_high(_mm256_loadu_si256((const __m256i *)high)); }
INLINE void split_codes(int kind, Codes codes, Codes highest, Codes table, Codes part[4]) {
  const __m512i half = _mm512_set1_epi8(15);
  if (kind == GRID3) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) part[i] = _mm512_shuffle_epi8(table, join_bits(codes, highest, i));
    return;
  }
  part[0] = kind == 8 ? codes : _mm512_and_si512(codes, half);
  part[1] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), half);
  if (kind == GRID) part[0] = _mm512_shuffle_epi8(table, part[0]), part[1] = _mm512_shuffle_epi8(table, part[1]);
}
INLINE Numbers multiply_unit(int kind, const Codes part[4], const int8_t *x) {
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < PARTS(kind); i++) sum = _mm512_dpbusd_epi32(sum, part[i], _mm512_loadu_si512(x + i * CHUNK));
  return _mm512_cvtepi32_ps(sum);
}
INLINE Numbers spread_scales(const float *scales, int unit, int log, int shift) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  switch (log) {
    case 3:
      return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                   _mm512_castps256_ps512(_mm256_loadu_ps(scales + (size_t)unit * 8)));
    case 2:
      return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(scales + (size_t)unit * 4)));
    case 1:
      return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 1),
                                   _mm512_castps128_ps512(_mm_loadu_ps(scales + (size_t)unit * 2)));
    default:
      return _mm512_set1_ps(scales[unit >> shift]);
  }
}
INLINE Numbers zero_points(int bits, const uint8_t *zeros) {
  __m128i points, half = _mm_set1_epi8(15);
  if (bits == 8) {
    points = _mm_loadu_si128((const __m128i *)zeros);
  } else {
    __m128i both = _mm_loadl_epi64((const __m128i *)zeros);
    points = _mm_unpacklo_epi8(_mm_and_si128(both, half), _mm_and_si128(_mm_srli_epi16(both, 4), half));
  }
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(points));
}
INLINE Numbers load_halves(const uint16_t *x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
INLINE Numbers load_numbers(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store_numbers(float *x, Numbers v) { _mm512_storeu_ps(x, v); }
INLINE Numbers no_numbers(void) { return _mm512_setzero_ps(); }
INLINE Numbers add_numbers(Numbers a, Numbers b) { return _mm512_add_ps(a, b); }
INLINE Numbers scale_numbers(Numbers a, Numbers b) { return _mm512_mul_ps(a, b); }
INLINE Numbers add_product(Numbers a, Numbers b, Numbers c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum_numbers(Numbers a) { return _mm512_reduce_add_ps(a); }

#include "rows.h"

/* --- many rows of activations ------------------------------------------------------------------------------------- */

enum { BLOCK = 6 }; /* rows of activations that are multiplied at once: 12 sums of integers and 12 of numbers */

/* Adds the products of `steps` steps of 4 neighbours to the sums. */
INLINE void multiply_steps(__m512i sum[BLOCK][2], int n, const uint8_t *codes, const int8_t *const x[BLOCK], size_t at,
                           int steps) {
  for (int k = 0; k < steps; k++) {
    __m512i a = _mm512_load_si512(codes + (size_t)k * TILE * 4), b = _mm512_load_si512(codes + (size_t)k * TILE * 4 + 64);
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
      __m512i v = _mm512_set1_epi32(*(const int32_t *)(x[i] + at + (size_t)k * 4));
      sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], a, v);
      sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], b, v);
    }
  }
}

/* Multiplies `n` rows of activations; meanwhile the processor fetches the bytes ahead..end. */
INLINE void multiply_block(const Matrix *w, int first, int count, const Product *p, int from, int n, Panel panel,
                           const uint8_t *ahead, const uint8_t *end) {
  const Shape *s = w->shape;
  const int8_t *x[BLOCK];
  const float *scales[BLOCK], *sums[BLOCK];
  __m512 y[BLOCK][2];
  for (int i = 0; i < n; i++) {
    x[i] = codes_of(p, s, from + i), scales[i] = scales_of(p, s, from + i), sums[i] = sums_of(p, s, from + i);
    y[i][0] = y[i][1] = _mm512_setzero_ps();
  }
  int parts = group_parts(s), steps = s->group / 4 / parts;
  size_t lines = (size_t)(end - ahead) / CHUNK / (size_t)s->groups + 1;
  for (int g = 0; g < s->groups; g++) {
    for (size_t i = 0; i < lines && ahead < end; i++, ahead += CHUNK) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
    __m512i sum[BLOCK][2];
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    for (int part = 0; part < parts; part++) {
      size_t start = group_start(s, g) + (size_t)part * CHUNK;
      multiply_steps(sum, n, panel.codes + start * TILE, x, start, steps);
    }
    const float *scale = panel.scales + (size_t)g * TILE, *zero = panel.zeros + (size_t)g * TILE;
#pragma GCC unroll 6
    for (int i = 0; i < n; i++) {
      __m512 a = _mm512_set1_ps(scales[i][g]), off = _mm512_set1_ps(sums[i][g]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][h]), a);
        y[i][h] = _mm512_fmadd_ps(part, _mm512_load_ps(scale + 16 * h), y[i][h]);
        y[i][h] = _mm512_fnmadd_ps(off, _mm512_load_ps(zero + 16 * h), y[i][h]);
      }
    }
  }
  for (int h = 0; h < 2; h++) {
    __mmask16 some = first_of_16(count - 16 * h);
    __m512 bias = w->bias ? _mm512_maskz_loadu_ps(some, w->bias + first + 16 * h) : _mm512_setzero_ps();
    for (int i = 0; i < n; i++) {
      float *to = p->y + (size_t)(from + i) * p->stride + first + 16 * h;
      _mm512_mask_storeu_ps(to, some, _mm512_add_ps(y[i][h], bias));
    }
  }
}

static void multiply_tile(const Matrix *w, int first, int count, int next, const Product *p, void *memory) {
  const Shape *s = w->shape;
  Panel panel = place_panel(s, memory);
  const uint8_t *ahead = w->codes + (size_t)(first + count) * s->row_bytes, *end = ahead + (size_t)next * s->row_bytes;
  unpack_tile(w, first, count, panel);
  for (int i = 0; i < p->count;) {
    switch (p->count - i) {
      case 1: multiply_block(w, first, count, p, i, 1, panel, ahead, end), i += 1; break;
      case 2: multiply_block(w, first, count, p, i, 2, panel, ahead, end), i += 2; break;
      case 3: multiply_block(w, first, count, p, i, 3, panel, ahead, end), i += 3; break;
      case 4: multiply_block(w, first, count, p, i, 4, panel, ahead, end), i += 4; break;
      case 5: multiply_block(w, first, count, p, i, 5, panel, ahead, end), i += 5; break;
      default: multiply_block(w, first, count, p, i, BLOCK, panel, ahead, end), i += BLOCK;
    }
    ahead = end; /* once is enough */
  }
}

const InstructionSet avx512_kernels = {"avx512-vnni", 6, quantize, multiply_rows, multiply_tile, activate};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
