/* Checks attention of every instruction set that this machine has against sums of numbers, without ONNX Runtime: under
   sanitizers. Exits with 1 at the first difference. Every array ends where its block of memory does. */
#include "attend.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 1;
static int between(int low, int high) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + (int)((uint32_t)(state >> 33) % (uint32_t)(high - low + 1));
}

static float *numbers(size_t count, float most) {
  float *x = malloc(count * sizeof(float));
  if (!x) abort();
  for (size_t i = 0; i < count; i++) x[i] = most * (float)between(-1000, 1000) / 1000;
  return x;
}

/* Return a number of f16 or of bf16, with its sign, `exponent` bits and `places`. */
static double number_of(uint16_t bits, int exponent, int places) {
  int power = bits >> places & ((1 << exponent) - 1), rest = bits & ((1 << places) - 1), bias = (1 << (exponent - 1)) - 1;
  double size = power ? ldexp(1 + ldexp(rest, -places), power - bias) : ldexp(rest, 1 - bias - places);
  return bits >> 15 ? -size : size;
}

/* How far a number of a row may be from what was stored, which of int8 has `most` as its largest number. */
static double allowed(CacheType type, double x, double most) {
  double half_of_last[] = {0, fmax(ldexp(fabs(x), -11), ldexp(1, -25)), ldexp(fabs(x), -8), most / 254 * (1 + 1e-5)};
  return half_of_last[type];
}

/* Return the rows of a cache with numbers; what they stand for takes the numbers' place. Exits where one is too far from its number. */
static char *cache(const AttentionKernels *kernels, float *x, int tokens, int width, CacheType type, float *scales) {
  char *rows = malloc((size_t)tokens * cache_row(type, width));
  for (int t = 0; t < tokens; t++, x += width) {
    char *row = rows + (size_t)t * cache_row(type, width);
    double most = 1e-30;
    if (between(0, 3) == 0) x[between(0, width - 1)] *= between(0, 1) ? 1e-6f : 1e-4f; /* a small number of f16 */
    for (int d = 0; d < width; d++) most = fmax(most, fabs(x[d]));
    kernels->store(type, x, width, row, type == CACHE_INT8 ? scales + t : NULL);
    for (int d = 0; d < width; d++) {
      uint16_t half;
      double found = x[d];
      if (type == CACHE_F16 || type == CACHE_BF16) memcpy(&half, row + 2 * d, 2);
      if (type == CACHE_F16) found = number_of(half, 5, 10);
      if (type == CACHE_BF16) found = number_of(half, 8, 7);
      if (type == CACHE_INT8) found = (double)((int8_t *)row)[d] * scales[t];
      if (!(fabs(found - x[d]) <= allowed(type, x[d], most))) {
        printf("%s: %g is stored as %g in type %d\n", kernels->name, x[d], found, type);
        exit(1);
      }
      x[d] = (float)found;
    }
  }
  return rows;
}

static int check_case(const AttentionKernels *kernels) {
  int width = between(1, 140), heads = between(1, 9), rows = between(1, between(0, 1) ? ROWS : 20), row = between(0, 30);
  int from = between(0, 70), past = from + between(0, 1500), last = past + (row + rows - 1) / heads;
  int to = between(from + 1, last + 1), wide = padded(width), all = last + 1;
  float *k = numbers((size_t)all * width, 2), *v = numbers((size_t)all * width, 2), *q = numbers((size_t)rows * wide, 0.3f);
  int tokens = (row + rows - 1) / heads - row / heads + 1;
  float *bias = between(0, 1) ? numbers((size_t)tokens * all, 2) : NULL;
  for (int i = 0; i < rows; i++) memset(q + (size_t)i * wide + width, 0, (size_t)(wide - width) * sizeof(float));
  float *sum = calloc((size_t)rows * wide, sizeof(float)), *most = numbers((size_t)rows, 2), *total = calloc((size_t)rows, sizeof(float));
  for (int i = 0; i < rows; i++) most[i] = -INFINITY;
  CacheType type = (CacheType)between(CACHE_F32, CACHE_INT8);
  float *scales[2] = {numbers((size_t)all, 1), numbers((size_t)all, 1)};
  char *keys = cache(kernels, k, all, width, type, scales[0]), *values = cache(kernels, v, all, width, type, scales[1]);
  Part p = {.type = type, .width = width, .rows = rows, .heads = heads, .row = row, .past = past, .from = from, .to = to,
            .window = between(0, 1) ? between(1, 300) : 0, .softcap = between(0, 1) ? 4 : 0, .keys = keys, .values = values,
            .key_scales = scales[0], .value_scales = scales[1],
            .q = q, .bias = bias, .bias_row = (size_t)all, .sum = sum, .most = most, .total = total,
            .scratch = numbers(scratch_numbers(width), 2)};
  int wrong = 0;
  memset(p.scratch, 0xff, scratch_numbers(width) * sizeof(float)); /* NaN, where it is read before it is written */
  kernels->attend(&p);
  for (int i = 0; i < rows && !wrong; i++) {
    int token = (row + i) / heads, place = past + token;
    double y[256] = {0}, sums = 0;
    for (int t = from; t < to && t <= place; t++) {
      double score = 0;
      if (p.window && t <= place - p.window) continue;
      for (int d = 0; d < width; d++) score += (double)q[(size_t)i * wide + d] * k[(size_t)t * width + d];
      if (p.softcap > 0) score = p.softcap * tanh(score / p.softcap);
      if (bias) score += bias[(size_t)(token - row / heads) * all + t];
      double share = exp(score - 100);
      sums += share;
      for (int d = 0; d < width; d++) y[d] += share * v[(size_t)t * width + d];
    }
    for (int d = 0; d < width && !wrong; d++) {
      double found = total[i] > 0 ? sum[(size_t)i * wide + d] / total[i] : 0, wanted = sums > 0 ? y[d] / sums : 0;
      wrong = !(fabs(found - wanted) <= 2e-5);
      if (wrong) {
        printf("%s: type %d width %d rows %d heads %d row %d past %d keys %d..%d window %d, row %d number %d: %g, not %g\n", kernels->name,
               type, width, rows, heads, row, past, from, to, p.window, i, d, found, wanted);
      }
    }
  }
  free(k), free(v), free(q), free(bias), free(sum), free(most), free(total), free(keys), free(values), free(p.scratch);
  free(scales[0]), free(scales[1]);
  return wrong;
}

int main(int count, char **arguments) {
  int cases = count > 1 ? atoi(arguments[1]) : 300;
  const AttentionKernels *all[] = {
#if defined(__x86_64__) || defined(_M_X64)
      __builtin_cpu_supports("avx512vl") ? &avx512_attention : NULL, __builtin_cpu_supports("avx2") ? &avx2_attention : NULL,
#elif defined(__aarch64__)
      &neon_attention,
#endif
      &plain_attention};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    if (!all[i]) continue;
    for (int n = 0; n < cases; n++) {
      if (check_case(all[i])) return printf("case %d\n", n), 1;
    }
    printf("%s: %d cases\n", all[i]->name, cases);
  }
  return 0;
}
