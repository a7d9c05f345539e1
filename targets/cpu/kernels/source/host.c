#include "host.h"

#include <stdatomic.h>
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

void copy_inputs(OrtApi api, const OrtKernelInfo *info, uint32_t codes, uint32_t scales, const void *copies[], size_t count) {
  for (size_t i = 0; i < count; i++) {
    copies[i] = NULL;
    if (!((codes | scales) >> i & 1)) continue;
    const OrtValue *value = NULL;
    Tensor tensor = {NULL};
    int constant = 0;
    OrtStatus *status = ORT(api, constant_input)(info, i, &constant, &value);
    if (!status && constant && value) status = read_tensor(api, value, &tensor);
    if (status) { /* an input that is absent, or has no place: it is read when the kernel runs */
      ORT(api, release_status)(status);
      continue;
    }
    if (!tensor.data) continue;
    size_t bytes = codes >> i & 1 ? 1 : sizeof(float);
    for (int axis = 0; axis < tensor.rank; axis++) bytes *= (size_t)tensor.sizes[axis];
    copies[i] = copy_weights(tensor.data, bytes);
  }
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
  if (s->bits != 4 && s->bits != 8) return 0;
  if (s->group < 16 || s->group > 256 || (s->group & (s->group - 1))) return 0;
  if (s->rows < 1 || s->width < s->group || s->width % s->group) return 0;
  s->groups = s->width / s->group;
  s->row_bytes = s->width / 8 * s->bits;
  s->chunks = (s->row_bytes + CHUNK - 1) / CHUNK;
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
