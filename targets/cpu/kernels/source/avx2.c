/* The kernels for x86-64 with AVX2 and FMA. */
#if defined(__x86_64__) || defined(_M_X64)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "activate.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef __m256i Codes;
typedef __m256 Numbers;
#define UNIT 32
#define LANES 8
#define LOWERED(bits) ((bits) == 8 ? 128 : 0)
#define RAISED 0

static inline float largest_of(const float *x, int count) {
  __m256 most = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
  for (int i = 0; i < count; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

INLINE __m128i round16(const float *x, __m256 inverse) {
  __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
  __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse));
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static void quantize(const Shape *s, const float *x, int8_t *codes, float *scales, float *sums) {
  int wide = chunk_width(s);
  const __m128i split = s->bits == 4 ? _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
                                     : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  size_t whole = (size_t)(s->width / wide) * wide;
  memset(codes + whole, 0, codes_row(s) - whole);
  for (int g = 0; g < s->groups; g++) {
    const float *group = x + (size_t)g * s->group;
    float largest = largest_of(group, s->group);
    __m256 inverse = _mm256_set1_ps(largest > 0 ? 127 / largest : 0);
    int32_t sum[4];
    __m128i total = _mm_setzero_si128();
    for (int i = 0; i < s->group; i += 16) {
      __m128i rounded = round16(group + i, inverse);
      __m256i pairs = _mm256_madd_epi16(_mm256_cvtepi8_epi16(rounded), _mm256_set1_epi16(1));
      total = _mm_add_epi32(total, _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
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
    _mm_storeu_si128((__m128i *)sum, total);
    scales[g] = largest / 127;
    sums[g] = scales[g] * (float)(sum[0] + sum[1] + sum[2] + sum[3]);
  }
}

INLINE Codes load_codes(const uint8_t *codes) { return _mm256_loadu_si256((const __m256i *)codes); }
INLINE Codes load_some(const uint8_t *codes, int bytes) {
  uint8_t some[UNIT] = {0};
  memcpy(some, codes, (size_t)(bytes < UNIT ? bytes : UNIT));
  return load_codes(some);
}
INLINE Codes load_table(const int8_t *numbers) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)numbers));
}
INLINE Codes load_high(const uint8_t *high) {
  __m256i each = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)high));
  return _mm256_or_si256(each, _mm256_slli_epi16(each, 4));
}
INLINE void split_codes(int kind, Codes codes, Codes highest, Codes table, Codes part[4]) {
  const __m256i half = _mm256_set1_epi8(15), two = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
  if (kind == GRID3) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      __m256i high = i < 2 ? _mm256_slli_epi16(highest, 2 - i) : _mm256_srli_epi16(highest, i - 2);
      __m256i low = _mm256_and_si256(_mm256_srli_epi16(codes, 2 * i), two);
      part[i] = _mm256_shuffle_epi8(table, _mm256_or_si256(low, _mm256_and_si256(high, four)));
    }
    return;
  }
  part[0] = kind == 8 ? _mm256_xor_si256(codes, _mm256_set1_epi8(-128)) : _mm256_and_si256(codes, half);
  part[1] = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
  if (kind == GRID) part[0] = _mm256_shuffle_epi8(table, part[0]), part[1] = _mm256_shuffle_epi8(table, part[1]);
}
/* Return the products of signed bytes, added in pairs: at most 2 * 128 * 127, which fits. The sign goes to the second factor,
   as the instruction wants one without. */
INLINE __m256i multiply_signed(__m256i a, __m256i b) { return _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a)); }
/* Products of bytes are added in pairs to 16 bits: of codes below 16 two pairs fit. */
INLINE Numbers multiply_unit(int kind, const Codes part[4], const int8_t *x) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i even = _mm256_loadu_si256((const __m256i *)x);
  if (kind == 4) {
    __m256i odd = _mm256_loadu_si256((const __m256i *)(x + CHUNK));
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(part[0], even), _mm256_maddubs_epi16(part[1], odd));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, one));
  }
  __m256i sum = _mm256_madd_epi16(multiply_signed(part[0], even), one);
#pragma GCC unroll 4
  for (int i = 1; i < PARTS(kind); i++) {
    __m256i other = _mm256_loadu_si256((const __m256i *)(x + i * CHUNK));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(multiply_signed(part[i], other), one));
  }
  return _mm256_cvtepi32_ps(sum);
}
INLINE Numbers spread_scales(const float *scales, int unit, int log, int shift) {
  switch (log) {
    case 2:
      return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales + (size_t)unit * 4)),
                                      _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    case 1:
      return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales + (size_t)unit * 2)),
                                      _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    default:
      return _mm256_set1_ps(scales[unit >> shift]);
  }
}
INLINE Numbers zero_points(int bits, const uint8_t *zeros) {
  __m128i points, half = _mm_set1_epi8(15);
  if (bits == 8) {
    points = _mm_loadl_epi64((const __m128i *)zeros);
  } else {
    int32_t four;
    memcpy(&four, zeros, sizeof four);
    __m128i both = _mm_cvtsi32_si128(four);
    points = _mm_unpacklo_epi8(_mm_and_si128(both, half), _mm_and_si128(_mm_srli_epi16(both, 4), half));
  }
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(points), _mm256_set1_epi32(LOWERED(bits))));
}
INLINE Numbers load_halves(const uint16_t *x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16));
}
INLINE Numbers load_numbers(const float *x) { return _mm256_loadu_ps(x); }
INLINE void store_numbers(float *x, Numbers v) { _mm256_storeu_ps(x, v); }
INLINE Numbers no_numbers(void) { return _mm256_setzero_ps(); }
INLINE Numbers add_numbers(Numbers a, Numbers b) { return _mm256_add_ps(a, b); }
INLINE Numbers scale_numbers(Numbers a, Numbers b) { return _mm256_mul_ps(a, b); }
INLINE Numbers add_product(Numbers a, Numbers b, Numbers c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum_numbers(Numbers a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#include "rows.h"

/* --- many rows of activations ------------------------------------------------------------------------------------- */

#define STEP 4
#define TILE_LOWERED LOWERED
typedef uint32_t Word;

/* As multiply_unit: of codes below 16 the pairs of two steps fit in 16 bits. */
INLINE __m256i add_steps(int bits, __m256i sum, __m256i a, __m256i x, __m256i b, __m256i y) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (bits == 4) {
    __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
  }
  __m256i first = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(x, a));
  __m256i second = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(y, b));
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones)));
}

#include "tiles256.h"

const InstructionSet avx2_kernels = {"avx2", 14, quantize, multiply_rows, multiply_tile, activate};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
