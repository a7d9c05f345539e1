/* Multiplies a row of weights after the other, as they stream from memory, by a few rows of activations at a time.

   A file of an instruction set includes this after what it is written with:

   Codes, Numbers                 vectors of UNIT bytes: of codes, of LANES numbers (UNIT / 4)
   LOWERED(bits)                  what splitting takes off a code: 0, or the middle of the range
   load_codes, load_some          UNIT bytes, or the first ones and zeros
   split_codes                    codes of 4 bits as low and high halves, of 8 bits as `low`
   multiply_unit                  their products with activations, each lane the sum of neighbours
   spread_scales                  the scale of each lane; a unit has 1 << log groups, or a group 1 << shift units
   zero_points                    those of the next LANES groups, less what splitting takes off
   load_numbers, store_numbers, no_numbers, add_numbers, scale_numbers, add_product, sum_numbers */
#ifndef MOEC_ROWS_H
#define MOEC_ROWS_H

#include "kernels.h"

enum { MOST_GROUPS = 2048, FEW = 4, ACTIVATIONS = 16 }; /* rows of activations at once; in the cache */

/* Writes the products of a row's scales with those of the activations; returns what the zero points take off. */
INLINE float combine_scales(const Matrix *w, int row, int bits, const float *scales, const float *sums, float *out) {
  const Shape *s = w->shape;
  const float *weights = w->scales + (size_t)row * s->groups;
  const uint8_t *zeros = w->zeros ? w->zeros + (size_t)row * s->zeros_bytes : NULL;
  int g = 0;
  float off = 0, middle = (float)((1 << (bits - 1)) - LOWERED(bits));
  Numbers total = no_numbers();
  for (; g + LANES <= s->groups; g += LANES) {
    Numbers weight = load_numbers(weights + g), sum = load_numbers(sums + g);
    store_numbers(out + g, scale_numbers(weight, load_numbers(scales + g)));
    if (zeros) sum = scale_numbers(sum, zero_points(bits, zeros + g * bits / 8));
    total = add_product(weight, sum, total);
  }
  for (; g < s->groups; g++) {
    float point = zeros ? (float)(zero_point(w, row, g) - LOWERED(bits)) : 1;
    out[g] = weights[g] * scales[g], off += weights[g] * sums[g] * point;
  }
  if (!zeros && !middle) return 0;
  return (zeros ? 1 : middle) * (off + sum_numbers(total));
}

/* Return the activations that unit `u` of the codes meets. */
INLINE const int8_t *met_by(const int8_t *x, int u, int bits) {
  return x + (size_t)(u * UNIT / CHUNK) * (CHUNK * 8 / bits) + u * UNIT % CHUNK;
}

/* Multiplies a row of weights by rows from..from + n of the activations. */
INLINE void multiply_row(const Matrix *w, int row, int bits, int log, int shift, int n, const Product *p, int from) {
  const Shape *s = w->shape;
  const uint8_t *codes = w->codes + (size_t)row * s->row_bytes;
  const int8_t *x[FEW];
  float both[FEW][MOST_GROUPS + 16] __attribute__((aligned(64))), off[FEW];
  Numbers sum[FEW][4];
  Codes low, high;
  int whole = s->row_bytes / UNIT, u = 0;
  int chains = n == 1 ? 4 : n == 2 ? 2 : 1; /* sums of a row, so that no product waits for the one before */
#pragma GCC unroll 4
  for (int i = 0; i < n; i++) {
    x[i] = codes_of(p, s, from + i);
    off[i] = combine_scales(w, row, bits, scales_of(p, s, from + i), sums_of(p, s, from + i), both[i]);
    for (int j = 0; j < 4; j++) sum[i][j] = no_numbers();
  }
  for (; u + chains <= whole; u += chains) {
#pragma GCC unroll 4
    for (int j = 0; j < chains; j++) {
      split_codes(bits, load_codes(codes + (size_t)(u + j) * UNIT), &low, &high);
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) {
        Numbers part = multiply_unit(bits, low, high, met_by(x[i], u + j, bits));
        sum[i][j] = add_product(part, spread_scales(both[i], u + j, log, shift), sum[i][j]);
      }
    }
  }
  for (; u * UNIT < s->row_bytes; u++) {
    split_codes(bits, load_some(codes + (size_t)u * UNIT, s->row_bytes - u * UNIT), &low, &high);
    for (int i = 0; i < n; i++) {
      Numbers part = multiply_unit(bits, low, high, met_by(x[i], u, bits));
      sum[i][0] = add_product(part, spread_scales(both[i], u, log, shift), sum[i][0]);
    }
  }
  float bias = w->bias ? w->bias[row] : 0;
  for (int i = 0; i < n; i++) {
    Numbers all = add_numbers(add_numbers(sum[i][0], sum[i][1]), add_numbers(sum[i][2], sum[i][3]));
    p->y[(size_t)(from + i) * p->stride + row] = sum_numbers(all) - off[i] + bias;
  }
}

INLINE void multiply_rows_as(const Matrix *w, int first, int count, const Product *p, int bits, int log, int shift) {
  for (int block = 0; block < p->count; block += ACTIVATIONS) {
    int end = p->count - block < ACTIVATIONS ? p->count : block + ACTIVATIONS;
    for (int row = first; row < first + count; row++) {
      for (int i = block; i < end;) {
        switch (end - i) {
          case 1: multiply_row(w, row, bits, log, shift, 1, p, i), i += 1; break;
          case 2: multiply_row(w, row, bits, log, shift, 2, p, i), i += 2; break;
          case 3: multiply_row(w, row, bits, log, shift, 3, p, i), i += 3; break;
          default: multiply_row(w, row, bits, log, shift, FEW, p, i), i += FEW;
        }
      }
    }
  }
}

static void multiply_rows(const Matrix *w, int first, int count, const Product *p) {
  int wide = UNIT * 8 / w->shape->bits, shift = 0;
  for (int n = w->shape->group / wide; n > 1; n /= 2) shift++;
#define CASE(bits, log) \
  case 8 * (1 << log) + bits: multiply_rows_as(w, first, count, p, bits, log, 0); break;
  switch (8 * (wide / w->shape->group) + w->shape->bits) { /* small groups are cases, since each has code of its own */
    CASE(4, 3) CASE(4, 2) CASE(4, 1) CASE(8, 2) CASE(8, 1)
    CASE(4, 0) CASE(8, 0)
    case 4: multiply_rows_as(w, first, count, p, 4, 0, shift); break;
    default: multiply_rows_as(w, first, count, p, 8, 0, shift);
  }
#undef CASE
}

#endif
