/* What the kernels of all instruction sets share: how weights and rounded activations lie in memory.

   A quantized matrix [rows, width] is what com.microsoft.MatMulNBits and QMoE read: codes of 4 bits (low half of a byte
   first) or 8 bits, row after row, a scale for each group of neighbours along a row, and zero points in the width of
   the codes, or none (then the middle of the range is subtracted). In a grid a code of 4 bits stands for one of 16 numbers of
   int8 instead, without zero points, and scales are bf16; one of 3 bits for one of 8. Codes of 3 bits lie in two planes of a row:
   the lower two bits of all codes, and behind them the highest ones, each plane with the first code in the lowest bits.

   Activations are rounded to int8 for each group. They lie in chunks, of what 64 bytes of codes multiply: 64 numbers beside
   codes of 8 bits; beside codes of 4 bits 128 numbers, those at even places first, so that the low halves of 64 bytes meet
   the first 64 and the high halves the others; beside codes of 3 bits 256 numbers in four such parts. The last chunk is filled
   with zeros. */
#ifndef MOEC_KERNELS_H
#define MOEC_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { GRID3 = 16 + 3, GRID }; /* the kinds of weights in a grid, of 3 bits and of 4; that of integers is their bits */
/* Of a kind: bits of a code in the first plane; codes of a byte of it. */
#define BITS(kind) ((kind) == GRID ? 4 : (kind) == GRID3 ? 2 : (kind))
#define PARTS(kind) (8 / BITS(kind))
enum { CHUNK = 64, TILE = 32, NEVER = 1 << 30 }; /* bytes of codes; rows of a matrix that are unpacked at once */

typedef struct {
  int bits, group, rows, width;
  int grid; /* whether codes stand for numbers of a table */
  int groups;      /* of a row */
  int chunks;      /* of a row */
  int plane;       /* bits of a code in the first plane: 2 of those of 3 bits, else all */
  int plane_bytes; /* of the first plane of a row */
  int row_bytes;   /* of codes */
  int zeros_bytes; /* of a row's zero points */
} Shape;

typedef struct {
  const Shape *shape;
  const uint8_t *codes;
  const float *scales;
  const uint8_t *zeros; /* NULL: the middle of the range */
  const float *bias;    /* NULL: none */
  const uint16_t *halves; /* of a grid: its scales, the upper halves of f32 */
  const int8_t *numbers;  /* of a grid: its 16 numbers, or its 8 numbers twice */
} Matrix;

/* Rows of activations. `sums` is the sum of a group's numbers: what a zero point of 1 takes off. */
typedef struct {
  int8_t *codes; /* [rows][chunks][weights of a chunk] */
  float *scales; /* [rows][groups] */
  float *sums;   /* [rows][groups] */
} Activations;

/* What a task multiplies: rows `index[0..count]` of the activations (NULL: 0..count); the results y[i * stride + row]. */
typedef struct {
  Activations x;
  const int32_t *index;
  int count;
  float *y;
  size_t stride;
} Product;

/* What is computed between the two matrices of an expert. With a gate, a row holds gate and up numbers alternately. */
typedef enum { SWIGLU, SILU, RELU, GELU_TANH, IDENTITY } Function;
typedef struct {
  Function function;
  float alpha, beta; /* of SWIGLU: g sigmoid(alpha g) (u + beta) */
  float limit;       /* g <= limit, -limit <= u <= limit; infinity: none */
} Activation;

typedef struct {
  const char *name;
  int tile_from; /* rows of activations from which unpacking a tile of weights pays; NEVER: there is no multiply_tile */
  /* Rounds one row of `shape->width` numbers. */
  void (*quantize)(const Shape *, const float *x, int8_t *codes, float *scales, float *sums);
  /* Multiplies rows first..first + count of the matrix, one after the other; count is at most TILE. */
  void (*multiply_rows)(const Matrix *, int first, int count, const Product *);
  /* The same by unpacking the rows into `panel` (panel_bytes of it, aligned to 64); `next` rows after them come next. */
  void (*multiply_tile)(const Matrix *, int first, int count, int next, const Product *, void *panel);
  /* Writes `width` results of a row of `width` numbers, or of twice as many with a gate. */
  void (*activate)(const Activation *, const float *x, int width, float *y);
} InstructionSet;

/* What a set has instead, for many rows of activations, where a processor has more instructions. */
typedef struct {
  const char *name;
  int tile_from;
  void (*multiply_tile)(const Matrix *, int first, int count, int next, const Product *, void *panel);
} Tiles;

extern const InstructionSet plain_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const InstructionSet avx512_kernels, avx2_kernels;
extern const Tiles amx_tiles, avxvnni_tiles;
#elif defined(__aarch64__)
extern const InstructionSet neon_kernels;
extern const Tiles i8mm_tiles;
#endif

/* Return the fastest kernels for the processor that this runs on; NULL where ONNX Runtime's own are faster. */
const InstructionSet *choose_kernels(void);
/* Return those that run on it, the fastest first; NULL after the last. */
const InstructionSet *kernels_found(int index);

static inline int chunk_width(const Shape *s) { return CHUNK * 8 / s->plane; }
/* Return how many codes a byte of the first plane has: the parts of a chunk, of which code i of each byte meets part i. */
static inline int chunk_parts(const Shape *s) { return 8 / s->plane; }
static inline size_t codes_row(const Shape *s) { return (size_t)s->chunks * chunk_width(s); }
static inline size_t panel_bytes(const Shape *s) {
  return (size_t)TILE * (codes_row(s) + 2 * sizeof(float) * (size_t)s->groups);
}
/* Return the scale of a group of a row, counted through the matrix. */
static inline float scale_of(const Matrix *w, size_t group) {
  if (!w->shape->grid) return w->scales[group];
  uint32_t bits = (uint32_t)w->halves[group] << 16;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}
static inline int zero_point(const Matrix *w, int row, int group) {
  if (!w->zeros) return 1 << (w->shape->bits - 1);
  const uint8_t *zeros = w->zeros + (size_t)row * w->shape->zeros_bytes;
  return w->shape->bits == 8 ? zeros[group] : zeros[group / 2] >> (group % 2 * 4) & 15;
}
static inline const int8_t *codes_of(const Product *p, const Shape *s, int i) {
  return p->x.codes + (size_t)(p->index ? p->index[i] : i) * codes_row(s);
}
static inline const float *scales_of(const Product *p, const Shape *s, int i) {
  return p->x.scales + (size_t)(p->index ? p->index[i] : i) * s->groups;
}
static inline const float *sums_of(const Product *p, const Shape *s, int i) {
  return p->x.sums + (size_t)(p->index ? p->index[i] : i) * s->groups;
}

#endif
