/* What the attention operators and their kernels of all instruction sets share.

   A cache holds a row for each head of keys (or values) and token: [batch, heads, tokens, width] numbers of one of the types
   below, whose buffer may have room for more tokens than it holds; beside codes of int8 it has a scale for each row, f32[batch, heads,
   tokens]. The queries of all heads that share a head of keys are rows of
   one matrix, so that keys and values are read once for all of them. */
#ifndef MOEC_ATTEND_H
#define MOEC_ATTEND_H

#include "host.h"

/* Rows that one task takes, and up to how many of them the keys are read as they lie; the keys that are scored at once. */
enum { ROWS = 128, FEW_ROWS = 16, KEYS = 64, FEW_KEYS = 1024, PAD = 32 };

typedef enum { CACHE_F32, CACHE_F16, CACHE_BF16, CACHE_INT8 } CacheType;

/* Return the bytes of a number, and of a row of `width` numbers, in a cache. */
static inline size_t cache_bytes(CacheType type) { return type == CACHE_F32 ? 4 : type == CACHE_INT8 ? 1 : 2; }
static inline size_t cache_row(CacheType type, int width) { return (size_t)width * cache_bytes(type); }
/* Return a width that all vectors divide. */
static inline int padded(int width) { return (width + PAD - 1) / PAD * PAD; }

/* Rows of queries and a range of keys. */
typedef struct {
  CacheType type;
  int width;    /* numbers of a key and of a value */
  int rows;     /* at most ROWS */
  int heads;    /* queries of a token: row i is of the new token (row + i) / heads */
  int row;
  int past;     /* tokens before the first new one */
  int window;   /* keys that a token sees, itself among them; 0: all */
  int from, to; /* keys */
  float softcap;
  const char *keys, *values; /* the first token's */
  const float *key_scales, *value_scales; /* of int8: the first token's */
  const float *q;            /* [rows][padded], times the scale */
  const float *bias;         /* of the first row's token: added to the scores; NULL: none */
  size_t bias_row;           /* numbers from one new token's to the next one's */
  /* what follows is made: the softmax's numerator times the values, its largest score and its denominator */
  float *sum; /* [rows][padded] */
  float *most, *total;
  float *scratch; /* scratch_numbers of it */
} Part;

static inline size_t scratch_numbers(int width) {
  return (size_t)KEYS * (padded(width) * 2 + ROWS) + FEW_ROWS * FEW_KEYS;
}

typedef struct {
  const char *name;
  void (*attend)(const Part *);
  /* Writes a row of a cache, and of int8 its scale. */
  void (*store)(CacheType, const float *x, int width, void *row, float *scale);
} AttentionKernels;

extern const AttentionKernels plain_attention;
#if defined(__x86_64__) || defined(_M_X64)
extern const AttentionKernels avx512_attention, avx2_attention;
#elif defined(__aarch64__)
extern const AttentionKernels neon_attention;
#endif

/* Return those of an instruction set. */
const AttentionKernels *attention_of(const InstructionSet *set);

extern const OrtCustomOp attention_op, attention_f16_op, attention_bf16_op, attention_int8_op;

#endif
