/* moec.QMoE: routed experts with quantized weights, as com.microsoft.QMoE with accuracy_level 4. moec.GridExperts and GridExperts3: the
   same with weights in a grid of 4 and of 3 bits, where the experts of a token and their weights are inputs.

   Tokens are taken some hundreds at a time. Their pairs of token and expert ("slots") are sorted by expert, so that a matrix
   is read once for all tokens of an expert. A task multiplies 32 rows of one expert's matrix; between the two matrices and
   after them all tasks meet: up, then activation and rounding of a slot, then down, then the sum of a token's slots. */
#include "host.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 512 }; /* at a time: bounds the memory for the results of slots */
enum { X = 0, CHOICE, UP, UP_SCALES, UP_BIAS, DOWN, DOWN_SCALES, DOWN_BIAS, UP_ZEROS = 11, DOWN_ZEROS, MIXING = 14, INPUTS };
enum { NUMBERS = UP_ZEROS }; /* of a grid, which has no zero points */

typedef struct {
  OrtApi api;
  const InstructionSet *set;
  Activation activation;
  int chosen, bits, group;
  int grid;
  Weights weights;
} Experts;

/* The inputs of moec.GridExperts in their order. */
static const int grid_inputs[] = {X, CHOICE, MIXING, UP, UP_SCALES, DOWN, DOWN_SCALES, NUMBERS};
enum { GRID_INPUTS = sizeof grid_inputs / sizeof *grid_inputs };

typedef struct {
  const Experts *experts;
  Shape up, down;
  Tensor in[INPUTS];
  int8_t numbers[16];              /* of a grid */
  int64_t first;                   /* the first token at this time */
  int tokens, slots, used;         /* at this time; `used` experts have slots */
  int32_t *expert, *start;         /* of the used experts: which, and its first slot; start[used] is the end */
  int32_t *token, *slot_of;        /* of a slot; of the pairs of a token, in the order of the choice */
  int32_t *pair_expert;            /* of a pair */
  float *pair_weight;              /* of a pair */
  const float *x;                  /* of the first token */
  float *y;
  Activations rounded, hidden;     /* of the tokens; of the slots */
  float *wide, *results;           /* [slots][rows of up], [slots][rows of down] */
  float *narrow;                   /* [slots][width of down]: behind the activation */
  char *panels;
  size_t panel;                    /* bytes of a worker's panel */
  int each;                        /* rows of a task */
} Step;

static Matrix matrix_of(const Step *step, const Shape *s, int expert, int codes, int scales, int zeros, int bias) {
  size_t rows = (size_t)expert * s->rows;
  Matrix m = {s, (const uint8_t *)step->in[codes].data + rows * s->row_bytes,
              s->grid ? NULL : (const float *)step->in[scales].data + rows * s->groups};
  if (s->grid) {
    m.halves = (const uint16_t *)step->in[scales].data + rows * s->groups;
    m.numbers = step->numbers;
    return m;
  }
  if (step->in[zeros].data) m.zeros = (const uint8_t *)step->in[zeros].data + rows * s->zeros_bytes;
  if (step->in[bias].data) m.bias = (const float *)step->in[bias].data + rows;
  return m;
}

/* --- routing ----------------------------------------------------------------------------------------------------- */

/* Chooses the experts with the largest scores of a token, the first of equal ones, and their weights. */
static void choose_experts(const Step *step, int token) {
  int experts = (int)step->in[UP].sizes[0], chosen = step->experts->chosen;
  size_t row = (size_t)step->first + (size_t)token;
  const float *scores = (const float *)step->in[CHOICE].data + row * experts;
  int32_t *ids = step->pair_expert + (size_t)token * chosen;
  float *weights = step->pair_weight + (size_t)token * chosen;
  int count = 0;
  if (step->experts->grid) { /* they are given; an expert that is not there takes no part */
    const int64_t *given = (const int64_t *)step->in[CHOICE].data + row * chosen;
    for (int i = 0; i < chosen; i++) {
      int there = given[i] >= 0 && given[i] < experts;
      ids[i] = there ? (int32_t)given[i] : 0;
      weights[i] = there ? ((const float *)step->in[MIXING].data)[row * chosen + i] : 0;
    }
    return;
  }
  for (int e = 0; e < experts; e++) {
    int place = count;
    while (place > 0 && scores[e] > scores[ids[place - 1]]) place--;
    if (place == chosen) continue;
    if (count < chosen) count++;
    for (int i = count - 1; i > place; i--) ids[i] = ids[i - 1];
    ids[place] = e;
  }
  float total = 0;
  for (int i = 0; i < chosen; i++) {
    if (step->in[MIXING].data) {
      weights[i] = ((const float *)step->in[MIXING].data)[row * experts + ids[i]];
    } else {
      total += weights[i] = expf(scores[ids[i]] - scores[ids[0]]);
    }
  }
  for (int i = 0; i < chosen && !step->in[MIXING].data; i++) weights[i] /= total;
}

/* Sorts the pairs by expert; a pair of weight 0 has no slot. */
static void sort_slots(Step *step, int experts) {
  int pairs = step->tokens * step->experts->chosen;
  int32_t *counts = step->slot_of + pairs; /* room for one number an expert */
  memset(counts, 0, sizeof(int32_t) * (size_t)experts);
  for (int p = 0; p < pairs; p++) counts[step->pair_expert[p]] += step->pair_weight[p] != 0;
  step->used = step->slots = 0;
  for (int e = 0; e < experts; e++) {
    int count = counts[e];
    counts[e] = step->slots;
    if (!count) continue;
    step->expert[step->used] = e, step->start[step->used++] = step->slots;
    step->slots += count;
  }
  step->start[step->used] = step->slots;
  for (int p = 0; p < pairs; p++) {
    int slot = step->pair_weight[p] != 0 ? counts[step->pair_expert[p]]++ : -1;
    step->slot_of[p] = slot;
    if (slot >= 0) step->token[slot] = p / step->experts->chosen;
  }
}

/* --- tasks ------------------------------------------------------------------------------------------------------- */

static void round_row(const Step *step, const Shape *s, const float *x, Activations to, int row) {
  step->experts->set->quantize(s, x, to.codes + (size_t)row * codes_row(s), to.scales + (size_t)row * s->groups,
                               to.sums + (size_t)row * s->groups);
}

static void route_token(void *data, int worker, int token) {
  Step *step = data;
  (void)worker;
  choose_experts(step, token);
  round_row(step, &step->up, step->x + (size_t)token * step->up.width, step->rounded, token);
}

static void multiply_up(void *data, int worker, int item) {
  const Step *step = data;
  int tasks = tasks_of(&step->up, step->each), e = item / tasks, start = step->start[e], count = step->start[e + 1] - start;
  Matrix w = matrix_of(step, &step->up, step->expert[e], UP, UP_SCALES, UP_ZEROS, UP_BIAS);
  float *y = step->wide + (size_t)start * step->up.rows;
  Product p = {step->rounded, step->token + start, count, y, (size_t)step->up.rows};
  multiply_task(step->experts->set, &w, item % tasks, step->each, &p, step->panels + (size_t)worker * step->panel);
}

static void activate_slot(void *data, int worker, int slot) {
  const Step *step = data;
  (void)worker;
  int width = step->down.width;
  float *y = step->narrow + (size_t)slot * width;
  step->experts->set->activate(&step->experts->activation, step->wide + (size_t)slot * step->up.rows, width, y);
  round_row(step, &step->down, y, step->hidden, slot);
}

static void multiply_down(void *data, int worker, int item) {
  const Step *step = data;
  const Shape *s = &step->down;
  int tasks = tasks_of(s, step->each), e = item / tasks, start = step->start[e], count = step->start[e + 1] - start;
  Matrix w = matrix_of(step, s, step->expert[e], DOWN, DOWN_SCALES, DOWN_ZEROS, DOWN_BIAS);
  Activations x = step->hidden;
  x.codes += (size_t)start * codes_row(s), x.scales += (size_t)start * s->groups, x.sums += (size_t)start * s->groups;
  Product p = {x, NULL, count, step->results + (size_t)start * s->rows, (size_t)s->rows};
  multiply_task(step->experts->set, &w, item % tasks, step->each, &p, step->panels + (size_t)worker * step->panel);
}

static void combine_token(void *data, int worker, int token) {
  const Step *step = data;
  (void)worker;
  int chosen = step->experts->chosen, width = step->down.rows;
  float *y = step->y + (size_t)token * width;
  memset(y, 0, sizeof(float) * (size_t)width);
  for (int p = token * chosen; p < (token + 1) * chosen; p++) {
    if (step->slot_of[p] < 0) continue;
    const float *row = step->results + (size_t)step->slot_of[p] * width;
    float weight = step->pair_weight[p];
    for (int i = 0; i < width; i++) y[i] += weight * row[i];
  }
}

/* --- the operator ------------------------------------------------------------------------------------------------ */

static OrtStatus *run_for_all(const Step *step, const OrtKernelContext *context, int items, Task task) {
  if (items == 1) return task((void *)step, 0, 0), NULL;
  return run_parallel(step->experts->api, context, items, task, (void *)step);
}

/* Computes tokens first..first + step->tokens. */
static OrtStatus *run_tokens(Step *step, const OrtKernelContext *context, int experts) {
  OrtStatus *status = run_for_all(step, context, step->tokens, route_token);
  if (status) return status;
  sort_slots(step, experts);
  int rows = step->used ? step->slots / step->used : 0;
  step->each = task_rows(step->experts->set, &step->up, rows, (int64_t)step->used * step->up.rows);
  if ((status = run_for_all(step, context, step->used * tasks_of(&step->up, step->each), multiply_up))) return status;
  if ((status = run_for_all(step, context, step->slots, activate_slot))) return status;
  step->each = task_rows(step->experts->set, &step->down, rows, (int64_t)step->used * step->down.rows);
  if ((status = run_for_all(step, context, step->used * tasks_of(&step->down, step->each), multiply_down))) return status;
  return run_for_all(step, context, step->tokens, combine_token);
}

/* Return the next `bytes` bytes of memory, aligned to 64; without memory they are only counted. */
static void *next_part(char *memory, size_t *used, size_t bytes) {
  void *part = memory ? memory + *used : NULL;
  *used += (bytes + 63) / 64 * 64;
  return part;
}

/* Lays out everything that `tokens` tokens need; returns its bytes. */
static size_t place_parts(Step *step, char *memory, size_t tokens, size_t experts) {
  size_t pairs = tokens * (size_t)step->experts->chosen, used = 0, most = pairs < experts ? pairs : experts;
  step->expert = next_part(memory, &used, sizeof(int32_t) * most);
  step->start = next_part(memory, &used, sizeof(int32_t) * (most + 1));
  step->token = next_part(memory, &used, sizeof(int32_t) * pairs);
  step->slot_of = next_part(memory, &used, sizeof(int32_t) * (pairs + experts));
  step->pair_expert = next_part(memory, &used, sizeof(int32_t) * pairs);
  step->pair_weight = next_part(memory, &used, sizeof(float) * pairs);
  void *rounded = next_part(memory, &used, activation_bytes(&step->up, (int64_t)tokens));
  void *hidden = next_part(memory, &used, activation_bytes(&step->down, (int64_t)pairs));
  step->wide = next_part(memory, &used, sizeof(float) * pairs * (size_t)step->up.rows);
  step->narrow = next_part(memory, &used, sizeof(float) * pairs * (size_t)step->down.width);
  step->results = next_part(memory, &used, sizeof(float) * pairs * (size_t)step->down.rows);
  if (memory) {
    step->rounded = place_activations(&step->up, (int64_t)tokens, rounded);
    step->hidden = place_activations(&step->down, (int64_t)pairs, hidden);
  }
  step->panel = panel_bytes(&step->up) > panel_bytes(&step->down) ? panel_bytes(&step->up) : panel_bytes(&step->down);
  step->panels = next_part(memory, &used, tokens >= 2 ? step->panel * MOST_WORKERS : 0);
  return used;
}

/* Checks the inputs against each other and fills the two shapes. */
static const char *check_inputs(Step *step) {
  const Experts *experts = step->experts;
  Tensor *in = step->in;
  for (int i = X; i <= DOWN_SCALES; i++) {
    if (i != UP_BIAS && !in[i].data && in[X].sizes[0]) return "moec.QMoE: an input is missing";
  }
  if (in[X].rank != 2 || in[CHOICE].rank != 2 || in[UP].rank != 3 || in[DOWN].rank != 3) return "moec.QMoE: wrong ranks";
  int64_t choices = experts->grid ? experts->chosen : in[UP].sizes[0];
  if (in[CHOICE].sizes[0] != in[X].sizes[0] || in[CHOICE].sizes[1] != choices) return "moec.QMoE: wrong scores";
  if (experts->grid && (!in[MIXING].data || in[MIXING].rank != 2 || in[MIXING].sizes[1] != choices)) {
    if (in[X].sizes[0]) return "moec.GridExperts: wrong weights of experts";
  }
  if (experts->grid && !read_grid(&in[NUMBERS], experts->bits, step->numbers)) return "moec.GridExperts: its numbers are no grid of int8";
  if (experts->chosen < 1 || experts->chosen > in[UP].sizes[0]) return "moec.QMoE: k is none that it takes";
  step->up = (Shape){experts->bits, experts->group, (int)in[UP].sizes[1], (int)(in[UP].sizes[2] * 8 / experts->bits),
                     experts->grid};
  step->down = (Shape){experts->bits, experts->group, (int)in[DOWN].sizes[1], (int)(in[DOWN].sizes[2] * 8 / experts->bits),
                       experts->grid};
  if (!complete_shape(&step->up) || !complete_shape(&step->down)) return "moec.QMoE: bits or block_size is none that it takes";
  int results = experts->activation.function == SWIGLU ? step->up.rows / 2 : step->up.rows;
  if (step->up.width != in[X].sizes[1] || step->down.width != results) return "moec.QMoE: the weights do not fit";
  return NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  Experts *experts = kernel;
  OrtApi api = experts->api;
  Step step = {experts};
  OrtStatus *status;
  for (size_t i = 0; i < INPUTS; i++) {
    if ((status = read_input(api, context, i, &step.in[i]))) return status; /* absent where the operator has fewer */
  }
  if ((status = read_copies(api, context, &experts->weights, step.in, INPUTS))) return status;
  if (experts->grid) {
    Tensor given[GRID_INPUTS];
    memcpy(given, step.in, sizeof given);
    memset(step.in, 0, sizeof step.in);
    for (int i = 0; i < GRID_INPUTS; i++) step.in[grid_inputs[i]] = given[i];
  }
  const char *wrong = check_inputs(&step);
  if (wrong) return fail(api, wrong);
  int64_t sizes[2] = {step.in[X].sizes[0], step.down.rows};
  int count = (int)step.in[UP].sizes[0];
  OrtValue *out;
  void *y;
  if ((status = ORT(api, output)(context, 0, sizes, 2, &out))) return status;
  if ((status = ORT(api, tensor_data)(out, &y)) || !sizes[0]) return status;
  size_t most = sizes[0] < TOKENS ? (size_t)sizes[0] : TOKENS;
  char *memory = take_scratch(place_parts(&step, NULL, most, (size_t)count));
  if (!memory) return fail(api, "moec.QMoE: no memory");
  place_parts(&step, memory, most, (size_t)count);
  const float *x = step.in[X].data;
  for (int64_t first = 0; first < sizes[0] && !status; first += TOKENS) {
    step.tokens = sizes[0] - first < TOKENS ? (int)(sizes[0] - first) : TOKENS;
    step.x = x + first * step.up.width, step.y = (float *)y + first * step.down.rows;
    step.first = first;
    status = run_tokens(&step, context, count);
  }
  give_scratch(memory);
  return status;
}

/* Reads the activation; returns whether it is one that the kernels have. */
static int read_activation(OrtApi api, const OrtKernelInfo *info, Activation *out) {
  char text[16] = "";
  size_t size = sizeof text;
  static const struct {
    const char *name;
    Function function;
  } functions[] = {{"swiglu", SWIGLU}, {"silu", SILU}, {"relu", RELU}, {"gelu", GELU_TANH}, {"identity", IDENTITY}};
  OrtStatus *status = ORT(api, text_attribute)(info, "activation_type", text, &size);
  if (status) return ORT(api, release_status)(status), 0;
  out->alpha = float_attribute(api, info, "activation_alpha", 1);
  out->beta = float_attribute(api, info, "activation_beta", 0);
  out->limit = float_attribute(api, info, "swiglu_limit", INFINITY);
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    if (!strcmp(text, functions[i].name)) return out->function = functions[i].function, 1;
  }
  return 0;
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {
  Experts *experts = calloc(1, sizeof *experts);
  if (!experts) return fail(api, "moec.QMoE: no memory");
  experts->api = api;
  experts->grid = op->get_name != experts_op.get_name;
  experts->set = choose_kernels();
  experts->chosen = (int)int_attribute(api, info, "k", 0);
  experts->bits = (int)int_attribute(api, info, "expert_weight_bits", 4);
  experts->group = (int)int_attribute(api, info, "block_size", 0);
  if (!read_activation(api, info, &experts->activation) || (experts->bits != 4 && experts->bits != (experts->grid ? 3 : 8))) {
    free(experts);
    return fail(api, "moec.QMoE: an activation or a width of weights that it does not have");
  }
  if (experts->grid) {
    note_weights(api, info, 1 << 3 | 1 << 5, 1 << 4 | 1 << 6, 0, &experts->weights); /* see grid_inputs */
  } else {
    note_weights(api, info, 1 << UP | 1 << DOWN | 1 << UP_ZEROS | 1 << DOWN_ZEROS, 0, 1 << UP_SCALES | 1 << DOWN_SCALES,
                 &experts->weights);
  }
  *out = experts;
  return NULL;
}

static void destroy(void *kernel) {
  Experts *experts = kernel;
  drop_copies(&experts->weights);
  free(experts);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "QMoE"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static int input_type(const OrtCustomOp *op, size_t i) {
  return (void)op, i == UP || i == DOWN || i == UP_ZEROS || i == DOWN_ZEROS ? ORT_UINT8 : ORT_FLOAT;
}
static int input_kind(const OrtCustomOp *op, size_t i) {
  return (void)op, i < UP_BIAS || i == DOWN || i == DOWN_SCALES ? ORT_REQUIRED : ORT_OPTIONAL;
}

const OrtCustomOp experts_op = {
    .get_name = name, .get_input_count = input_count, .get_input_type = input_type, .get_input_kind = input_kind,
    .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};

static const char *grid_name(const OrtCustomOp *op) { return (void)op, "GridExperts"; }
static size_t grid_input_count(const OrtCustomOp *op) { return (void)op, GRID_INPUTS; }
static int grid_input_type(const OrtCustomOp *op, size_t i) {
  (void)op;
  switch (grid_inputs[i]) {
    case CHOICE: return ORT_INT64;
    case UP: case DOWN: return ORT_UINT8;
    case UP_SCALES: case DOWN_SCALES: return ORT_BFLOAT16;
    default: return ORT_FLOAT;
  }
}
static int grid_input_kind(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }

const OrtCustomOp grid_experts_op = {
    .get_name = grid_name, .get_input_count = grid_input_count, .get_input_type = grid_input_type,
    .get_input_kind = grid_input_kind, .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};

static const char *grid3_name(const OrtCustomOp *op) { return (void)op, "GridExperts3"; }

const OrtCustomOp grid3_experts_op = {
    .get_name = grid3_name, .get_input_count = grid_input_count, .get_input_type = grid_input_type,
    .get_input_kind = grid_input_kind, .create_kernel_v2 = create, .compute_v2 = compute, .destroy = destroy};
