/* moec.GroupQueryAttention: append to the cache and attend to it, as com.microsoft.GroupQueryAttention; one for each type of cache. */
#include "attend.h"

#include "exponential.h"

#include <stdlib.h>
#include <string.h>

enum {
  Q = 0, K, V, PAST_KEY, PAST_VALUE, LAST, TOTAL, COS, SIN, ROWS_OF_ANGLES, BIAS, SINKS, COUNT = 16, KEY_SCALE, VALUE_SCALE, INPUTS
};
enum { CACHES = 4 }; /* keys, values, the scales of each */
enum { FEWEST_KEYS = 512, ENOUGH_TASKS = 32 }; /* a range of keys is worth a task of its own from so many on */

typedef struct {
  OrtApi api;
  const AttentionKernels *kernels;
  int heads, groups, window;
  float scale, softcap;
  CacheType type;
} Attention;

typedef struct {
  const Attention *node;
  CacheType type;
  int batch, added, length, width, turned; /* new tokens; tokens before them; numbers of a head, and of its angles */
  int64_t held, room;                      /* tokens that the buffers of the past and of the present have room for */
  const float *q, *k, *v, *cos, *sin, *bias, *sinks;
  size_t q_row, k_row;                     /* numbers from a token to the next one */
  const int64_t *angles;
  int64_t bias_batch;                      /* numbers from a batch row's bias to the next one's */
  const char *past[CACHES];
  char *present[CACHES];
  float *y;
  float *queries; /* [batch, groups, new, heads of a group][padded] */
  int tiles, tile_rows, parts;
  float *partial; /* of each part: sums, largest scores, totals */
  float *memory;
  size_t worker_numbers;
} Step;

static int group_heads(const Step *s) { return s->node->heads / s->node->groups; }
/* Return the scales of rows from one on; NULL where the cache has none. */
static float *scales_of_rows(const Step *s, int kind, size_t row) {
  return s->type == CACHE_INT8 ? (float *)s->present[2 + kind] + row : NULL;
}
static size_t tile_numbers(const Step *s) { return (size_t)s->tile_rows * ((size_t)padded(s->width) + 2); }

/* --- new tokens ---------------------------------------------------------------------------------------------------- */

static void turn_head(const float *x, int width, int turned, const float *cos, const float *sin, float *y) {
  int half = turned / 2;
  for (int i = 0; i < half; i++) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
  for (int i = turned; i < width; i++) y[i] = x[i];
}

/* Turns the heads of a new token, and appends its keys and values. */
static void append_token(void *data, int worker, int item) {
  const Step *s = data;
  const Attention *node = s->node;
  const float *q = s->q + (size_t)item * s->q_row, *k = s->k + (size_t)item * s->k_row, *v = s->v + (size_t)item * s->k_row;
  size_t angle = s->cos ? (size_t)s->angles[item] * (size_t)(s->turned / 2) : 0;
  const float *cos = s->cos + angle, *sin = s->sin + angle;
  int b = item / s->added, token = item % s->added, each = group_heads(s), wide = padded(s->width);
  float *turned = s->memory + (size_t)worker * s->worker_numbers;
  size_t row = cache_row(s->type, s->width);
  for (int h = 0; h < node->heads; h++, q += s->width) {
    float *to = s->queries + (((size_t)(b * node->groups + h / each) * s->added + token) * each + h % each) * wide;
    turn_head(q, s->width, s->turned, cos, sin, to);
    for (int i = 0; i < s->width; i++) to[i] *= node->scale;
    for (int i = s->width; i < wide; i++) to[i] = 0;
  }
  for (int g = 0; g < node->groups; g++, k += s->width, v += s->width) {
    size_t place = (size_t)(b * node->groups + g) * s->room + s->length + token;
    turn_head(k, s->width, s->turned, cos, sin, turned);
    node->kernels->store(s->type, turned, s->width, s->present[0] + place * row, scales_of_rows(s, 0, place));
    node->kernels->store(s->type, v, s->width, s->present[1] + place * row, scales_of_rows(s, 1, place));
  }
}

/* Copies the past of a head of one of the caches to where its present is. */
static void copy_past(void *data, int worker, int item) {
  const Step *s = data;
  int kind = item % CACHES;
  size_t row = kind < 2 ? cache_row(s->type, s->width) : sizeof(float), head = (size_t)(item / CACHES);
  (void)worker;
  if (!s->past[kind]) return;
  char *to = s->present[kind] + head * (size_t)s->room * row;
  const char *from = s->past[kind] + head * (size_t)s->held * row;
  if (to != from) memcpy(to, from, (size_t)s->length * row);
}

/* --- attention ------------------------------------------------------------------------------------------------------ */

/* Return the rows of a tile. */
static int rows_of_tile(const Step *s, int tile) {
  int left = s->added * group_heads(s) - tile * s->tile_rows;
  return left < s->tile_rows ? left : s->tile_rows;
}

/* Writes the results of a tile of rows: softmax's sums by its denominators, which a sink adds to. */
static void finish_tile(const Step *s, int group, int tile, const float *sum, float *most, float *total) {
  int each = group_heads(s), wide = padded(s->width), b = group / s->node->groups, g = group % s->node->groups;
  for (int i = 0; i < rows_of_tile(s, tile); i++) {
    int row = tile * s->tile_rows + i, h = g * each + row % each;
    float *y = s->y + ((size_t)(b * s->added + row / each) * (size_t)s->node->heads + h) * (size_t)s->width, factor = 1;
    if (s->sinks) {
      float larger = fmaxf(most[i], s->sinks[h]);
      factor = most[i] == -INFINITY ? 0 : exponential(most[i] - larger);
      total[i] = total[i] * factor + exponential(s->sinks[h] - larger);
    }
    factor = total[i] > 0 ? factor / total[i] : 0;
    for (int d = 0; d < s->width; d++) y[d] = sum[(size_t)i * wide + d] * factor;
  }
}

/* Attends with a tile of rows to one of `parts` ranges of keys; the last tiles, which see most keys, come first. */
static void attend_tile(void *data, int worker, int item) {
  const Step *s = data;
  const Attention *node = s->node;
  int part = item % s->parts, groups = s->batch * node->groups, group = item / s->parts % groups;
  int tile = s->tiles - 1 - item / s->parts / groups, each = group_heads(s), rows = rows_of_tile(s, tile);
  int first = tile * s->tile_rows, token = first / each, end = s->length + (first + rows - 1) / each + 1;
  int start = node->window && s->length + token + 1 > node->window ? s->length + token + 1 - node->window : 0;
  int step = ((end - start + s->parts - 1) / s->parts + KEYS - 1) / KEYS * KEYS;
  size_t wide = (size_t)padded(s->width), row = cache_row(s->type, s->width);
  float *memory = s->memory + (size_t)worker * s->worker_numbers, *sum = memory + scratch_numbers(s->width);
  if (s->parts > 1) sum = s->partial + (((size_t)tile * groups + group) * s->parts + part) * tile_numbers(s);
  Part p = {
      .type = s->type, .width = s->width, .rows = rows, .heads = each, .row = first, .past = s->length, .window = node->window,
      .from = start + part * step, .to = start + (part + 1) * step < end ? start + (part + 1) * step : end,
      .softcap = node->softcap, .keys = s->present[0] + (size_t)group * s->room * row,
      .values = s->present[1] + (size_t)group * s->room * row, .key_scales = scales_of_rows(s, 0, (size_t)group * s->room),
      .value_scales = scales_of_rows(s, 1, (size_t)group * s->room),
      .q = s->queries + ((size_t)group * s->added * each + first) * wide,
      .bias = s->bias ? s->bias + (size_t)(group / node->groups) * s->bias_batch + (size_t)token * (s->length + s->added) : NULL,
      .bias_row = (size_t)(s->length + s->added), .sum = sum, .most = sum + s->tile_rows * wide,
      .total = sum + s->tile_rows * (wide + 1), .scratch = memory};
  memset(sum, 0, tile_numbers(s) * sizeof(float));
  for (int i = 0; i < rows; i++) p.most[i] = -INFINITY;
  node->kernels->attend(&p);
  if (s->parts == 1) finish_tile(s, group, tile, sum, p.most, p.total);
}

/* Adds up what the ranges of keys gave. */
static void combine_tile(void *data, int worker, int item) {
  const Step *s = data;
  int groups = s->batch * s->node->groups, tile = item / groups;
  size_t wide = (size_t)padded(s->width), numbers = tile_numbers(s);
  float *sum = s->partial + (size_t)item * s->parts * numbers;
  float *most = sum + s->tile_rows * wide, *total = most + s->tile_rows;
  (void)worker;
  for (int part = 1; part < s->parts; part++) {
    const float *other = sum + part * numbers;
    for (int i = 0; i < rows_of_tile(s, tile); i++) {
      float theirs = other[s->tile_rows * wide + i], larger = fmaxf(most[i], theirs);
      if (theirs == -INFINITY) continue;
      float a = most[i] == -INFINITY ? 0 : exponential(most[i] - larger), b = exponential(theirs - larger);
      for (size_t d = i * wide; d < (i + 1) * wide; d++) sum[d] = sum[d] * a + other[d] * b;
      total[i] = total[i] * a + other[s->tile_rows * (wide + 1) + i] * b;
      most[i] = larger;
    }
  }
  finish_tile(s, item % groups, tile, sum, most, total);
}

/* --- the operator --------------------------------------------------------------------------------------------------- */

/* Reads what the inputs say of a step; returns what is wrong, or NULL. */
static const char *read_step(const Attention *node, const Tensor in[INPUTS], Step *s) {
  const Tensor *past = &in[PAST_KEY];
  if (past->rank != 4 || in[PAST_VALUE].rank != 4 || in[Q].rank != 3 || !in[TOTAL].data) return "it has other ranks";
  s->batch = (int)past->sizes[0], s->added = (int)in[Q].sizes[1], s->width = (int)past->sizes[3], s->held = past->sizes[2];
  int total = *(const int32_t *)in[TOTAL].data;
  size_t heads = (size_t)node->heads * s->width, keys = (size_t)node->groups * s->width;
  for (int i = 0; i < 4; i++) {
    if (past->sizes[i] != in[PAST_VALUE].sizes[i]) return "keys and values differ";
  }
  s->length = total - s->added;
  if (past->sizes[1] != node->groups || s->length < 0 || s->length > s->held) return "the past is not that of its attributes";
  if (in[Q].sizes[0] != s->batch || (size_t)in[Q].sizes[2] != heads + (in[K].data ? 0 : 2 * keys)) return "q has other sizes";
  s->q = in[Q].data, s->k = in[K].data, s->v = in[V].data;
  s->q_row = in[K].data ? heads : heads + 2 * keys, s->k_row = in[K].data ? keys : s->q_row;
  if (!s->k) s->k = s->q + heads, s->v = s->k + keys;
  if (in[COS].data) {
    s->cos = in[COS].data, s->sin = in[SIN].data, s->angles = in[ROWS_OF_ANGLES].data;
    s->turned = (int)in[COS].sizes[1] * 2;
    if (s->turned > s->width || !s->sin || !s->angles) return "the angles are not those of its heads";
  }
  if (in[BIAS].data) {
    int64_t *sizes = (int64_t *)in[BIAS].sizes;
    if (in[BIAS].rank != 4 || sizes[1] != 1 || sizes[2] != s->added || sizes[3] != total) return "the bias has other sizes";
    s->bias = in[BIAS].data, s->bias_batch = sizes[0] == 1 ? 0 : sizes[2] * sizes[3];
  }
  s->sinks = in[SINKS].data;
  for (int kind = 0; kind < (node->type == CACHE_INT8 ? CACHES : 2); kind++) {
    const Tensor *held = &in[kind < 2 ? PAST_KEY + kind : KEY_SCALE + kind - 2];
    s->past[kind] = held->data;
    for (int i = 0; kind > 1 && i < 3; i++) {
      if (held->rank != 3 || held->sizes[i] != past->sizes[i]) return "the scales are not those of its keys and values";
    }
  }
  s->room = s->held > total ? s->held : total;
  return NULL;
}

/* Chooses the tiles of rows, and how many ranges of keys each attends to. */
static void split_work(Step *s) {
  int rows = s->added * group_heads(s), total = s->length + s->added, groups = s->batch * s->node->groups;
  int keys = s->node->window && s->node->window + s->added < total ? s->node->window + s->added : total;
  s->tile_rows = rows < ROWS ? rows : ROWS;
  s->tiles = (rows + s->tile_rows - 1) / s->tile_rows;
  s->parts = 1;
  if (s->tiles * groups >= ENOUGH_TASKS || keys < 2 * FEWEST_KEYS) return;
  int most = keys / FEWEST_KEYS, wanted = 2 * ENOUGH_TASKS / (s->tiles * groups);
  s->parts = most < wanted ? most : wanted;
}

static OrtStatus *run_step(OrtApi api, OrtKernelContext *context, Step *s) {
  int groups = s->batch * s->node->groups, tiles = s->tiles * groups, tokens = s->batch * s->added;
  size_t queries = (size_t)tokens * s->node->heads * padded(s->width);
  size_t partial = s->parts > 1 ? (size_t)tiles * s->parts * tile_numbers(s) : 0;
  int workers = tiles * s->parts > tokens ? tiles * s->parts : tokens;
  workers = workers < MOST_WORKERS ? workers : MOST_WORKERS;
  s->worker_numbers = (scratch_numbers(s->width) + tile_numbers(s) + 15) / 16 * 16;
  float *memory = take_scratch((queries + partial + workers * s->worker_numbers) * sizeof(float));
  OrtStatus *status = NULL;
  if (!memory) return fail(api, "moec.GroupQueryAttention: no memory");
  s->memory = memory, s->queries = memory + workers * s->worker_numbers, s->partial = s->queries + queries;
  int moved = 0;
  for (int kind = 0; kind < CACHES; kind++) moved |= s->past[kind] != s->present[kind];
  if (s->length && moved) status = run_parallel(api, context, CACHES * groups, copy_past, s);
  if (!status && tokens == 1) {
    append_token(s, 0, 0);
  } else if (!status) {
    status = run_parallel(api, context, tokens, append_token, s);
  }
  if (!status) status = run_parallel(api, context, tiles * s->parts, attend_tile, s);
  if (!status && s->parts > 1) status = run_parallel(api, context, tiles, combine_tile, s);
  give_scratch(memory);
  return status;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
  const Attention *node = kernel;
  OrtApi api = node->api;
  Tensor in[INPUTS];
  Step step = {.node = node, .type = node->type};
  OrtStatus *status;
  OrtValue *out;
  void *data[1 + CACHES] = {NULL};
  for (size_t i = 0; i < INPUTS; i++) {
    if ((status = read_input(api, context, i, &in[i]))) return status;
  }
  const char *wrong = read_step(node, in, &step);
  if (wrong) {
    char message[128] = "moec.GroupQueryAttention: ";
    strncat(message, wrong, 64);
    return fail(api, message);
  }
  int64_t rows[3] = {step.batch, step.added, (int64_t)node->heads * step.width};
  int64_t cache[4] = {step.batch, node->groups, step.room, step.width};
  for (size_t i = 0; i < (step.type == CACHE_INT8 ? 5 : 3); i++) {
    if ((status = ORT(api, output)(context, i, i ? cache : rows, i == 1 || i == 2 ? 4 : 3, &out))) return status;
    if ((status = ORT(api, tensor_data)(out, &data[i]))) return status;
  }
  step.y = data[0];
  for (int kind = 0; kind < CACHES; kind++) step.present[kind] = data[1 + kind];
  if (!step.batch || !step.added) return NULL;
  split_work(&step);
  return run_step(api, context, &step);
}

static OrtStatus *create(OrtApi api, const OrtKernelInfo *info, CacheType type, void **out) {
  Attention *node = calloc(1, sizeof *node);
  if (!node) return fail(api, "moec.GroupQueryAttention: no memory");
  int64_t window = int_attribute(api, info, "local_window_size", -1);
  *node = (Attention){.api = api, .kernels = attention_of(choose_kernels()), .heads = (int)int_attribute(api, info, "num_heads", 0),
                      .groups = (int)int_attribute(api, info, "kv_num_heads", 0), .window = window > 0 ? (int)window : 0,
                      .scale = float_attribute(api, info, "scale", 1), .softcap = float_attribute(api, info, "softcap", 0),
                      .type = type};
  if (node->heads < 1 || node->groups < 1 || node->heads % node->groups) {
    free(node);
    return fail(api, "moec.GroupQueryAttention: num_heads or kv_num_heads is none that it takes");
  }
  *out = node;
  return NULL;
}

static int input_type(CacheType type, size_t i) {
  static const int types[] = {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16, ORT_INT8};
  if (i == PAST_KEY || i == PAST_VALUE) return types[type];
  return i == ROWS_OF_ANGLES ? ORT_INT64 : i == LAST || i == TOTAL || i == COUNT ? ORT_INT32 : ORT_FLOAT;
}
static int input_kind(const OrtCustomOp *op, size_t i) {
  (void)op;
  int required = i == Q || i == PAST_KEY || i == PAST_VALUE || i == LAST || i == TOTAL || i == KEY_SCALE || i == VALUE_SCALE;
  return required ? ORT_REQUIRED : ORT_OPTIONAL;
}

/* ONNX Runtime asks an operator for its types without saying which one it asks, but by the functions that it calls. */
#define ATTENTION(op_, title, type_, scales)                                                                             \
  static OrtStatus *create_##op_(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {             \
    return (void)op, create(api, info, type_, out);                                                                      \
  }                                                                                                                      \
  static const char *name_##op_(const OrtCustomOp *op) { return (void)op, title; }                                       \
  static size_t inputs_##op_(const OrtCustomOp *op) { return (void)op, (scales) ? INPUTS : KEY_SCALE; }                  \
  static size_t outputs_##op_(const OrtCustomOp *op) { return (void)op, (scales) ? 5 : 3; }                              \
  static int input_type_##op_(const OrtCustomOp *op, size_t i) { return (void)op, input_type(type_, i); }                \
  static int output_type_##op_(const OrtCustomOp *op, size_t i) {                                                        \
    return (void)op, input_type(type_, i == 1 || i == 2 ? PAST_KEY : Q);                                                 \
  }                                                                                                                      \
  const OrtCustomOp op_ = {                                                                                              \
      .get_name = name_##op_, .get_input_count = inputs_##op_, .get_input_type = input_type_##op_,                       \
      .get_input_kind = input_kind, .get_output_count = outputs_##op_, .get_output_type = output_type_##op_,             \
      .create_kernel_v2 = create_##op_, .compute_v2 = compute, .destroy = free}

ATTENTION(attention_op, "GroupQueryAttention", CACHE_F32, 0);
ATTENTION(attention_f16_op, "GroupQueryAttentionF16", CACHE_F16, 0);
ATTENTION(attention_bf16_op, "GroupQueryAttentionBF16", CACHE_BF16, 0);
ATTENTION(attention_int8_op, "GroupQueryAttentionInt8", CACHE_INT8, 1);

const AttentionKernels *attention_of(const InstructionSet *set) {
  static const AttentionKernels *const all[] = {
#if defined(__x86_64__) || defined(_M_X64)
      &avx512_attention, &avx2_attention,
#elif defined(__aarch64__)
      &neon_attention,
#endif
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    if (!strncmp(set->name, all[i]->name, strlen(all[i]->name))) return all[i];
  }
  return &plain_attention;
}
