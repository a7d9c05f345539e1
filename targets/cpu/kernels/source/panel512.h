/* Unpacks a tile of 32 rows of weights in vectors of 512 bits, so that 64 bytes hold 4 neighbours of 16 rows: see tiles.h. */
#ifndef MOEC_PANEL512_H
#define MOEC_PANEL512_H

#include "tiles.h"

#include <immintrin.h>

/* Return a mask of the first `count` of 64, or of 16, lanes. */
INLINE __mmask64 first_of_64(int count) { return count >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (count > 0 ? count : 0)) - 1; }
INLINE __mmask16 first_of_16(int count) { return count >= 16 ? 0xffff : (__mmask16)((1 << (count > 0 ? count : 0)) - 1); }

/* Return the numbers of a grid in every 16 bytes, raised by 128: the instructions want one factor without a sign. */
INLINE __m512i load_table(const int8_t *numbers) {
  return _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)numbers)), _mm512_set1_epi8(-128));
}

/* Return the highest bits of 64 times 4 codes of 3 bits, those of 4 in the lowest bits of a byte. */
INLINE __m512i spread_high(__m256i high) {
  __m512i each = _mm512_cvtepu8_epi16(high);
  return _mm512_or_si512(each, _mm512_slli_epi16(each, 4));
}

/* Return code `i` of 3 bits of each byte, from its lower two bits and the highest one. */
INLINE __m512i join_bits(__m512i low, __m512i high, int i) {
  __m512i highest = i < 2 ? _mm512_slli_epi16(high, 2 - i) : _mm512_srli_epi16(high, i - 2);
  low = _mm512_and_si512(_mm512_srli_epi16(low, 2 * i), _mm512_set1_epi8(3));
  return _mm512_ternarylogic_epi32(low, highest, _mm512_set1_epi8(4), 0xf8); /* low | highest & 4 */
}

/* Transposes 16 rows of 16 double words. */
INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

/* Unpacks code `part` of 64 bytes of each of 16 rows, `count` of which there are; `high` are the highest bits of those of 3. */
INLINE void unpack_chunk(const uint8_t *codes, const uint8_t *high, int row_bytes, int count, int bytes, int kind, __m512i table,
                         int part, uint8_t *to) {
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) { /* a row that is not there has zeros */
    size_t at = (size_t)i * row_bytes;
    int there = i < count ? bytes : 0;
    __m512i row = _mm512_maskz_loadu_epi8(first_of_64(there), codes + at);
    if (kind == GRID3) {
      __m256i highest = _mm256_maskz_loadu_epi8((__mmask32)first_of_64(there < CHUNK ? there / 2 : CHUNK / 2), high + at);
      rows[i] = _mm512_shuffle_epi8(table, join_bits(row, spread_high(highest), part));
      continue;
    }
    if (part) row = _mm512_srli_epi16(row, 4);
    rows[i] = kind == 8 ? row : _mm512_and_si512(row, _mm512_set1_epi8(15));
    if (kind == GRID) rows[i] = _mm512_shuffle_epi8(table, rows[i]);
  }
  transpose16(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + (size_t)i * TILE * 4, rows[i]);
}

/* Writes the scales of 16 rows, and their products with the zero points, group after group. */
INLINE void unpack_scales(const Matrix *w, int first, int count, float *scales, float *zeros) {
  const Shape *s = w->shape;
  __m512 middle = _mm512_set1_ps((float)(s->grid ? 128 : 1 << (s->bits - 1)));
  for (int g = 0; g < s->groups; g += 16) {
    __m512i rows[16];
    __mmask16 some = first_of_16(s->groups - g);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      size_t at = (size_t)(first + i) * s->groups + g;
      if (s->grid) {
        __m256i halves = _mm256_maskz_loadu_epi16(i < count ? some : 0, w->halves + at);
        rows[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
      } else {
        rows[i] = _mm512_maskz_loadu_epi32(i < count ? some : 0, w->scales + at);
      }
    }
    transpose16(rows);
    for (int i = 0; i < 16 && g + i < s->groups; i++) {
      _mm512_store_ps(scales + (size_t)(g + i) * TILE, _mm512_castsi512_ps(rows[i]));
      _mm512_store_ps(zeros + (size_t)(g + i) * TILE, _mm512_mul_ps(_mm512_castsi512_ps(rows[i]), middle));
    }
  }
  if (!w->zeros || s->grid) return;
  for (int i = 0; i < count; i++) {
    for (int g = 0; g < s->groups; g++) {
      zeros[(size_t)g * TILE + i] = scales[(size_t)g * TILE + i] * (float)zero_point(w, first + i, g);
    }
  }
}

static void unpack_tile(const Matrix *w, int first, int count, Panel panel) {
  const Shape *s = w->shape;
  __m512i table = s->grid ? load_table(w->numbers) : _mm512_setzero_si512();
  for (int half = 0; half < TILE; half += 16) {
    int rows = count - half;
    const uint8_t *codes = w->codes + (size_t)(first + half) * s->row_bytes, *high = codes + s->plane_bytes;
    uint8_t *to = panel.codes + half * 4;
    for (int c = 0; c < s->chunks; c++, codes += CHUNK, high += CHUNK / 2) {
      int bytes = s->plane_bytes - c * CHUNK;
      for (int part = 0; part < chunk_parts(s); part++, to += 16 * TILE * 4) {
        switch (s->bits) {
          case 8: unpack_chunk(codes, high, s->row_bytes, rows, bytes, 8, table, 0, to); break;
          case 3: unpack_chunk(codes, high, s->row_bytes, rows, bytes, GRID3, table, part, to); break;
          default: unpack_chunk(codes, high, s->row_bytes, rows, bytes, s->grid ? GRID : 4, table, part, to);
        }
      }
    }
    unpack_scales(w, first + half, rows, panel.scales + half, panel.zeros + half);
  }
}

#endif
