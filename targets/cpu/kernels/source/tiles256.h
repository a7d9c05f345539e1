/* Multiplies a tile of rows of weights by many rows of activations in vectors of 256 bits. A file that includes this says before
   what tiles.h asks for, with steps of 4 neighbours, and

   add_steps(bits, sum, a, x, b, y)     sum and the products of a with x and of b with y, each lane of 4 neighbours */
#ifndef MOEC_TILES256_H
#define MOEC_TILES256_H

#include "tiles.h"

#include <immintrin.h>

enum { BLOCK = 4, HALF = 16 }; /* rows of activations at once; rows of weights: 8 sums of integers are in registers */

INLINE __m256i four_of(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

/* Multiplies `n` rows of activations with rows half..half + HALF of the tile. */
INLINE void multiply_block(const Matrix *w, int first, int count, const Product *p, int from, int n, Panel panel, int half, int bits) {
  const Shape *s = w->shape;
  const int8_t *x[BLOCK];
  __m256 y[BLOCK][2];
  for (int i = 0; i < n; i++) x[i] = codes_of(p, s, from + i), y[i][0] = y[i][1] = _mm256_setzero_ps();
  int parts = group_parts(s), steps = s->group / STEP / parts;
  for (int g = 0; g < s->groups; g++) {
    __m256i sum[BLOCK][2];
    for (int i = 0; i < n; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (int part = 0; part < parts; part++) {
      size_t start = group_start(s, g) + (size_t)part * CHUNK;
      const uint8_t *codes = panel.codes + start * TILE + (size_t)half * STEP;
      for (int k = 0; k < steps; k += 2, codes += 2 * TILE * STEP) {
        const __m256i *a = (const __m256i *)codes, *b = (const __m256i *)(codes + TILE * STEP);
        __m256i a0 = _mm256_loadu_si256(a), a1 = _mm256_loadu_si256(a + 1), b0 = _mm256_loadu_si256(b), b1 = _mm256_loadu_si256(b + 1);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
          __m256i even = four_of(x[i] + start + (size_t)k * STEP), odd = four_of(x[i] + start + (size_t)(k + 1) * STEP);
          sum[i][0] = add_steps(bits, sum[i][0], a0, even, b0, odd);
          sum[i][1] = add_steps(bits, sum[i][1], a1, even, b1, odd);
        }
      }
    }
    for (int i = 0; i < n; i++) {
      __m256 scale = _mm256_set1_ps(scales_of(p, s, from + i)[g]), off = _mm256_set1_ps(sums_of(p, s, from + i)[g]);
      for (int v = 0; v < 2; v++) {
        size_t at = (size_t)g * TILE + (size_t)(half + 8 * v);
        __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][v]), scale);
        y[i][v] = _mm256_fmadd_ps(part, _mm256_loadu_ps(panel.scales + at), y[i][v]);
        y[i][v] = _mm256_fnmadd_ps(off, _mm256_loadu_ps(panel.zeros + at), y[i][v]);
      }
    }
  }
  for (int i = 0; i < n; i++) {
    float out[HALF];
    _mm256_storeu_ps(out, y[i][0]), _mm256_storeu_ps(out + 8, y[i][1]);
    float *to = p->y + (size_t)(from + i) * p->stride + first + half;
    for (int row = 0; row < HALF && half + row < count; row++) to[row] = out[row] + (w->bias ? w->bias[first + half + row] : 0);
  }
}

INLINE void multiply_tile_as(const Matrix *w, int first, int count, const Product *p, Panel panel, int bits) {
  for (int half = 0; half < count; half += HALF) {
    for (int i = 0; i < p->count;) {
      switch (p->count - i) {
        case 1: multiply_block(w, first, count, p, i, 1, panel, half, bits), i += 1; break;
        case 2: multiply_block(w, first, count, p, i, 2, panel, half, bits), i += 2; break;
        case 3: multiply_block(w, first, count, p, i, 3, panel, half, bits), i += 3; break;
        default: multiply_block(w, first, count, p, i, BLOCK, panel, half, bits), i += BLOCK;
      }
    }
  }
}

static void multiply_tile(const Matrix *w, int first, int count, int next, const Product *p, void *memory) {
  Panel panel = place_panel(w->shape, memory);
  (void)next;
  unpack_tile(w, first, count, panel);
  if (w->shape->bits == 4 && !w->shape->grid) { /* numbers of a grid are as large as codes of 8 bits */
    multiply_tile_as(w, first, count, p, panel, 4);
  } else {
    multiply_tile_as(w, first, count, p, panel, 8);
  }
}

#endif
