/* The kernels for aarch64 with dot products of bytes (ARMv8.2 dotprod, in every processor since about 2018). */
#if defined(__aarch64__)
#include "kernels.h"

#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("+dotprod")
#endif

#include "activate.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int8x16_t Codes;
typedef float32x4_t Numbers;
#define UNIT 16
#define LANES 4
#define LOWERED(bits) (1 << ((bits) - 1))
#define RAISED 0

static void quantize(const Shape *s, const float *x, int8_t *codes, float *scales, float *sums) {
  int wide = chunk_width(s);
  size_t whole = (size_t)(s->width / wide) * wide;
  memset(codes + whole, 0, codes_row(s) - whole);
  for (int g = 0; g < s->groups; g++) {
    const float *group = x + (size_t)g * s->group;
    float32x4_t most = vdupq_n_f32(0);
    for (int i = 0; i < s->group; i += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(group + i)));
    float largest = vmaxvq_f32(most), inverse = largest > 0 ? 127 / largest : 0;
    int sum = 0;
    for (int i = 0; i < s->group; i += 16) {
      int32x4_t r[4];
      for (int j = 0; j < 4; j++) r[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(group + i + 4 * j), inverse));
      int16x8_t a = vcombine_s16(vmovn_s32(r[0]), vmovn_s32(r[1])), b = vcombine_s16(vmovn_s32(r[2]), vmovn_s32(r[3]));
      int8x8_t first = vmovn_s16(a), second = vmovn_s16(b);
      int place = g * s->group + i, within = place % wide;
      int8_t *chunk = codes + place - within;
      if (s->bits == 8) {
        vst1_s8(chunk + within, first), vst1_s8(chunk + within + 8, second);
      } else if (s->bits == 3) {
        const uint8x16_t apart = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        int8_t parts[16];
        vst1q_s8(parts, vqtbl1q_s8(vcombine_s8(first, second), apart));
        for (int j = 0; j < 4; j++) memcpy(chunk + j * CHUNK + within / 4, parts + 4 * j, 4);
      } else {
        vst1_s8(chunk + within / 2, vuzp1_s8(first, second));
        vst1_s8(chunk + CHUNK + within / 2, vuzp2_s8(first, second));
      }
      sum += vaddlvq_s16(vaddq_s16(a, b));
    }
    scales[g] = largest / 127;
    sums[g] = scales[g] * (float)sum;
  }
}

INLINE Codes load_codes(const uint8_t *codes) { return vreinterpretq_s8_u8(vld1q_u8(codes)); }
INLINE Codes load_some(const uint8_t *codes, int bytes) {
  uint8_t some[UNIT] = {0};
  memcpy(some, codes, (size_t)(bytes < UNIT ? bytes : UNIT));
  return load_codes(some);
}
INLINE Codes load_table(const int8_t *numbers) { return vld1q_s8(numbers); }
INLINE Codes load_high(const uint8_t *high) {
  uint16x8_t each = vmovl_u8(vld1_u8(high));
  return vreinterpretq_s8_u16(vorrq_u16(each, vshlq_n_u16(each, 4)));
}
INLINE void split_codes(int kind, Codes codes, Codes highest, Codes table, Codes part[4]) {
  uint8x16_t c = vreinterpretq_u8_s8(codes), h = vreinterpretq_u8_s8(highest), two = vdupq_n_u8(3), four = vdupq_n_u8(4);
  int8x16_t middle = vdupq_n_s8(8);
  if (kind == GRID3) {
    part[0] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(c, two), vandq_u8(vshlq_n_u8(h, 2), four)));
    part[1] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshrq_n_u8(c, 2), two), vandq_u8(vshlq_n_u8(h, 1), four)));
    part[2] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshrq_n_u8(c, 4), two), vandq_u8(h, four)));
    part[3] = vqtbl1q_s8(table, vorrq_u8(vshrq_n_u8(c, 6), vandq_u8(vshrq_n_u8(h, 1), four)));
  } else if (kind == GRID) {
    part[0] = vqtbl1q_s8(table, vandq_u8(c, vdupq_n_u8(15))), part[1] = vqtbl1q_s8(table, vshrq_n_u8(c, 4));
  } else if (kind == 4) {
    part[0] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(c, vdupq_n_u8(15))), middle);
    part[1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(c, 4)), middle);
  } else {
    part[0] = vreinterpretq_s8_u8(veorq_u8(c, vdupq_n_u8(128)));
  }
}
INLINE Numbers multiply_unit(int kind, const Codes part[4], const int8_t *x) {
  int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 4
  for (int i = 0; i < PARTS(kind); i++) sum = vdotq_s32(sum, part[i], vld1q_s8(x + i * CHUNK));
  return vcvtq_f32_s32(sum);
}
INLINE Numbers spread_scales(const float *scales, int unit, int log, int shift) {
  if (log <= 0) return vdupq_n_f32(scales[unit >> shift]);
  float32x2_t two = vld1_f32(scales + (size_t)unit * 2);
  return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
}
INLINE Numbers zero_points(int bits, const uint8_t *zeros) {
  float points[LANES];
  for (int i = 0; i < LANES; i++) {
    points[i] = (float)((bits == 8 ? zeros[i] : zeros[i / 2] >> (i % 2 * 4) & 15) - LOWERED(bits));
  }
  return vld1q_f32(points);
}
INLINE Numbers load_halves(const uint16_t *x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }
INLINE Numbers load_numbers(const float *x) { return vld1q_f32(x); }
INLINE void store_numbers(float *x, Numbers v) { vst1q_f32(x, v); }
INLINE Numbers no_numbers(void) { return vdupq_n_f32(0); }
INLINE Numbers add_numbers(Numbers a, Numbers b) { return vaddq_f32(a, b); }
INLINE Numbers scale_numbers(Numbers a, Numbers b) { return vmulq_f32(a, b); }
INLINE Numbers add_product(Numbers a, Numbers b, Numbers c) { return vfmaq_f32(c, a, b); }
INLINE float sum_numbers(Numbers a) { return vaddvq_f32(a); }

#include "rows.h"

const InstructionSet neon_kernels = {"neon-dotprod", NEVER, quantize, multiply_rows, NULL, activate};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
