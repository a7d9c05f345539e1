/* Multiplies a row of weights after the other, as they stream from memory, by a few rows of activations at a time.

   A file of an instruction set includes this after what it is written with:

   Codes, Numbers                 vectors of UNIT bytes: of codes, of LANES numbers (UNIT / 4)
   LOWERED(bits)                  what splitting takes off a code: 0, or the middle of the range
   RAISED                         what it adds to a number of a grid
   load_codes, load_some          UNIT bytes, or the first ones and zeros
   load_table                     the numbers of a grid in every 16 bytes
   load_high                      the highest bits of UNIT bytes of codes of 3 bits: those of a byte in its lowest 4 bits
   split_codes                    the codes of each byte, first to last (PARTS of them); of a grid their numbers
   multiply_unit                  their products with activations, each lane the sum of neighbours
   spread_scales                  the scale of each lane; a unit has 1 << log groups, or a group 1 << shift units
   zero_points                    those of the next LANES groups, less what splitting takes off
   load_halves                    LANES bf16 as numbers
   load_numbers, store_numbers, no_numbers, add_numbers, scale_numbers, add_product, sum_numbers */
#ifndef MOEC_ROWS_H
#define MOEC_ROWS_H

#include "kernels.h"

enum { MOST_GROUPS = 2048, FEW = 4, ACTIVATIONS = 16 }; /* rows of activations at once; in the cache */

/* Writes the products of a row's scales with those of the activations; returns what the zero points take off. */
INLINE float combine_scales(const Matrix *w, int row, int kind, const float *scales, const float *sums, float *out) {
  const Shape *s = w->shape;
  int g = 0, bits = BITS(kind), grid = kind >= GRID3;
  size_t first = (size_t)row * s->groups;
  const uint8_t *zeros = w->zeros && !grid ? w->zeros + (size_t)row * s->zeros_bytes : NULL;
  float off = 0, middle = grid ? RAISED : (float)((1 << (bits - 1)) - LOWERED(bits));
  Numbers total = no_numbers();
  for (; g + LANES <= s->groups; g += LANES) {
    Numbers weight = grid ? load_halves(w->halves + first + g) : load_numbers(w->scales + first + g);
    Numbers sum = load_numbers(sums + g);
    store_numbers(out + g, scale_numbers(weight, load_numbers(scales + g)));
    if (zeros) sum = scale_numbers(sum, zero_points(bits, zeros + g * bits / 8));
    total = add_product(weight, sum, total);
  }
  for (; g < s->groups; g++) {
    float point = zeros ? (float)(zero_point(w, row, g) - LOWERED(bits)) : 1;
    float weight = scale_of(w, first + g);
    out[g] = weight * scales[g], off += weight * sums[g] * point;
  }
  store_numbers(out + g, no_numbers()); /* the last unit may have places for groups behind the row's: 0 times what lay there could be NaN */
  if (!zeros && !middle) return 0;
  return (zeros ? 1 : middle) * (off + sum_numbers(total));
}

/* Return the activations that unit `u` of the codes meets. */
INLINE const int8_t *met_by(const int8_t *x, int u, int bits) {
  return x + (size_t)(u * UNIT / CHUNK) * (CHUNK * 8 / bits) + u * UNIT % CHUNK;
}

/* Multiplies a row of weights by rows from..from + n of the activations. */
INLINE void multiply_row(const Matrix *w, int row, int kind, int log, int shift, int n, const Product *p, int from) {
  const Shape *s = w->shape;
  const int bits = BITS(kind);
  static const int8_t none[16];
  const Codes table = load_table(kind >= GRID3 ? w->numbers : none);
  const uint8_t *codes = w->codes + (size_t)row * s->row_bytes, *high = codes + s->plane_bytes;
  const int8_t *x[FEW];
  float both[FEW][MOST_GROUPS + 16] __attribute__((aligned(64))), off[FEW];
  Numbers sum[FEW][4];
  Codes part[4], highest = table; /* of codes that have no second plane it is not read */
  int whole = s->plane_bytes / UNIT, u = 0;
  int chains = n == 1 ? 4 : n == 2 ? 2 : 1; /* sums of a row, so that no product waits for the one before */
#pragma GCC unroll 4
  for (int i = 0; i < n; i++) {
    x[i] = codes_of(p, s, from + i);
    off[i] = combine_scales(w, row, kind, scales_of(p, s, from + i), sums_of(p, s, from + i), both[i]);
    for (int j = 0; j < 4; j++) sum[i][j] = no_numbers();
  }
  for (; u + chains <= whole; u += chains) {
#pragma GCC unroll 4
    for (int j = 0; j < chains; j++) {
      if (kind == GRID3) highest = load_high(high + (size_t)(u + j) * (UNIT / 2));
      split_codes(kind, load_codes(codes + (size_t)(u + j) * UNIT), highest, table, part);
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) {
        Numbers product = multiply_unit(kind, part, met_by(x[i], u + j, bits));
        sum[i][j] = add_product(product, spread_scales(both[i], u + j, log, shift), sum[i][j]);
      }
    }
  }
  for (; u * UNIT < s->plane_bytes; u++) {
    int left = s->plane_bytes - u * UNIT;
    if (kind == GRID3) {
      uint8_t some[UNIT / 2] = {0};
      memcpy(some, high + (size_t)u * (UNIT / 2), (size_t)(left < UNIT ? left / 2 : UNIT / 2));
      highest = load_high(some);
    }
    split_codes(kind, load_some(codes + (size_t)u * UNIT, left), highest, table, part);
    for (int i = 0; i < n; i++) {
      Numbers product = multiply_unit(kind, part, met_by(x[i], u, bits));
      sum[i][0] = add_product(product, spread_scales(both[i], u, log, shift), sum[i][0]);
    }
  }
  float bias = w->bias ? w->bias[row] : 0;
  for (int i = 0; i < n; i++) {
    Numbers all = add_numbers(add_numbers(sum[i][0], sum[i][1]), add_numbers(sum[i][2], sum[i][3]));
    p->y[(size_t)(from + i) * p->stride + row] = sum_numbers(all) - off[i] + bias;
  }
}

INLINE void multiply_rows_as(const Matrix *w, int first, int count, const Product *p, int kind, int log, int shift) {
  for (int block = 0; block < p->count; block += ACTIVATIONS) {
    int end = p->count - block < ACTIVATIONS ? p->count : block + ACTIVATIONS;
    for (int row = first; row < first + count; row++) {
      for (int i = block; i < end;) {
        switch (end - i) {
          case 1: multiply_row(w, row, kind, log, shift, 1, p, i), i += 1; break;
          case 2: multiply_row(w, row, kind, log, shift, 2, p, i), i += 2; break;
          case 3: multiply_row(w, row, kind, log, shift, 3, p, i), i += 3; break;
          default: multiply_row(w, row, kind, log, shift, FEW, p, i), i += FEW;
        }
      }
    }
  }
}

static void multiply_rows(const Matrix *w, int first, int count, const Product *p) {
  int wide = UNIT * 8 / w->shape->plane, shift = 0, kind = w->shape->bits;
  if (w->shape->grid) kind = kind == 3 ? GRID3 : GRID;
  for (int n = w->shape->group / wide; n > 1; n /= 2) shift++;
#define CASE(kind, log) \
  case 32 * (1 << log) + kind: multiply_rows_as(w, first, count, p, kind, log, 0); break;
  switch (32 * (wide / w->shape->group) + kind) { /* small groups are cases, since each has code of its own */
    CASE(4, 3) CASE(4, 2) CASE(4, 1) CASE(8, 2) CASE(8, 1) CASE(GRID, 3) CASE(GRID, 2) CASE(GRID, 1)
    CASE(GRID3, 3) CASE(GRID3, 2) CASE(GRID3, 1) CASE(4, 0) CASE(8, 0) CASE(GRID, 0) CASE(GRID3, 0)
    case 4: multiply_rows_as(w, first, count, p, 4, 0, shift); break;
    case GRID: multiply_rows_as(w, first, count, p, GRID, 0, shift); break;
    case GRID3: multiply_rows_as(w, first, count, p, GRID3, 0, shift); break;
    default: multiply_rows_as(w, first, count, p, 8, 0, shift);
  }
#undef CASE
}

#endif
