/* Many rows of activations on aarch64 with i8mm: an instruction multiplies two rows of 8 bytes by two others. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <stdint.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC target("+i8mm")
#endif

#define INLINE static inline __attribute__((always_inline))
#define STEP 8
#define TILE_LOWERED(bits) ((bits) == 8 ? 128 : 0)
typedef uint64_t Word;

#include "tiles.h"

enum { BLOCK = 4, HALF = 16 }; /* rows of activations at once; rows of weights: 16 sums are in registers */

INLINE float32x4_t twice(float a, float b) { return vcombine_f32(vdup_n_f32(a), vdup_n_f32(b)); }
INLINE float32x4_t alternately(const float *x) { return vcombine_f32(vld1_f32(x), vld1_f32(x)); }

/* Multiplies `n` rows of activations, two or four of which the last one may be the one before again, with rows half..half + HALF
   of the tile. A vector of results has two rows of weights for one row of activations, then for the other. */
INLINE void multiply_block(const Matrix *w, int first, int count, const Product *p, int from, int n, Panel panel, int half) {
  const Shape *s = w->shape;
  int row[BLOCK], pairs = (n + 1) / 2;
  const int8_t *x[BLOCK];
  float32x4_t y[BLOCK / 2][HALF / 2];
  for (int i = 0; i < 2 * pairs; i++) row[i] = from + (i < n ? i : n - 1), x[i] = codes_of(p, s, row[i]);
  for (int i = 0; i < pairs; i++) {
    for (int v = 0; v < HALF / 2; v++) y[i][v] = vdupq_n_f32(0);
  }
  int parts = group_parts(s), steps = s->group / STEP / parts;
  for (int g = 0; g < s->groups; g++) {
    int32x4_t sum[BLOCK / 2][HALF / 2];
    for (int i = 0; i < pairs; i++) {
      for (int v = 0; v < HALF / 2; v++) sum[i][v] = vdupq_n_s32(0);
    }
    for (int part = 0; part < parts; part++) {
      size_t start = group_start(s, g) + (size_t)part * CHUNK;
      const int8_t *codes = (const int8_t *)panel.codes + start * TILE + (size_t)half * STEP;
      for (int k = 0; k < steps; k++, codes += TILE * STEP) {
        int8x16_t both[BLOCK / 2];
        for (int i = 0; i < pairs; i++) {
          both[i] = vcombine_s8(vld1_s8(x[2 * i] + start + (size_t)k * STEP), vld1_s8(x[2 * i + 1] + start + (size_t)k * STEP));
        }
#pragma GCC unroll 8
        for (int v = 0; v < HALF / 2; v++) {
          int8x16_t weights = vld1q_s8(codes + v * 2 * STEP);
          for (int i = 0; i < pairs; i++) sum[i][v] = vmmlaq_s32(sum[i][v], both[i], weights);
        }
      }
    }
    const float *scales = panel.scales + (size_t)g * TILE + half, *zeros = panel.zeros + (size_t)g * TILE + half;
    for (int i = 0; i < pairs; i++) {
      float32x4_t scale = twice(scales_of(p, s, row[2 * i])[g], scales_of(p, s, row[2 * i + 1])[g]);
      float32x4_t off = twice(sums_of(p, s, row[2 * i])[g], sums_of(p, s, row[2 * i + 1])[g]);
      for (int v = 0; v < HALF / 2; v++) {
        float32x4_t product = vmulq_f32(vcvtq_f32_s32(sum[i][v]), scale);
        y[i][v] = vfmaq_f32(y[i][v], product, alternately(scales + 2 * v));
        y[i][v] = vfmsq_f32(y[i][v], off, alternately(zeros + 2 * v));
      }
    }
  }
  for (int i = 0; i < n; i++) {
    float *to = p->y + (size_t)row[i] * p->stride + first + half;
    for (int v = 0; v < HALF && half + v < count; v++) {
      float out[4];
      vst1q_f32(out, y[i / 2][v / 2]);
      to[v] = out[i % 2 * 2 + v % 2] + (w->bias ? w->bias[first + half + v] : 0);
    }
  }
}

static void multiply_tile(const Matrix *w, int first, int count, int next, const Product *p, void *memory) {
  Panel panel = place_panel(w->shape, memory);
  (void)next;
  unpack_tile(w, first, count, panel);
  for (int half = 0; half < count; half += HALF) {
    for (int i = 0; i < p->count; i += BLOCK) {
      int left = p->count - i;
      if (left > 2) {
        multiply_block(w, first, count, p, i, left < BLOCK ? left : BLOCK, panel, half);
      } else {
        multiply_block(w, first, count, p, i, left, panel, half);
      }
    }
  }
}

const Tiles i8mm_tiles = {"neon-i8mm", 12, multiply_tile};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
