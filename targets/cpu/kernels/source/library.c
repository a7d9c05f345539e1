/* Registers the operators of domain `moec` with ONNX Runtime. */
#include "attend.h"

#include <stdatomic.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Return the name of the kernels that run here, or NULL. */
EXPORT const char *moec_kernels(void) {
  const InstructionSet *set = choose_kernels();
  return set ? set->name : NULL;
}

/* Return the name of the kernels that could run here, the fastest first; NULL after the last. */
EXPORT const char *moec_kernels_found(int index) {
  const InstructionSet *set = kernels_found(index);
  return set ? set->name : NULL;
}

/* Writes what the splits of work follow from, and what they are: see describe_processor in processor.py. */
EXPORT void moec_profile(int64_t out[8]) {
  const Processor *processor = this_processor();
  const InstructionSet *set = choose_kernels();
  int from = set && set->tile_from != NEVER ? set->tile_from : 0;
  const int64_t found[8] = {processor->count, processor->caches[0], processor->caches[1], processor->caches[2],
                            from, TILE, processor->caches[1] / 4, TASKS_EACH};
  for (int i = 0; i < 8; i++) out[i] = found[i];
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
  if (!all.get_output_type) all.get_output_type = float_output;
  if (!all.get_output_count) all.get_output_count = one_output;
  all.get_output_kind = required;
  all.get_input_memory = default_memory;
  all.variadic_input_arity = all.variadic_input_equal = one;
  all.variadic_output_arity = all.variadic_output_equal = one;
  all.get_start_version = one;
  all.get_end_version = any_version;
  return all;
}

/* The operators outlive every session that uses them, so they are made once and kept. */
static OrtStatus *make_domain(OrtApi api, OrtDomain **out) {
  static const OrtCustomOp *const kinds[] = {&linear_op,       &experts_op,       &grid_linear_op,    &grid_experts_op,
                                             &grid3_linear_op, &grid3_experts_op, &attention_op,      &attention_f16_op,
                                             &attention_bf16_op, &attention_int8_op};
  enum { OPS = sizeof kinds / sizeof *kinds };
  static OrtCustomOp ops[OPS];
  static _Atomic(OrtDomain *) made;
  static atomic_flag making = ATOMIC_FLAG_INIT;
  OrtStatus *status = NULL;
  while (atomic_flag_test_and_set(&making)) {
  }
  if (!atomic_load(&made)) {
    OrtDomain *domain;
    status = ORT(api, create_domain)("moec", &domain);
    for (int i = 0; i < OPS && !status; i++) {
      ops[i] = completed(kinds[i]);
      status = ORT(api, domain_add)(domain, &ops[i]);
    }
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
