/* Checks the kernels of every instruction set that this machine has against products of the numbers, without ONNX Runtime: for
   processors that only an emulator has, and under sanitizers. Exits with 1 at the first difference.

   All memory that kernels read or write lies at the end of a block of its own, so that a sanitizer sees one byte too many. */
#include "host.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What host.c calls of the library; the operators are not used here. */
const OrtCustomOp linear_op, experts_op;

static uint64_t state;
static uint32_t next_random(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 33);
}
static int between(int low, int high) { return low + (int)(next_random() % (uint32_t)(high - low + 1)); }

static void *filled(size_t bytes) {
  uint8_t *memory = malloc(bytes ? bytes : 1);
  if (!memory) abort();
  for (size_t i = 0; i < bytes; i++) memory[i] = (uint8_t)next_random();
  return memory;
}

static float *numbers(size_t count, float most) {
  float *x = filled(count * sizeof(float));
  for (size_t i = 0; i < count; i++) x[i] = most * (float)between(-1000, 1000) / 1000;
  return x;
}

/* Leaves bytes of 0xff, which are NaN as numbers, where the next function keeps what it forgets to fill. */
static __attribute__((noinline)) void dirty_stack(void) {
  volatile uint8_t bytes[1 << 17];
  for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = 0xff;
}

static double weight(const Matrix *w, int row, int k) {
  const Shape *s = w->shape;
  const uint8_t *codes = w->codes + (size_t)row * s->row_bytes;
  int code = s->bits == 8   ? codes[k]
             : s->bits == 4 ? codes[k / 2] >> (k % 2 * 4) & 15
                            : (codes[k / 4] >> (k % 4 * 2) & 3) + 4 * (codes[s->width / 4 + k / 8] >> (k % 8) & 1);
  if (s->grid) return (double)scale_of(w, (size_t)row * s->groups + (size_t)(k / s->group)) * w->numbers[code];
  return (double)w->scales[(size_t)row * s->groups + k / s->group] * (code - zero_point(w, row, k / s->group));
}

/* Return number `k` of a row of activations as the kernels were given it. */
static double activation(const Shape *s, const Activations *x, int row, int k) {
  int wide = chunk_width(s), within = k % wide;
  int parts = s->bits == 8 ? 1 : s->bits == 4 ? 2 : 4, place = within / parts + within % parts * CHUNK;
  return (double)x->scales[(size_t)row * s->groups + k / s->group] * x->codes[(size_t)row * codes_row(s) + k / wide * wide + place];
}

static int check_products(const InstructionSet *set, const Matrix *w, const Activations *x, const Product *p, int tiles) {
  const Shape *s = w->shape;
  void *panel = aligned_alloc(64, (panel_bytes(s) + 63) / 64 * 64);
  for (int first = 0; first < s->rows; first += TILE) {
    int count = s->rows - first < TILE ? s->rows - first : TILE, left = s->rows - first - count;
    dirty_stack();
    if (tiles) {
      set->multiply_tile(w, first, count, left < TILE ? left : TILE, p, panel);
    } else {
      set->multiply_rows(w, first, count, p);
    }
  }
  free(panel);
  for (int i = 0; i < p->count; i++) {
    for (int row = 0; row < s->rows; row++) {
      double wanted = w->bias ? w->bias[row] : 0, size = fabs(wanted);
      for (int k = 0; k < s->width; k++) {
        double part = weight(w, row, k) * activation(s, x, p->index ? p->index[i] : i, k);
        wanted += part, size += fabs(part);
      }
      double error = fabs(p->y[(size_t)i * p->stride + row] - wanted);
      if (!(error <= 1e-5 * size + 1e-6)) {
        printf("%s: bits %d grid %d group %d rows %d width %d zeros %d, row %d of %d, activation %d of %d, tiles %d: %g, not %g\n",
               set->name, s->bits, s->grid, s->group, s->rows, s->width, w->zeros != NULL, row, s->rows, i, p->count, tiles,
               p->y[(size_t)i * p->stride + row], wanted);
        return 1;
      }
    }
  }
  return 0;
}

static int check_rounding(const InstructionSet *set, const Shape *s, const float *x, const Activations *to, int rows) {
  for (int row = 0; row < rows; row++) {
    for (int k = 0; k < s->width; k++) {
      double scale = to->scales[(size_t)row * s->groups + k / s->group], found = activation(s, to, row, k);
      double exact = x[(size_t)row * s->width + k];
      if (!(fabs(found - exact) <= 0.5001 * scale)) {
        return printf("%s: bits %d group %d: %g rounded to %g\n", set->name, s->bits, s->group, exact, found), 1;
      }
    }
    for (int g = 0; g < s->groups; g++) {
      double sum = 0;
      for (int k = g * s->group; k < (g + 1) * s->group; k++) sum += activation(s, to, row, k);
      if (!(fabs(sum - to->sums[(size_t)row * s->groups + g]) <= 1e-4 * (fabs(sum) + 1e-3))) {
        return printf("%s: bits %d group %d: the sum of a group is wrong\n", set->name, s->bits, s->group), 1;
      }
    }
  }
  return 0;
}

static int check_case(const InstructionSet *set) {
  static const int widths[] = {3, 4, 4, 8};
  Shape s = {widths[between(0, 3)], 16 << between(0, 4), between(1, 70)};
  if (s.bits == 3 && s.group < 32) s.group = 32;
  s.width = s.group * between(1, 9);
  s.grid = s.bits == 3 || (s.bits == 4 && between(0, 1));
  if (!complete_shape(&s)) return printf("a shape is refused\n"), 1;
  int known = between(1, 9), count = between(1, 20);
  float *x = numbers((size_t)known * s.width, 4), *scales = numbers((size_t)s.rows * s.groups, 0.1f);
  float *bias = between(0, 1) ? numbers((size_t)s.rows, 1) : NULL;
  uint8_t *codes = filled((size_t)s.rows * s.row_bytes), *zeros = between(0, 1) ? filled((size_t)s.rows * s.zeros_bytes) : NULL;
  uint16_t *halves = filled(sizeof(uint16_t) * (size_t)s.rows * s.groups);
  int8_t *grid = filled(16);
  for (int i = 0; i < 16; i++) grid[i] = s.bits == 3 && i > 7 ? grid[i - 8] : (int8_t)between(-127, 127);
  for (int i = 0; i < s.rows * s.groups; i++) {
    uint32_t number;
    memcpy(&number, &scales[i], sizeof number);
    halves[i] = (uint16_t)(number >> 16);
  }
  Matrix w = s.grid ? (Matrix){&s, codes, .halves = halves, .numbers = grid, .bias = bias} : (Matrix){&s, codes, scales, zeros, bias};
  Activations to = {filled((size_t)known * codes_row(&s)), filled(sizeof(float) * (size_t)known * s.groups),
                    filled(sizeof(float) * (size_t)known * s.groups)};
  int32_t *index = filled(sizeof(int32_t) * (size_t)count);
  for (int i = 0; i < count; i++) index[i] = between(0, known - 1);
  for (int row = 0; row < known; row++) {
    set->quantize(&s, x + (size_t)row * s.width, to.codes + (size_t)row * codes_row(&s), to.scales + (size_t)row * s.groups,
                  to.sums + (size_t)row * s.groups);
  }
  Product p = {to, index, count, filled(sizeof(float) * (size_t)count * s.rows), (size_t)s.rows};
  int wrong = check_rounding(set, &s, x, &to, known) || check_products(set, &w, &to, &p, 0) ||
              (set->tile_from != NEVER && check_products(set, &w, &to, &p, 1));
  free(x), free(scales), free(halves), free(grid), free(bias), free(codes), free(zeros), free(index), free(p.y);
  free(to.codes), free(to.scales), free(to.sums);
  return wrong;
}

static int check_activations(const InstructionSet *set) {
  int width = between(1, 100);
  float *x = numbers((size_t)2 * width, 12), *y = filled(sizeof(float) * (size_t)width);
  Activation a = {(Function)between(SWIGLU, IDENTITY), 1.5f, 1, 5};
  int wrong = 0;
  set->activate(&a, x, width, y);
  for (int i = 0; i < width && !wrong; i++) {
    double v = x[i], g = fmin(x[2 * i], 5), u = fmax(fmin(x[2 * i + 1], 5), -5), wanted = v;
    if (a.function == SWIGLU) wanted = g / (1 + exp(-1.5 * g)) * (u + 1);
    if (a.function == SILU) wanted = v / (1 + exp(-v));
    if (a.function == RELU) wanted = fmax(v, 0);
    if (a.function == GELU_TANH) wanted = 0.5 * v * (1 + tanh(0.7978845608 * (v + 0.044715 * v * v * v)));
    wrong = !(fabs(y[i] - wanted) <= 2e-6 * fabs(v) + 2e-6 * fabs(wanted) + 1e-6);
    if (wrong) printf("%s: activation %d of %g is %g, not %g\n", set->name, a.function, v, y[i], wanted);
  }
  free(x), free(y);
  return wrong;
}

int main(int count, char **arguments) {
  int cases = count > 1 ? atoi(arguments[1]) : 300;
  const InstructionSet *set;
  for (int i = 0; (set = kernels_found(i)); i++) {
    state = 1;
    for (int n = 0; n < cases; n++) {
      if (check_case(set) || check_activations(set)) return printf("case %d\n", n), 1;
    }
    printf("%s: %d cases\n", set->name, cases);
  }
  return 0;
}
