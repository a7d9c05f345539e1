/* e^x in plain C, which the compiler turns into vectors of the instruction set of the file that includes this. */
#ifndef MOEC_EXPONENTIAL_H
#define MOEC_EXPONENTIAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x to two units in the last place: 2^n (1 + p) with x = n ln 2 + r, |r| <= ln 2 / 2, and e^r's Taylor polynomial. */
static inline float exponential(float x) {
  x = fminf(fmaxf(x, -87), 88);
  float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693145752f - n * 1.42860677e-6f;
  float p = 1 + r * (1 + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
  int32_t power = (bits - 0x4b400000 + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}

#endif
