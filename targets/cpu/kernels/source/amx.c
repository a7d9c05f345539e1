/* Many rows of activations on x86-64 with AMX: an instruction multiplies 16 rows of activations by 16 of weights, 64 bytes of each.
   No processor with it was there to run this: tests/targets/cpu/kernels/amx_emulated.h has the instructions in plain C. */
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#if defined(MOEC_TEST_AMX)
#include MOEC_TEST_AMX
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(TARGET))), apply_to = function)
#else
#define PRAGMA(text) _Pragma(#text)
#define USE_TARGET(names) PRAGMA(GCC target(names))
USE_TARGET(TARGET)
#endif

#define INLINE static inline __attribute__((always_inline))

#include "panel512.h"

enum { BLOCK = 16 }; /* rows of activations at once */

/* The shapes of the registers, as the processor reads them. */
typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16]; /* of a row */
  uint8_t rows[16];
} Shapes;

/* Sets the shapes for `n` rows of activations and `span` neighbours at once: registers 0 and 1 are sums, 2 are activations, 3 and 4
   weights. (Instructions take the numbers written out.) */
INLINE void shape_registers(int n, int span) {
  Shapes shapes = {.palette = 1};
  for (int i = 0; i < 5; i++) shapes.rows[i] = (uint8_t)(i < 3 ? n : span / 4), shapes.bytes[i] = (uint16_t)(i == 2 ? span : 64);
  _tile_loadconfig(&shapes);
}

/* Multiplies rows from..from + n of the activations with the tile. */
INLINE void multiply_block(const Matrix *w, int first, int count, const Product *p, int from, int n, Panel panel) {
  const Shape *s = w->shape;
  int parts = group_parts(s), length = s->group / parts, span = length < CHUNK ? length : CHUNK;
  __m512 y[BLOCK][2];
  int8_t gathered[BLOCK * CHUNK] __attribute__((aligned(64)));
  int32_t sums[2][BLOCK * 16] __attribute__((aligned(64)));
  for (int i = 0; i < n; i++) y[i][0] = y[i][1] = _mm512_setzero_ps();
  shape_registers(n, span);
  for (int g = 0; g < s->groups; g++) {
    _tile_zero(0);
    _tile_zero(1);
    for (int part = 0; part < parts; part++) {
      for (int k = 0; k < length; k += span) {
        size_t start = group_start(s, g) + (size_t)part * CHUNK + (size_t)k;
        if (p->index) { /* rows that do not lie at equal distances */
          for (int i = 0; i < n; i++) memcpy(gathered + i * CHUNK, codes_of(p, s, from + i) + start, (size_t)span);
          _tile_loadd(2, gathered, CHUNK);
        } else {
          _tile_loadd(2, codes_of(p, s, from) + start, codes_row(s));
        }
        _tile_loadd(3, panel.codes + start * TILE, TILE * 4);
        _tile_loadd(4, panel.codes + start * TILE + 64, TILE * 4);
        _tile_dpbsud(0, 2, 3);
        _tile_dpbsud(1, 2, 4);
      }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    const float *scale = panel.scales + (size_t)g * TILE, *zero = panel.zeros + (size_t)g * TILE;
    for (int i = 0; i < n; i++) {
      __m512 a = _mm512_set1_ps(scales_of(p, s, from + i)[g]), off = _mm512_set1_ps(sums_of(p, s, from + i)[g]);
      for (int h = 0; h < 2; h++) {
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[h] + i * 16)), a);
        y[i][h] = _mm512_fmadd_ps(part, _mm512_loadu_ps(scale + 16 * h), y[i][h]);
        y[i][h] = _mm512_fnmadd_ps(off, _mm512_loadu_ps(zero + 16 * h), y[i][h]);
      }
    }
  }
  for (int h = 0; h < 2; h++) {
    __mmask16 some = first_of_16(count - 16 * h);
    __m512 bias = w->bias ? _mm512_maskz_loadu_ps(some, w->bias + first + 16 * h) : _mm512_setzero_ps();
    for (int i = 0; i < n; i++) {
      _mm512_mask_storeu_ps(p->y + (size_t)(from + i) * p->stride + first + 16 * h, some, _mm512_add_ps(y[i][h], bias));
    }
  }
}

static void multiply_tile(const Matrix *w, int first, int count, int next, const Product *p, void *memory) {
  Panel panel = place_panel(w->shape, memory);
  (void)next;
  unpack_tile(w, first, count, panel);
  for (int i = 0; i < p->count; i += BLOCK) {
    multiply_block(w, first, count, p, i, p->count - i < BLOCK ? p->count - i : BLOCK, panel);
  }
  _tile_release();
}

const Tiles amx_tiles = {"amx-int8", 12, multiply_tile};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
