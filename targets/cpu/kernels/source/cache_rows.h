/* Rows of a cache as vectors of f32, and rows of f32 as those of a cache; included by attend_rows.h, which has the vectors.

   Numbers of f16 and bf16 are rounded to the nearest, those beyond the range of f16 to its largest. Codes of int8 are numbers divided by
   the row's scale, which is that of its largest number. */

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Codes __attribute__((vector_size(LANES)));

INLINE V load_halves(const char *x) {
#if LANES == 16
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)x));
#elif LANES == 8
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const void *)x));
#elif defined(__aarch64__)
  return (V)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const void *)x)));
#else
  Halves h;
  memcpy(&h, x, sizeof h);
  Bits bits = __builtin_convertvector(h, Bits);
  /* the exponent's range is that of f32 less 112 on either side; so small numbers come right too */
  V size = (V)((bits & 0x7fff) << 13) * splat(5192296858534827628530496329220096.0f);
  return (V)((Bits)size | (bits & 0x8000) << 16);
#endif
}

INLINE V load_vector(CacheType type, const char *row, int at) {
  const char *x = row + (size_t)at * cache_bytes(type);
  Halves h;
  Codes c;
  switch (type) {
    case CACHE_F16: return load_halves(x);
    case CACHE_BF16: return memcpy(&h, x, sizeof h), (V)(__builtin_convertvector(h, Bits) << 16);
    case CACHE_INT8: return memcpy(&c, x, sizeof c), __builtin_convertvector(c, V);
    default: return load((const float *)x);
  }
}

/* Return the last numbers of a row, at.., `left` of them, and zeros. */
INLINE V load_tail(CacheType type, const char *row, int at, int left) {
  char some[4 * LANES] = {0};
  size_t bytes = cache_bytes(type);
  memcpy(some, row + (size_t)at * bytes, (size_t)left * bytes);
  return load_vector(type, some, 0);
}

/* Return numbers at.. of a row, and zeros after its last one. */
INLINE V load_some(CacheType type, const char *row, int at, int width) {
  if (width - at >= LANES) return load_vector(type, row, at);
  return width > at ? load_tail(type, row, at, width - at) : splat(0);
}

/* Each of these is done for numbers one by one, without branches, so that the compiler makes vectors of it. */
INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE uint16_t half_of(float x) {
  float size = fminf(fabsf(x), 65504.0f);
  uint32_t bits = bits_of(size), sign = bits_of(x) >> 16 & 0x8000;
  uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  uint32_t small = bits_of(size + 0.5f) - bits_of(0.5f); /* in units of 2^-24, the last place of 0.5 */
  return (uint16_t)(sign | (size < 6.103515625e-05f ? small : normal));
}

INLINE uint16_t upper_half_of(float x) {
  uint32_t bits = bits_of(x);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE int8_t code_of(float x, float scale) {
  float n = fminf(fmaxf(x / scale, -127), 127) + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  return (int8_t)((int32_t)bits_of(n) - 0x4b400000);
}

static void store_row(CacheType type, const float *x, int width, void *row, float *scale) {
  uint16_t *halves = row;
  int8_t *codes = row;
  float most = 1e-30f;
  switch (type) {
    case CACHE_F16:
      for (int i = 0; i < width; i++) halves[i] = half_of(x[i]);
      break;
    case CACHE_BF16:
      for (int i = 0; i < width; i++) halves[i] = upper_half_of(x[i]);
      break;
    case CACHE_INT8:
      for (int i = 0; i < width; i++) most = fmaxf(most, fabsf(x[i]));
      *scale = most / 127;
      for (int i = 0; i < width; i++) codes[i] = code_of(x[i], *scale);
      break;
    default: memcpy(row, x, (size_t)width * sizeof(float));
  }
}
