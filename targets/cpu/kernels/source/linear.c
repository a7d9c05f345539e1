/* moec.MatMulNBits: a linear layer with a quantized weight, as com.microsoft.MatMulNBits with accuracy_level 4; and
   moec.MatMulGrid and MatMulGrid3, with the weight in a grid of 4 and of 3 bits. */
#include "host.h"

#include <stdlib.h>

enum { X = 0, CODES, SCALES, ZEROS, BIAS = 5, INPUTS, NUMBERS = ZEROS, GRID_INPUTS };

typedef struct {
  OrtApi api;
  const InstructionSet *set;
  Shape shape;
  Weights weights;
} Linear;

typedef struct {
  const InstructionSet *set;
  Matrix matrix;
  Product product;
  const float *x;
  int each;     /* rows of a task */
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
  multiply_task(step->set, &step->matrix, task, step->each, &step->product, panel);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  Linear *linear = kernel;
  OrtApi api = linear->api;
  const Shape *s = &linear->shape;
  Tensor in[INPUTS];
  OrtStatus *status;
  for (size_t i = 0; i < INPUTS; i++) {
    if ((status = read_input(api, context, i, &in[i]))) return status;
  }
  if ((status = read_copies(api, context, &linear->weights, in, INPUTS))) return status;
  if (!in[X].rank || in[X].sizes[in[X].rank - 1] != s->width) return fail(api, "moec.MatMulNBits: x has not K numbers a row");
  int8_t numbers[16];
  if (s->grid && !read_grid(&in[NUMBERS], s->bits, numbers)) return fail(api, "moec.MatMulGrid: its numbers are no grid of int8");
  int64_t rows = 1;
  for (int i = 0; i < in[X].rank - 1; i++) rows *= in[X].sizes[i];
  in[X].sizes[in[X].rank - 1] = s->rows;
  OrtValue *out;
  void *y;
  if ((status = ORT(api, output)(context, 0, in[X].sizes, (size_t)in[X].rank, &out))) return status;
  if ((status = ORT(api, tensor_data)(out, &y)) || !rows) return status;
  int each = task_rows(linear->set, s, rows, s->rows);
  size_t panels = rows < linear->set->tile_from ? 0 : panel_bytes(s) * MOST_WORKERS;
  char *memory = take_scratch(panels + activation_bytes(s, rows));
  if (!memory) return fail(api, "moec.MatMulNBits: no memory");
  Matrix matrix = {s, in[CODES].data, in[SCALES].data, in[ZEROS].data, in[BIAS].data};
  if (s->grid) matrix = (Matrix){s, in[CODES].data, .halves = in[SCALES].data, .numbers = numbers};
  Product product = {place_activations(s, rows, memory + panels), NULL, (int)rows, y, (size_t)s->rows};
  Step step = {linear->set, matrix, product, in[X].data, each, memory};
  if (rows == 1) {
    quantize_row(&step, 0, 0);
  } else {
    status = run_parallel(api, context, (int)rows, quantize_row, &step);
  }
  if (!status) status = run_parallel(api, context, tasks_of(s, each), multiply, &step);
  give_scratch(memory);
  return status;
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {
  int grid = op->get_name != linear_op.get_name;
  Linear *linear = calloc(1, sizeof *linear);
  if (!linear) return fail(api, "moec.MatMulNBits: no memory");
  linear->api = api;
  linear->set = choose_kernels();
  linear->shape = (Shape){(int)int_attribute(api, info, "bits", 4), (int)int_attribute(api, info, "block_size", 0),
                          (int)int_attribute(api, info, "N", 0), (int)int_attribute(api, info, "K", 0), grid};
  if (!complete_shape(&linear->shape) || (grid && linear->shape.bits == 8)) {
    free(linear);
    return fail(api, "moec.MatMulNBits: bits, block_size, N or K is none that it takes");
  }
  if (grid) {
    note_weights(api, info, 1 << CODES, 1 << SCALES, 0, &linear->weights);
  } else {
    note_weights(api, info, 1 << CODES | 1 << ZEROS, 0, 1 << SCALES, &linear->weights);
  }
  *out = linear;
  return NULL;
}

static void destroy(void *kernel) {
  Linear *linear = kernel;
  drop_copies(&linear->weights);
  free(linear);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "MatMulNBits"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i == CODES || i == ZEROS ? ORT_UINT8 : ORT_FLOAT; }
static int input_kind(const OrtCustomOp *op, size_t i) { return (void)op, i <= SCALES ? ORT_REQUIRED : ORT_OPTIONAL; }

const OrtCustomOp linear_op = {
    .get_name = name, .get_input_count = input_count, .get_input_type = input_type, .get_input_kind = input_kind,
    .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};

static const char *grid_name(const OrtCustomOp *op) { return (void)op, "MatMulGrid"; }
static size_t grid_input_count(const OrtCustomOp *op) { return (void)op, GRID_INPUTS; }
static int grid_input_type(const OrtCustomOp *op, size_t i) {
  return (void)op, i == CODES ? ORT_UINT8 : i == SCALES ? ORT_BFLOAT16 : ORT_FLOAT;
}
static int grid_input_kind(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }

const OrtCustomOp grid_linear_op = {
    .get_name = grid_name, .get_input_count = grid_input_count, .get_input_type = grid_input_type,
    .get_input_kind = grid_input_kind, .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};

static const char *grid3_name(const OrtCustomOp *op) { return (void)op, "MatMulGrid3"; }

const OrtCustomOp grid3_linear_op = {
    .get_name = grid3_name, .get_input_count = grid_input_count, .get_input_type = grid_input_type,
    .get_input_kind = grid_input_kind, .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};
