/* A tile of rows of weights, unpacked for many rows of activations: codes of a byte in the order of the activations' chunks.

   A file of an instruction set that includes this for unpack_tile says before:

   STEP, Word              neighbours of a row that lie together, 4 or 8, and an unsigned integer of as many bytes
   TILE_LOWERED(bits)      what unpacking takes off a code: 0, or 128 of codes of 8 bits, which are signed then */
#ifndef MOEC_TILES_H
#define MOEC_TILES_H

#include "kernels.h"

#include <string.h>

typedef struct {
  uint8_t *codes; /* [steps of neighbours, in the order of the activations][32 rows][neighbours of a step] */
  float *scales;  /* [groups][32] */
  float *zeros;   /* [groups][32]: zero point times scale */
} Panel;

static inline Panel place_panel(const Shape *s, void *memory) {
  float *scales = memory;
  return (Panel){(uint8_t *)(scales + (size_t)2 * TILE * s->groups), scales, scales + (size_t)TILE * s->groups};
}

/* Where the codes of a group begin in a row of activations. A group that is smaller than a chunk has a part of its places in each
   part of the chunk, a line apart. */
static inline int group_parts(const Shape *s) { return s->group < chunk_width(s) ? chunk_parts(s) : 1; }
static inline size_t group_start(const Shape *s, int g) {
  size_t at = (size_t)g * s->group, wide = (size_t)chunk_width(s);
  return at / wide * wide + at % wide / (size_t)group_parts(s);
}

#ifdef STEP
/* Return the numbers of a grid that the codes in a word stand for, as codes of 8 bits are unpacked. */
static inline Word numbers_of(Word codes, const int8_t *numbers) {
  uint8_t bytes[STEP];
  memcpy(bytes, &codes, STEP);
  for (int i = 0; i < STEP; i++) bytes[i] = (uint8_t)(numbers[bytes[i]] + 128 - TILE_LOWERED(8));
  memcpy(&codes, bytes, STEP);
  return codes;
}

/* Unpacks 64 bytes of a row; of a grid with `numbers`, else NULL. */
static inline void unpack_line(const uint8_t *codes, int bits, const int8_t *numbers, uint8_t *to) {
  const Word half = (Word)0x0f0f0f0f0f0f0f0f, sign = TILE_LOWERED(8) ? (Word)0x8080808080808080 : 0;
  for (int i = 0; i < CHUNK / STEP; i++) {
    Word word, low, high;
    memcpy(&word, codes + i * STEP, STEP);
    low = bits == 4 ? word & half : word ^ sign, high = word >> 4 & half;
    if (numbers) low = numbers_of(low, numbers), high = numbers_of(high, numbers);
    memcpy(to + (size_t)i * TILE * STEP, &low, STEP);
    if (bits == 4) memcpy(to + (size_t)(CHUNK / STEP + i) * TILE * STEP, &high, STEP);
  }
}

/* Unpacks 64 bytes of a row of codes of 3 bits, whose highest bits are in 32 others. */
static inline void unpack_two_planes(const uint8_t *codes, const uint8_t *high, const int8_t *numbers, uint8_t *to) {
  for (int b = 0; b < CHUNK; b++) {
    for (int i = 0; i < 4; i++) {
      int code = (codes[b] >> 2 * i & 3) | (high[b / 2] >> (b % 2 * 4 + i) & 1) << 2;
      to[(size_t)(i * CHUNK + b) / STEP * TILE * STEP + b % STEP] = (uint8_t)(numbers[code] + 128 - TILE_LOWERED(8));
    }
  }
}

static void unpack_tile(const Matrix *w, int first, int count, Panel panel) {
  const Shape *s = w->shape;
  uint8_t *to = panel.codes;
  for (int c = 0; c < s->chunks; c++, to += (size_t)chunk_width(s) * TILE) { /* a chunk of all rows stays in the first cache */
    for (int row = 0; row < TILE; row++) {
      uint8_t some[CHUNK] = {0}, highest[CHUNK / 2] = {0};
      int bytes = row < count ? s->plane_bytes - c * CHUNK : 0;
      const uint8_t *line = w->codes + (size_t)(first + row) * s->row_bytes + (size_t)c * CHUNK;
      if (bytes < CHUNK) memcpy(some, line, (size_t)bytes), line = some; /* rows and places that are not there are zeros */
      if (s->bits == 4 && !s->grid) unpack_line(line, 4, NULL, to + row * STEP);
      if (s->bits == 8) unpack_line(line, 8, NULL, to + row * STEP);
      if (s->bits == 4 && s->grid) unpack_line(line, 4, w->numbers, to + row * STEP);
      if (s->bits == 3) {
        const uint8_t *high = w->codes + (size_t)(first + row) * s->row_bytes + s->plane_bytes + (size_t)c * CHUNK / 2;
        if (bytes) memcpy(highest, high, (size_t)(bytes < CHUNK ? bytes / 2 : CHUNK / 2));
        unpack_two_planes(line, highest, w->numbers, to + row * STEP);
      }
    }
  }
  for (int row = 0; row < TILE; row++) {
    for (int g = 0; g < s->groups; g++) {
      size_t at = (size_t)g * TILE + row;
      int point = s->grid ? 128 - TILE_LOWERED(8) : row < count ? zero_point(w, first + row, g) - TILE_LOWERED(s->bits) : 0;
      panel.scales[at] = row < count ? scale_of(w, (size_t)(first + row) * s->groups + g) : 0;
      panel.zeros[at] = panel.scales[at] * (float)point;
    }
  }
}
#endif

#endif
