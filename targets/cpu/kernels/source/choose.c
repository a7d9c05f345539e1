/* Chooses the kernels for the processor that this runs on. */
#include "kernels.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Return whether the system keeps the registers of `state`. */
static int keeps_registers(unsigned state) {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return 0; /* xgetbv */
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

/* Return the bits of leaf 7: the compilers' own question for them needs a runtime library that not all of them link. */
static void read_features(unsigned *b, unsigned *c, unsigned *d) {
  unsigned a;
  if (!__get_cpuid_count(7, 0, &a, b, c, d)) *b = *c = *d = 0;
}

static int has_avx512(void) {
  unsigned b, c, d, wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL; VNNI */
  read_features(&b, &c, &d);
  return keeps_registers(0xe6) && (b & wanted) == wanted && c & 1u << 11;
}

static int has_avx2(void) {
  unsigned a, b, c, d, features;
  read_features(&features, &c, &d);
  if (!(features & 1u << 5) || !keeps_registers(6)) return 0;
  enum { FMA = 1u << 12, F16C = 1u << 29 };
  return __get_cpuid(1, &a, &b, &c, &d) && c & FMA && c & F16C;
}

static int has_avxvnni(void) {
#if defined(MOEC_TEST_WITH_AVX512)
  return has_avx512();
#else
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
#endif
}

/* Linux gives a process the registers of AMX when it asks for them. */
static int has_amx(void) {
#if defined(MOEC_TEST_AMX)
  return has_avx512();
#elif defined(__linux__)
  enum { ASK_FOR_STATE = 0x1023, TILES_STATE = 18 };
  unsigned b, c, d, wanted = 1u << 24 | 1u << 25; /* tiles, int8 */
  read_features(&b, &c, &d);
  if ((d & wanted) != wanted || !has_avx512() || !keeps_registers(3u << 17)) return 0;
  return !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILES_STATE);
#else
  return 0;
#endif
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
static int has_i8mm(void) { return has_dotprod() && getauxval(26 /* AT_HWCAP2 */) >> 13 & 1; }
#elif defined(__aarch64__)
static int has_dotprod(void) { return 1; } /* every processor of Apple's */
#if defined(__APPLE__)
#include <sys/sysctl.h>
static int has_i8mm(void) {
  int found = 0;
  size_t size = sizeof found;
  return !sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, NULL, 0) && found;
}
#else
static int has_i8mm(void) { return 0; }
#endif
#endif

static int always(void) { return 1; }

/* The fastest first; `tiles` take the place of the set's own. */
static const struct {
  const InstructionSet *set;
  const Tiles *tiles;
  int (*found)(void);
} sets[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {&avx512_kernels, &amx_tiles, has_amx},
    {&avx512_kernels, NULL, has_avx512},
    {&avx2_kernels, &avxvnni_tiles, has_avxvnni},
    {&avx2_kernels, NULL, has_avx2},
#elif defined(__aarch64__)
    {&neon_kernels, &i8mm_tiles, has_i8mm},
    {&neon_kernels, NULL, has_dotprod},
#endif
    {&plain_kernels, NULL, always}};

const InstructionSet *kernels_found(int index) {
  static InstructionSet found[sizeof sets / sizeof *sets];
  static int count;
  static atomic_flag looking = ATOMIC_FLAG_INIT;
  while (atomic_flag_test_and_set(&looking)) {
  }
  for (size_t i = 0; i < sizeof sets / sizeof *sets && !(count && found[count - 1].name == plain_kernels.name); i++) {
    if (!sets[i].found()) continue;
    InstructionSet *set = &found[count++];
    *set = *sets[i].set;
    if (sets[i].tiles) set->name = sets[i].tiles->name, set->tile_from = sets[i].tiles->tile_from;
    if (sets[i].tiles) set->multiply_tile = sets[i].tiles->multiply_tile;
  }
  atomic_flag_clear(&looking);
  return index < count ? &found[index] : NULL;
}

const InstructionSet *choose_kernels(void) {
  const char *asked = getenv("MOEC_CPU_KERNELS"); /* for tests: a set by name; another word for ONNX Runtime's operators */
  const InstructionSet *set;
  for (int i = 0; (set = kernels_found(i)); i++) {
    if (asked && strcmp(asked, set->name)) continue;
#if defined(__x86_64__) || defined(_M_X64)
    if (!asked && set->name == amx_tiles.name) continue; /* no processor that has AMX has run it yet */
#endif
    /* plain ones are slower than ONNX Runtime's operators, which the model's functions call */
    return asked || set->name != plain_kernels.name ? set : NULL;
  }
  return NULL;
}
