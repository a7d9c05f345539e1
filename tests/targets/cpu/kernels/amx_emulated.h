/* AMX's instructions in plain C, after Intel's manual (Instruction Set Extensions Programming Reference, chapter 3): registers of up to
   16 rows of 64 bytes, whose shapes a configuration sets. A wrong shape or register ends the program, where a processor would. */
#ifndef AMX_EMULATED_H
#define AMX_EMULATED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_release
#define _tile_loadconfig emulated_loadconfig
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_zero emulated_zero
#define _tile_dpbsud emulated_dpbsud
#define _tile_release emulated_release

static struct {
  int rows, bytes;
  uint8_t content[16][64];
} registers[8];

static void demand(int holds, const char *what) {
  if (!holds) printf("AMX: %s\n", what), exit(1);
}

static void emulated_loadconfig(const void *memory) {
  const uint8_t *config = memory;
  demand(config[0] == 1 && !config[1], "the palette is not 1");
  for (int i = 2; i < 16; i++) demand(!config[i], "a reserved byte is not 0");
  memset(registers, 0, sizeof registers);
  for (int i = 0; i < 8; i++) {
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * i, 2);
    registers[i].rows = config[48 + i], registers[i].bytes = bytes;
    demand(registers[i].rows <= 16 && bytes <= 64 && !registers[i].rows == !bytes, "a shape is none");
  }
  for (int i = 16 + 16; i < 48; i++) demand(!config[i], "a byte of a register that is not there is not 0");
}

static void emulated_loadd(int r, const void *memory, size_t stride) {
  demand(registers[r].rows > 0, "a register has no shape");
  memset(registers[r].content, 0, sizeof registers[r].content);
  for (int i = 0; i < registers[r].rows; i++) {
    memcpy(registers[r].content[i], (const uint8_t *)memory + (size_t)i * stride, (size_t)registers[r].bytes);
  }
}

static void emulated_stored(int r, void *memory, size_t stride) {
  demand(registers[r].rows > 0, "a register has no shape");
  for (int i = 0; i < registers[r].rows; i++) {
    memcpy((uint8_t *)memory + (size_t)i * stride, registers[r].content[i], (size_t)registers[r].bytes);
  }
}

static void emulated_zero(int r) { memset(registers[r].content, 0, sizeof registers[r].content); }
static void emulated_release(void) { memset(registers, 0, sizeof registers); }

/* sum[m][n] += signed a[m][4 k + i] * unsigned b[k][4 n + i] */
static void emulated_dpbsud(int sum, int a, int b) {
  demand(registers[sum].rows == registers[a].rows && registers[sum].bytes == registers[b].bytes, "the shapes do not fit");
  demand(registers[a].bytes == 4 * registers[b].rows, "the shapes do not fit");
  for (int m = 0; m < registers[sum].rows; m++) {
    for (int n = 0; n < registers[sum].bytes / 4; n++) {
      int32_t total;
      memcpy(&total, registers[sum].content[m] + 4 * n, 4);
      for (int k = 0; k < registers[a].bytes; k++) {
        total += (int8_t)registers[a].content[m][k] * registers[b].content[k / 4][4 * n + k % 4];
      }
      memcpy(registers[sum].content[m] + 4 * n, &total, 4);
    }
  }
}

#endif
