/* The kernels in plain C: for processors without one of the instruction sets, and what the others are tested against. */
#include "activate.h"
#include "kernels.h"

#include <math.h>
#include <string.h>

static void quantize(const Shape *s, const float *x, int8_t *codes, float *scales, float *sums) {
  memset(codes, 0, codes_row(s));
  int wide = chunk_width(s);
  for (int g = 0; g < s->groups; g++) {
    float largest = 0;
    for (int i = g * s->group; i < (g + 1) * s->group; i++) largest = fmaxf(largest, fabsf(x[i]));
    float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    int sum = 0;
    for (int i = g * s->group; i < (g + 1) * s->group; i++) {
      int code = (int)rintf(x[i] * inverse), within = i % wide;
      int place = within / chunk_parts(s) + within % chunk_parts(s) * CHUNK;
      codes[i / wide * wide + place] = (int8_t)code;
      sum += code;
    }
    scales[g] = scale;
    sums[g] = scale * (float)sum;
  }
}

static float multiply_row(const Matrix *w, int row, const int8_t *x, const float *scales, const float *sums) {
  const Shape *s = w->shape;
  const uint8_t *codes = w->codes + (size_t)row * s->row_bytes;
  size_t first = (size_t)row * s->groups;
  const uint8_t *high = codes + s->plane_bytes;
  int bytes = s->group * s->plane / 8; /* of a group */
  float total = 0;
  for (int g = 0; g < s->groups; g++) {
    int sum = 0;
    for (int b = g * bytes; b < (g + 1) * bytes; b++) {
      const int8_t *chunk = x + b / CHUNK * chunk_width(s);
      if (s->bits == 3) {
        for (int i = 0; i < 4; i++) {
          int code = (codes[b] >> 2 * i & 3) | (high[b / 2] >> (b % 2 * 4 + i) & 1) << 2;
          sum += w->numbers[code] * chunk[i * CHUNK + b % CHUNK];
        }
      } else if (s->grid) {
        sum += w->numbers[codes[b] & 15] * chunk[b % CHUNK] + w->numbers[codes[b] >> 4] * chunk[CHUNK + b % CHUNK];
      } else if (s->bits == 8) {
        sum += codes[b] * chunk[b % CHUNK];
      } else {
        sum += (codes[b] & 15) * chunk[b % CHUNK] + (codes[b] >> 4) * chunk[CHUNK + b % CHUNK];
      }
    }
    float point = s->grid ? 0 : (float)zero_point(w, row, g);
    total += scale_of(w, first + g) * (scales[g] * (float)sum - point * sums[g]);
  }
  return total;
}

static void multiply_rows(const Matrix *w, int first, int count, const Product *p) {
  for (int row = first; row < first + count; row++) {
    for (int i = 0; i < p->count; i++) {
      const Shape *s = w->shape;
      float y = multiply_row(w, row, codes_of(p, s, i), scales_of(p, s, i), sums_of(p, s, i));
      p->y[(size_t)i * p->stride + row] = y + (w->bias ? w->bias[row] : 0);
    }
  }
}

const InstructionSet plain_kernels = {"plain", NEVER, quantize, multiply_rows, NULL, activate};
