/* Chooses the kernels for the processor that this runs on. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

/* Return whether the system keeps the registers of `state`. */
static int keeps_registers(unsigned state) {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return 0; /* xgetbv */
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

/* Return the bits of leaf 7: the compilers' own question for them needs a runtime library that not all of them link. */
static void read_features(unsigned *b, unsigned *c) {
  unsigned a, d;
  if (!__get_cpuid_count(7, 0, &a, b, c, &d)) *b = *c = 0;
}

static int has_avx512(void) {
  unsigned b, c, wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL; VNNI */
  read_features(&b, &c);
  return keeps_registers(0xe6) && (b & wanted) == wanted && c & 1u << 11;
}

static int has_avx2(void) {
  unsigned a, b, c, d, features;
  read_features(&features, &c);
  if (!(features & 1u << 5) || !keeps_registers(6)) return 0;
  return __get_cpuid(1, &a, &b, &c, &d) && c & 1u << 12; /* FMA */
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
#elif defined(__aarch64__)
static int has_dotprod(void) { return 1; } /* every processor of Apple's, and those that Windows takes */
#endif

static int always(void) { return 1; }

static const struct {
  const InstructionSet *set;
  int (*found)(void);
} sets[] = {
#if defined(__x86_64__) || defined(_M_X64)
    {&avx512_kernels, has_avx512}, {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon_kernels, has_dotprod},
#endif
    {&plain_kernels, always}};

const InstructionSet *kernels_found(int index) {
  for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
    if (sets[i].found() && !index--) return sets[i].set;
  }
  return NULL;
}

const InstructionSet *choose_kernels(void) {
  const char *asked = getenv("MOEC_CPU_KERNELS"); /* for tests: a set by name; another word for ONNX Runtime's operators */
  const InstructionSet *set;
  for (int i = 0; (set = kernels_found(i)); i++) {
    if (asked && strcmp(asked, set->name)) continue;
    /* plain ones are slower than ONNX Runtime's operators, which the model's functions call */
    return asked || set != &plain_kernels ? set : NULL;
  }
  return NULL;
}
