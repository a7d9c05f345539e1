/* What an operator needs of its host: tensors, threads, memory that is kept between steps, errors. */
#ifndef MOEC_HOST_H
#define MOEC_HOST_H

#include "kernels.h"
#include "ort.h"

#include <stdatomic.h>

enum { MOST_RANK = 8 };

typedef struct {
  void *data; /* NULL: an input that is absent */
  int64_t sizes[MOST_RANK];
  int rank;
} Tensor;

OrtStatus *fail(OrtApi api, const char *message);
/* Reads input `index`; an absent one has no data. */
OrtStatus *read_input(OrtApi api, const OrtKernelContext *context, size_t index, Tensor *out);

/* The constant inputs of an operator that are large, and copies of them from which they are read faster: see weights.c. */
enum { MOST_WEIGHTS = 16 };
typedef struct {
  const void *data[MOST_WEIGHTS]; /* NULL: an input that is none of them */
  size_t bytes[MOST_WEIGHTS];
  void *copies[MOST_WEIGHTS];
  atomic_int state;
} Weights;
/* Notes the constant inputs among the bits of `codes` (bytes), of `halves` (two bytes each) and of `scales` (numbers). */
void note_weights(OrtApi api, const OrtKernelInfo *info, uint32_t codes, uint32_t halves, uint32_t scales, Weights *out);
/* Reads the numbers of a grid of 4 bits from those of the two codes of each byte, f32[256, 2], those of one of 3 bits from f32[8];
   returns whether they are int8. */
int read_grid(const Tensor *table, int bits, int8_t numbers[16]);
/* Lets inputs that are weights be read from their copies, which the first caller makes. */
OrtStatus *read_copies(OrtApi api, const OrtKernelContext *context, Weights *weights, Tensor *in, size_t count);
void drop_copies(Weights *weights);
/* Return memory in huge pages, or NULL where there are none. */
void *take_huge_pages(size_t bytes);
void give_huge_pages(const void *part);
/* Gives back the pages of a file that hold `data`; memory that is no file's is left alone, as its content would be lost. */
void release_pages(const void *data, size_t bytes);

int64_t int_attribute(OrtApi api, const OrtKernelInfo *info, const char *name, int64_t otherwise);
float float_attribute(OrtApi api, const OrtKernelInfo *info, const char *name, float otherwise);

/* Calls task(data, worker, item) for items 0..items, one after the other in each of at most MOST_WORKERS workers: whoever is
   done takes the next item, so that a slow thread does not hold up the others. */
enum { MOST_WORKERS = 64 };
typedef void (*Task)(void *data, int worker, int item);
OrtStatus *run_parallel(OrtApi api, const OrtKernelContext *context, int items, Task task, void *data);

typedef struct {
  int count;         /* of processors that the process may use */
  int64_t caches[3]; /* bytes of the first, second and third level; 0: there is none */
} Processor;
const Processor *this_processor(void);

/* Return how many rows of the matrices a task multiplies; `all` of them, of this shape, are multiplied by `rows` rows of activations
   each. There are 8 tasks for a processor, so that the last ones end at about the same time. Where the weights stream from memory
   a task is as long as that allows, up to a quarter of the second cache: a processor fetches ahead only after some KB in order (32
   rows of 1 KB at a time took 1.4 times as long as 256). Where tiles are unpacked, a task fetches the next one meanwhile. */
enum { TASKS_EACH = 8, TILES_OF_TASK = 4 };
static inline int task_rows(const InstructionSet *set, const Shape *s, int64_t rows, int64_t all) {
  int64_t each = all / (TASKS_EACH * this_processor()->count) / TILE * TILE;
  int64_t most = rows >= set->tile_from ? TILES_OF_TASK * TILE : this_processor()->caches[1] / 4 / s->row_bytes / TILE * TILE;
  if (each > most) each = most;
  return each < TILE ? TILE : (int)each;
}
static inline int tasks_of(const Shape *s, int each) { return (s->rows + each - 1) / each; }
/* Multiplies rows task * each.. of a matrix; `panel` is the worker's memory for a tile. */
void multiply_task(const InstructionSet *set, const Matrix *w, int task, int each, const Product *p, void *panel);

/* Return memory of at least `bytes` bytes, aligned to 64, or NULL; it is kept for the next one who asks. */
void *take_scratch(size_t bytes);
void give_scratch(void *memory);

/* Fills what follows from bits, group, rows and width; returns whether the kernels take them. */
int complete_shape(Shape *s);
size_t activation_bytes(const Shape *s, int64_t rows);
/* Lays out activations in memory of activation_bytes. */
Activations place_activations(const Shape *s, int64_t rows, void *memory);

extern const OrtCustomOp linear_op, experts_op, grid_linear_op, grid_experts_op, grid3_linear_op, grid3_experts_op;

#endif
