/* Registers the operators of domain `moec` with ONNX Runtime, and chooses the kernels for the processor. */
#include "host.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

/* Return whether processor and system have AVX-512 F, DQ, BW, VL and VNNI. (The compilers' own question for it needs a
   runtime library that not every one of them links.) */
static int has_avx512(void) {
  unsigned a, b, c, d, low, high;
  enum { OSXSAVE = 1 << 27, STATE = 0xe6 /* the system keeps vector and mask registers */ };
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & STATE) != STATE || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  return (b & wanted) == wanted && c & 1u << 11;
}
#endif

const InstructionSet *choose_kernels(void) {
  const char *asked = getenv("MOEC_CPU_KERNELS"); /* for tests: plain ones, or ONNX Runtime's own */
  if (asked) return strcmp(asked, plain_kernels.name) ? NULL : &plain_kernels;
#if defined(__x86_64__) || defined(_M_X64)
  if (has_avx512()) return &avx512_kernels;
#endif
  return NULL; /* plain ones are slower than ONNX Runtime's operators, which the model's functions call */
}

/* Return the name of the kernels that run here, or NULL. */
EXPORT const char *moec_kernels(void) {
  const InstructionSet *set = choose_kernels();
  return set ? set->name : NULL;
}

static const char *provider(const OrtCustomOp *op) { return (void)op, (const char *)NULL; /* the CPU's */ }
static int float_output(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_FLOAT; }
static size_t one_output(const OrtCustomOp *op) { return (void)op, 1; }
static int required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }
static int default_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

static OrtCustomOp completed(const OrtCustomOp *op) {
  OrtCustomOp all = *op;
  all.version = ORT_VERSION;
  all.get_provider = provider;
  all.get_output_type = float_output;
  all.get_output_count = one_output;
  all.get_output_kind = required;
  all.get_input_memory = default_memory;
  all.variadic_input_arity = all.variadic_input_equal = one;
  all.variadic_output_arity = all.variadic_output_equal = one;
  all.get_start_version = one;
  all.get_end_version = any_version;
  all.destroy = free;
  return all;
}

/* The operators outlive every session that uses them, so they are made once and kept. */
static OrtStatus *make_domain(OrtApi api, OrtDomain **out) {
  static OrtCustomOp ops[2];
  static _Atomic(OrtDomain *) made;
  static atomic_flag making = ATOMIC_FLAG_INIT;
  OrtStatus *status = NULL;
  while (atomic_flag_test_and_set(&making)) {
  }
  if (!atomic_load(&made)) {
    OrtDomain *domain;
    ops[0] = completed(&linear_op), ops[1] = completed(&experts_op);
    status = ORT(api, create_domain)("moec", &domain);
    for (int i = 0; i < 2 && !status; i++) status = ORT(api, domain_add)(domain, &ops[i]);
    if (!status) atomic_store(&made, domain);
  }
  atomic_flag_clear(&making);
  *out = atomic_load(&made);
  return status;
}

EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  OrtApi api = base->get_api(ORT_VERSION);
  OrtDomain *domain;
  if (!api || !choose_kernels()) return NULL; /* an ONNX Runtime before 1.17: then the model's functions run too */
  OrtStatus *status = make_domain(api, &domain);
  return status ? status : ORT(api, add_domain)(options, domain);
}
