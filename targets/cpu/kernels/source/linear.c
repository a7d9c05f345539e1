/* moec.MatMulNBits: a linear layer with a quantized weight, as com.microsoft.MatMulNBits with accuracy_level 4. */
#include "host.h"

#include <stdlib.h>

typedef struct {
  OrtApi api;
  const InstructionSet *set;
  Shape shape;
} Linear;

typedef struct {
  const InstructionSet *set;
  Matrix matrix;
  Product product;
  const float *x;
  char *panels; /* where each worker unpacks tiles */
} Step;

static void quantize_row(void *data, int worker, int row) {
  Step *step = data;
  const Shape *s = step->matrix.shape;
  Activations to = step->product.x;
  (void)worker;
  step->set->quantize(s, step->x + (size_t)row * s->width, to.codes + (size_t)row * codes_row(s),
                      to.scales + (size_t)row * s->groups, to.sums + (size_t)row * s->groups);
}

static void multiply(void *data, int worker, int task) {
  const Step *step = data;
  char *panel = step->panels + (size_t)worker * panel_bytes(step->matrix.shape);
  multiply_task(step->set, &step->matrix, task, task_rows(step->set, step->product.count), &step->product, panel);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const Linear *linear = kernel;
  OrtApi api = linear->api;
  const Shape *s = &linear->shape;
  Tensor in[6];
  OrtStatus *status;
  for (size_t i = 0; i < 6; i++) {
    if ((status = read_input(api, context, i, &in[i]))) return status;
  }
  if (!in[0].rank || in[0].sizes[in[0].rank - 1] != s->width) return fail(api, "moec.MatMulNBits: x has not K numbers a row");
  int64_t rows = 1;
  for (int i = 0; i < in[0].rank - 1; i++) rows *= in[0].sizes[i];
  in[0].sizes[in[0].rank - 1] = s->rows;
  OrtValue *out;
  void *y;
  if ((status = ORT(api, output)(context, 0, in[0].sizes, (size_t)in[0].rank, &out))) return status;
  if ((status = ORT(api, tensor_data)(out, &y)) || !rows) return status;
  int tasks = tasks_of(s, task_rows(linear->set, rows));
  size_t panels = rows < linear->set->tile_from ? 0 : panel_bytes(s) * MOST_WORKERS;
  char *memory = take_scratch(panels + activation_bytes(s, rows));
  if (!memory) return fail(api, "moec.MatMulNBits: no memory");
  Matrix matrix = {s, in[1].data, in[2].data, in[3].data, in[5].data};
  Product product = {place_activations(s, rows, memory + panels), NULL, (int)rows, y, (size_t)s->rows};
  Step step = {linear->set, matrix, product, in[0].data, memory};
  if (rows == 1) {
    quantize_row(&step, 0, 0);
  } else {
    status = run_parallel(api, context, (int)rows, quantize_row, &step);
  }
  if (!status) status = run_parallel(api, context, tasks, multiply, &step);
  give_scratch(memory);
  return status;
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {
  (void)op;
  Linear *linear = calloc(1, sizeof *linear);
  if (!linear) return fail(api, "moec.MatMulNBits: no memory");
  linear->api = api;
  linear->set = choose_kernels();
  linear->shape = (Shape){(int)int_attribute(api, info, "bits", 4), (int)int_attribute(api, info, "block_size", 0),
                          (int)int_attribute(api, info, "N", 0), (int)int_attribute(api, info, "K", 0)};
  if (!complete_shape(&linear->shape)) {
    free(linear);
    return fail(api, "moec.MatMulNBits: bits, block_size, N or K is none that it takes");
  }
  *out = linear;
  return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "MatMulNBits"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, 6; }
static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i == 1 || i == 3 ? ORT_UINT8 : ORT_FLOAT; }
static int input_kind(const OrtCustomOp *op, size_t i) { return (void)op, i < 3 ? ORT_REQUIRED : ORT_OPTIONAL; }

const OrtCustomOp linear_op = {
    .get_name = name, .get_input_count = input_count, .get_input_type = input_type, .get_input_kind = input_kind,
    .create_kernel_v2 = create, .compute_v2 = compute};
