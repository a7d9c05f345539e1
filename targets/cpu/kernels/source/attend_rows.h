/* Attention of a few rows of queries, or of a tile of them, over a range of keys; for the instruction set of the file that
   includes this, which says how many numbers a vector has (LANES). */
#include "attend.h"
#include "exponential.h"

#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE V load(const float *x) { return *(const Unaligned *)x; }
INLINE void store(float *x, V v) { *(Unaligned *)x = v; }
INLINE V splat(float x) { return (V){0} + x; }

INLINE V larger_of(V a, V b) {
  Bits mask = a > b;
  return (V)(((Bits)a & mask) | ((Bits)b & ~mask));
}
typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

/* Return the sums of the lanes of four vectors. */
INLINE Four sum_four(V a, V b, V c, V d) {
#if LANES == 16
  V ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12) + __builtin_shufflevector(all, all, 1, 5, 9, 13);
#elif LANES == 8
  V ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  V cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  V all = __builtin_shufflevector(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
  return __builtin_shufflevector(all, all, 0, 2, 4, 6) + __builtin_shufflevector(all, all, 1, 3, 5, 7);
#else
  V ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  V cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#endif
}
INLINE float sum_lanes(V v) { return sum_four(v, v, v, v)[0]; }

/* e^x as `exponential` has it, and 0 below e^-87. */
INLINE V exponentials(V x) {
  Bits small = x < splat(-87);
  V shifted = x * splat(1.44269504f) + splat(12582912.0f), n = shifted - splat(12582912.0f);
  V r = x - n * splat(0.693145752f) - n * splat(1.42860677e-6f);
  V p = splat(8.33333333e-3f) + r * splat(1.38888889e-3f);
  p = splat(4.16666667e-2f) + r * p, p = splat(1.66666667e-1f) + r * p, p = splat(0.5f) + r * p;
  p = splat(1) + r * (splat(1) + r * p);
  Bits power = ((Bits)shifted - 0x4b400000 + 127) << 23;
  return (V)((Bits)(p * (V)power) & ~small);
}

#include "cache_rows.h"

/* --- a few rows: keys and values as they lie ----------------------------------------------------------------------- */

/* Keys, and vectors of a value, that are taken at once; values that stay in the nearest cache; bytes that
   the processor fetches ahead, where its own guesses end with each page. */
enum { TOKENS = 4, COLUMNS = 8, NEAR = 16, AHEAD = 16384 };

/* Return the products of a key and a row of queries, lane by lane, in `chains` sums that do not wait for each other. */
INLINE V multiply_key(const Part *p, CacheType type, const float *q, int chains, const char *key) {
  V sum[4] = {splat(0), splat(0), splat(0), splat(0)};
  int at = 0;
  for (; at + chains * LANES <= p->width; at += chains * LANES) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; c++) sum[c] += load(q + at + c * LANES) * load_vector(type, key, at + c * LANES);
  }
  for (; at + LANES <= p->width; at += LANES) sum[0] += load(q + at) * load_vector(type, key, at);
  if (at < p->width) sum[0] += load(q + at) * load_tail(type, key, at, p->width - at);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The same for four rows of queries. */
INLINE void multiply_key_by_four(const Part *p, CacheType type, const float *q, size_t wide, const char *key, V sum[4]) {
  V a = splat(0), b = a, c = a, d = a, k;
  int at = 0;
#define ADD(vector) k = vector, a += load(q + at) * k, b += load(q + at + wide) * k, c += load(q + at + 2 * wide) * k, d += load(q + at + 3 * wide) * k
  for (; at + LANES <= p->width; at += LANES) ADD(load_vector(type, key, at));
  if (at < p->width) ADD(load_tail(type, key, at, p->width - at));
#undef ADD
  sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
}

/* Scores of `n` rows of queries, 1 or 4, and TOKENS keys, `some` of which there are. A key is read from its beginning to its end:
   of four keys side by side the processor would not fetch ahead. */
INLINE void score_keys(const Part *p, CacheType type, const float *q, int n, const char *keys, int some, float *scores) {
  size_t row = cache_row(type, p->width), wide = (size_t)padded(p->width);
  V all[TOKENS][4];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; t++) {
    const char *key = keys + (t < some ? (size_t)t : 0) * row;
    if (n == 1) {
      all[t][0] = multiply_key(p, type, q, 4, key);
    } else {
      multiply_key_by_four(p, type, q, wide, key, all[t]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; i++) *(UnalignedFour *)(scores + i * FEW_KEYS) = sum_four(all[0][i], all[1][i], all[2][i], all[3][i]);
}

/* Makes the processor fetch what is read AHEAD bytes later: the first rows of `next` after the last. One line of four is enough to
   lead it on; to ask for each took longer than it saved. */
INLINE void fetch_ahead(const char *rows, const char *end, const char *next, size_t bytes) {
  const char *ahead = rows + AHEAD < end ? rows + AHEAD : next + (rows + AHEAD - end);
  for (size_t i = 0; i < bytes; i += 256) __builtin_prefetch(ahead + i, 0, 2);
}

INLINE void score_few(const Part *p, CacheType type, int from, int count, float *scores) {
  size_t row = cache_row(type, p->width);
  for (int t = 0; t < count; t += TOKENS) {
    fetch_ahead(p->keys + (size_t)(from + t) * row, p->keys + (size_t)(from + count) * row, p->values + (size_t)from * row, TOKENS * row);
    const char *keys = p->keys + (size_t)(from + t) * row;
    int some = count - t;
    for (int i = 0; i < p->rows;) {
      const float *q = p->q + (size_t)i * padded(p->width);
      float *to = scores + (size_t)i * FEW_KEYS + t;
      switch (p->rows - i) {
        case 1:
        case 2:
        case 3: score_keys(p, type, q, 1, keys, some, to), i += 1; break;
        default: score_keys(p, type, q, 4, keys, some, to), i += 4;
      }
    }
  }
}

/* Adds `n` vectors of the values, times the weights, to each of `rows` rows; the last vector of a value may be its tail. */
INLINE void add_values(const Part *p, CacheType type, const char *values, int count, int at, int n, int tail,
                       const float *weights, float *sums, int rows) {
  size_t row = cache_row(type, p->width), wide = (size_t)padded(p->width);
  V sum[4][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
    for (int c = 0; c < n; c++) sum[i][c] = load(sums + i * wide + at + c * LANES);
  }
  for (int t = 0; t < count; t++, values += row) {
    V v[COLUMNS], x[4];
#pragma GCC unroll 8
    for (int c = 0; c < n; c++) v[c] = tail ? load_tail(type, values, at, tail) : load_vector(type, values, at + c * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) x[i] = splat(weights[i * FEW_KEYS + t]);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
      for (int c = 0; c < n; c++) sum[i][c] += x[i] * v[c];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
    for (int c = 0; c < n; c++) store(sums + i * wide + at + c * LANES, sum[i][c]);
  }
}

/* The same for whole values. */
INLINE void add_whole_values(const Part *p, CacheType type, const char *values, int count, int n, const float *weights,
                             float *sums, int rows) {
  int at = 0;
  for (; at + n * LANES <= p->width; at += n * LANES) add_values(p, type, values, count, at, n, 0, weights, sums, rows);
  for (; at + LANES <= p->width; at += LANES) add_values(p, type, values, count, at, 1, 0, weights, sums, rows);
  if (at < p->width) add_values(p, type, values, count, at, 1, p->width - at, weights, sums, rows);
}

INLINE void add_few(const Part *p, CacheType type, int from, int count, const float *weights) {
  size_t row = cache_row(type, p->width), wide = (size_t)padded(p->width);
  for (int t = 0; t < count; t += NEAR) {
    const char *values = p->values + (size_t)(from + t) * row;
    int some = count - t < NEAR ? count - t : NEAR;
    fetch_ahead(values, p->values + (size_t)(from + count) * row, p->keys + (size_t)(from + count) * row, some * row);
    for (int i = 0; i < p->rows;) {
      const float *x = weights + (size_t)i * FEW_KEYS + t;
      if (p->rows - i < 4) {
        add_whole_values(p, type, values, some, COLUMNS, x, p->sum + i * wide, 1), i += 1;
      } else {
        add_whole_values(p, type, values, some, COLUMNS / 2, x, p->sum + i * wide, 4), i += 4;
      }
    }
  }
}

/* --- many rows: keys transposed, values as numbers, and products of matrices ----------------------------------------- */

enum { BLOCK = 6 };

/* c[m][2 vectors] = or += a[m][count] b[count][..] */
INLINE void multiply_block(const float *a, size_t a_row, const float *b, size_t b_row, float *c, size_t c_row, int count, int m,
                           int add) {
  V sum[BLOCK][2];
#pragma GCC unroll 6
  for (int i = 0; i < m; i++) {
    sum[i][0] = add ? load(c + i * c_row) : splat(0);
    sum[i][1] = add ? load(c + i * c_row + LANES) : splat(0);
  }
  for (int k = 0; k < count; k++) {
    V x = load(b + k * b_row), y = load(b + k * b_row + LANES);
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) {
      V v = splat(a[i * a_row + k]);
      sum[i][0] += v * x, sum[i][1] += v * y;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < m; i++) store(c + i * c_row, sum[i][0]), store(c + i * c_row + LANES, sum[i][1]);
}

INLINE void multiply_matrix(const float *a, size_t a_row, const float *b, size_t b_row, float *c, size_t c_row, int rows,
                            int columns, int count, int add) {
  for (int j = 0; j < columns; j += 2 * LANES) {
    for (int i = 0; i < rows;) {
      const float *x = a + i * a_row;
      float *y = c + i * c_row + j;
      switch (rows - i) {
        case 1: multiply_block(x, a_row, b + j, b_row, y, c_row, count, 1, add), i += 1; break;
        case 2: multiply_block(x, a_row, b + j, b_row, y, c_row, count, 2, add), i += 2; break;
        case 3: multiply_block(x, a_row, b + j, b_row, y, c_row, count, 3, add), i += 3; break;
        case 4: multiply_block(x, a_row, b + j, b_row, y, c_row, count, 4, add), i += 4; break;
        case 5: multiply_block(x, a_row, b + j, b_row, y, c_row, count, 5, add), i += 5; break;
        default: multiply_block(x, a_row, b + j, b_row, y, c_row, count, BLOCK, add), i += BLOCK;
      }
    }
  }
}

/* Writes keys as columns: [width][KEYS], zeros after the last of them. */
INLINE void transpose_keys(const Part *p, CacheType type, int from, int count, float *panel) {
  const char *row = p->keys + (size_t)from * cache_row(type, p->width);
  for (int t = 0; t < KEYS; t++, row += cache_row(type, p->width)) {
    for (int at = 0; at < p->width; at += LANES) {
      float part[LANES];
      store(part, t < count ? load_some(type, row, at, p->width) : splat(0));
      int n = p->width - at < LANES ? p->width - at : LANES;
      for (int i = 0; i < n; i++) panel[(size_t)(at + i) * KEYS + t] = part[i];
    }
  }
}

INLINE void unpack_values(const Part *p, CacheType type, int from, int count, float *panel) {
  int wide = padded(p->width);
  const char *row = p->values + (size_t)from * cache_row(type, p->width);
  for (int t = 0; t < count; t++, row += cache_row(type, p->width)) {
    for (int at = 0; at < wide; at += LANES) {
      store(panel + (size_t)t * wide + at, load_some(type, row, at, p->width));
    }
  }
}

/* --- softmax, a range of keys after the other -------------------------------------------------------------------------- */

/* Turns the scores of a row into weights, and what was added so far to the same largest score. */
INLINE void weigh_row(const Part *p, int i, int from, int count, int stride, float *scores) {
  int token = (p->row + i) / p->heads, place = p->past + token;
  int end = place + 1 - from < count ? place + 1 - from : count;
  int start = p->window && place + 1 - p->window > from ? place + 1 - p->window - from : 0;
  const float *bias = p->bias ? p->bias + (size_t)(token - p->row / p->heads) * p->bias_row + from : NULL;
  float *sum = p->sum + (size_t)i * padded(p->width);
  if (p->softcap > 0) {
    for (int t = 0; t < count; t++) scores[t] = p->softcap * (1 - 2 / (1 + exponential(2 / p->softcap * scores[t])));
  }
  for (int t = 0; bias && t < count; t++) scores[t] += bias[t];
  for (int t = 0; t < start && t < stride; t++) scores[t] = -INFINITY;
  for (int t = end > 0 ? end : 0; t < stride; t++) scores[t] = -INFINITY;
  V largest = load(scores), all = splat(0);
  for (int t = LANES; t < stride; t += LANES) largest = larger_of(largest, load(scores + t));
  float most = p->most[i], each[LANES];
  store(each, largest);
  for (int t = 0; t < LANES; t++) most = each[t] > most ? each[t] : most;
  float base = most == -INFINITY ? 0 : most; /* a row that sees none of the keys so far has weights of 0 */
  for (int t = 0; t < stride; t += LANES) {
    V weights = exponentials(load(scores + t) - splat(base));
    store(scores + t, weights);
    all += weights;
  }
  if (most == -INFINITY) return;
  float kept = p->most[i] == -INFINITY ? 0 : exponential(p->most[i] - most);
  if (p->most[i] != most) {
    for (int at = 0; at < p->width; at += LANES) store(sum + at, load(sum + at) * kept);
  }
  p->total[i] = p->total[i] * kept + sum_lanes(all);
  p->most[i] = most;
}

/* Multiplies the numbers of rows, one for each of `count` tokens, by the tokens' scales. */
INLINE void scale_tokens(float *x, int rows, int stride, const float *scales, int count) {
  for (int i = 0; i < rows; i++) {
    for (int t = 0; t < count; t++) x[(size_t)i * stride + t] *= scales[t];
  }
}

INLINE void attend_as(const Part *p, CacheType type) {
  int wide = padded(p->width), many = p->rows > FEW_ROWS, step = many ? KEYS : FEW_KEYS;
  float *scores = p->scratch, *panel = scores + ROWS * KEYS + FEW_ROWS * FEW_KEYS;
  float *values = panel + (size_t)KEYS * wide;
  for (int from = p->from; from < p->to; from += step) {
    int count = p->to - from < step ? p->to - from : step;
    /* rows of tokens before the first of these keys see none of them */
    int skipped = (from - p->past) * p->heads - p->row;
    skipped = skipped > 0 ? skipped : 0;
    if (skipped >= p->rows) break;
    if (!many) {
      score_few(p, type, from, count, scores);
    } else {
      transpose_keys(p, type, from, count, panel);
      multiply_matrix(p->q + (size_t)skipped * wide, (size_t)wide, panel, KEYS, scores + skipped * KEYS, KEYS,
                      p->rows - skipped, KEYS, p->width, 0);
    }
    int first = many ? skipped : 0;
    float *seen = scores + (size_t)first * step;
    if (type == CACHE_INT8) scale_tokens(seen, p->rows - first, step, p->key_scales + from, count);
    for (int i = first; i < p->rows; i++) weigh_row(p, i, from, count, step, scores + (size_t)i * step);
    if (type == CACHE_INT8) scale_tokens(seen, p->rows - first, step, p->value_scales + from, count);
    if (!many) {
      add_few(p, type, from, count, scores);
    } else {
      unpack_values(p, type, from, count, values);
      multiply_matrix(scores + skipped * KEYS, KEYS, values, (size_t)wide, p->sum + (size_t)skipped * wide, (size_t)wide,
                      p->rows - skipped, wide, count, 1);
    }
  }
}

static void attend(const Part *p) {
  switch (p->type) {
    case CACHE_F16: return attend_as(p, CACHE_F16);
    case CACHE_BF16: return attend_as(p, CACHE_BF16);
    case CACHE_INT8: return attend_as(p, CACHE_INT8);
    default: return attend_as(p, CACHE_F32);
  }
}
