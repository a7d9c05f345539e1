#include "host.h"

#include <stdlib.h>
#include <string.h>

OrtStatus *fail(OrtApi api, const char *message) { return ORT(api, create_status)(ORT_INVALID_ARGUMENT, message); }

static OrtStatus *read_tensor(OrtApi api, const OrtValue *value, Tensor *out) {
  OrtShape *shape = NULL;
  size_t rank = 0;
  OrtStatus *status = ORT(api, tensor_shape)(value, &shape);
  if (status) return status;
  status = ORT(api, dimension_count)(shape, &rank);
  if (!status && rank > MOST_RANK) status = fail(api, "a tensor has more than 8 axes");
  if (!status) status = ORT(api, dimensions)(shape, out->sizes, rank);
  ORT(api, release_shape)(shape);
  out->rank = (int)rank;
  return status ? status : ORT(api, tensor_data)((OrtValue *)value, &out->data);
}

OrtStatus *read_input(OrtApi api, const OrtKernelContext *context, size_t index, Tensor *out) {
  size_t count = 0;
  OrtValue *value = NULL;
  OrtStatus *status;
  out->data = NULL, out->rank = 0;
  if ((status = ORT(api, input_count)(context, &count))) return status;
  if (index >= count) return NULL;
  if ((status = ORT(api, input)(context, index, &value)) || !value) return status;
  return read_tensor(api, value, out);
}

void note_weights(OrtApi api, const OrtKernelInfo *info, uint32_t codes, uint32_t halves, uint32_t scales, Weights *out) {
  for (size_t i = 0; i < MOST_WEIGHTS; i++) {
    out->data[i] = NULL, out->copies[i] = NULL;
    if (!((codes | halves | scales) >> i & 1)) continue;
    const OrtValue *value = NULL;
    Tensor tensor = {NULL};
    int constant = 0;
    OrtStatus *status = ORT(api, constant_input)(info, i, &constant, &value);
    if (!status && constant && value) status = read_tensor(api, value, &tensor);
    if (status) { /* an input that is absent, or has no place: it is read where it is */
      ORT(api, release_status)(status);
      continue;
    }
    size_t bytes = codes >> i & 1 ? 1 : halves >> i & 1 ? 2 : sizeof(float);
    for (int axis = 0; axis < tensor.rank; axis++) bytes *= (size_t)tensor.sizes[axis];
    if (tensor.data && bytes) out->data[i] = tensor.data, out->bytes[i] = bytes;
  }
}

int read_grid(const Tensor *table, int bits, int8_t numbers[16]) {
  int pairs = table->rank == 2 && table->sizes[0] == 256 && table->sizes[1] == 2;
  if (!table->data || !(bits == 3 ? table->rank == 1 && table->sizes[0] == 8 : pairs)) return 0;
  for (int code = 0; code < 16; code++) {
    float number = ((const float *)table->data)[pairs ? 2 * code : code % 8];
    if (!(number >= -127 && number <= 127)) return 0;
    numbers[code] = (int8_t)number;
    if ((float)numbers[code] != number) return 0;
  }
  return 1;
}

int64_t int_attribute(OrtApi api, const OrtKernelInfo *info, const char *name, int64_t otherwise) {
  int64_t found;
  OrtStatus *status = ORT(api, int_attribute)(info, name, &found);
  if (!status) return found;
  ORT(api, release_status)(status);
  return otherwise;
}

float float_attribute(OrtApi api, const OrtKernelInfo *info, const char *name, float otherwise) {
  float found;
  OrtStatus *status = ORT(api, float_attribute)(info, name, &found);
  if (!status) return found;
  ORT(api, release_status)(status);
  return otherwise;
}

/* --- threads ---------------------------------------------------------------------------------------------------- */

typedef struct {
  Task task;
  void *data;
  int items;
  atomic_int next;
} Queue;

static void work(void *data, size_t worker) {
  Queue *queue = data;
  for (int item; (item = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed)) < queue->items;) {
    queue->task(queue->data, (int)worker, item);
  }
}

OrtStatus *run_parallel(OrtApi api, const OrtKernelContext *context, int items, Task task, void *data) {
  Queue queue = {task, data, items, 0};
  size_t workers = items < MOST_WORKERS ? (size_t)items : MOST_WORKERS;
  if (items < 1) return NULL;
  return ORT(api, parallel_for)(context, work, workers, 0, &queue);
}

/* --- copies of weights --------------------------------------------------------------------------------------------- */

enum { PIECE = 1 << 20, NOT_COPIED = 0, COPYING, COPIED };

static void copy_piece(void *data, int worker, int item) {
  const Weights *weights = data;
  size_t at = (size_t)item * PIECE, i = 0;
  (void)worker;
  for (;; i++) { /* pieces are counted through all weights */
    if (!weights->copies[i]) continue;
    size_t pieces = (weights->bytes[i] + PIECE - 1) / PIECE * PIECE;
    if (at < pieces) break;
    at -= pieces;
  }
  size_t left = weights->bytes[i] - at;
  memcpy((char *)weights->copies[i] + at, (const char *)weights->data[i] + at, left < PIECE ? left : PIECE);
}

static OrtStatus *make_copies(OrtApi api, const OrtKernelContext *context, Weights *weights) {
  int pieces = 0;
  for (size_t i = 0; i < MOST_WEIGHTS; i++) {
    if (weights->data[i]) weights->copies[i] = take_huge_pages(weights->bytes[i]);
    if (weights->copies[i]) pieces += (int)((weights->bytes[i] + PIECE - 1) / PIECE);
  }
  OrtStatus *status = run_parallel(api, context, pieces, copy_piece, weights);
  for (size_t i = 0; i < MOST_WEIGHTS && !status; i++) {
    if (weights->copies[i]) release_pages(weights->data[i], weights->bytes[i]);
  }
  return status;
}

OrtStatus *read_copies(OrtApi api, const OrtKernelContext *context, Weights *weights, Tensor *in, size_t count) {
  int state = NOT_COPIED;
  if (atomic_compare_exchange_strong(&weights->state, &state, COPYING)) {
    for (size_t i = 0; i < count; i++) weights->data[i] = weights->data[i] ? in[i].data : NULL;
    OrtStatus *status = make_copies(api, context, weights);
    if (status) return status; /* the state stays: they are read where they are */
    atomic_store(&weights->state, state = COPIED);
  }
  for (size_t i = 0; i < count && state == COPIED; i++) {
    if (weights->copies[i]) in[i].data = weights->copies[i];
  }
  return NULL;
}

void drop_copies(Weights *weights) {
  for (size_t i = 0; i < MOST_WEIGHTS; i++) give_huge_pages(weights->copies[i]);
}

/* --- products ------------------------------------------------------------------------------------------------------ */

void multiply_task(const InstructionSet *set, const Matrix *w, int task, int each, const Product *p, void *panel) {
  int first = task * each, end = w->shape->rows - first < each ? w->shape->rows : first + each;
  for (; first < end; first += TILE) {
    int count = end - first < TILE ? end - first : TILE, left = end - first - count;
    if (p->count < set->tile_from) {
      set->multiply_rows(w, first, count, p);
    } else {
      set->multiply_tile(w, first, count, left < TILE ? left : TILE, p, panel);
    }
  }
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

enum { SLOTS = 256, HEADER = 64 };
static _Atomic(void *) kept[SLOTS];

static size_t size_of(void *block) { return *(size_t *)block; }

void *take_scratch(size_t bytes) {
  for (int i = 0; i < SLOTS; i++) {
    void *block = atomic_exchange(&kept[i], NULL);
    if (!block) continue;
    if (size_of(block) >= bytes) return (char *)block + HEADER;
    free(*((void **)block + 1)); /* too small: the next one is large enough for both */
    break;
  }
  void *memory = malloc(bytes + 2 * HEADER);
  if (!memory) return NULL;
  void *block = (void *)(((uintptr_t)memory + HEADER - 1) / HEADER * HEADER);
  *(size_t *)block = bytes;
  *((void **)block + 1) = memory;
  return (char *)block + HEADER;
}

void give_scratch(void *memory) {
  if (!memory) return;
  void *block = (char *)memory - HEADER;
  for (int i = 0; i < SLOTS; i++) {
    void *none = NULL;
    if (atomic_compare_exchange_strong(&kept[i], &none, block)) return;
  }
  free(*((void **)block + 1));
}

/* --- sizes ------------------------------------------------------------------------------------------------------- */

int complete_shape(Shape *s) {
  if (s->bits != 4 && s->bits != 8 && !(s->grid && s->bits == 3)) return 0;
  if (s->group < (s->bits == 3 ? 32 : 16) || s->group > 256 || (s->group & (s->group - 1))) return 0;
  if (s->rows < 1 || s->width < s->group || s->width % s->group) return 0;
  s->groups = s->width / s->group;
  s->row_bytes = s->width / 8 * s->bits;
  s->plane = s->bits == 3 ? 2 : s->bits;
  s->plane_bytes = s->width / 8 * s->plane;
  s->chunks = (s->plane_bytes + CHUNK - 1) / CHUNK;
  s->zeros_bytes = (s->groups * s->bits + 7) / 8;
  return s->groups <= 2048;
}

size_t activation_bytes(const Shape *s, int64_t rows) {
  return (size_t)rows * (codes_row(s) + 2 * sizeof(float) * (size_t)s->groups);
}

Activations place_activations(const Shape *s, int64_t rows, void *memory) {
  int8_t *codes = memory;
  float *scales = (float *)(codes + (size_t)rows * codes_row(s));
  return (Activations){codes, scales, scales + (size_t)rows * s->groups};
}
