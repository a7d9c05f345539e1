/* The part of ONNX Runtime's C interface that the kernels use.

   ONNX Runtime hands a library a table of functions. The table only grows, so that a function keeps its place for good:
   the places below are those of API version 17 (ONNX Runtime 1.17) and of every later one. */
#ifndef MOEC_ORT_H
#define MOEC_ORT_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 17 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

typedef const void *const *OrtApi; /* the table */
typedef struct OrtStatus OrtStatus;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape;
typedef struct OrtDomain OrtDomain;
typedef struct OrtSessionOptions OrtSessionOptions;

typedef struct {
  OrtApi (*get_api)(uint32_t version);
  const char *(*get_version)(void);
} OrtApiBase;

typedef struct OrtCustomOp {
  uint32_t version;
  void *(*create_kernel)(const struct OrtCustomOp *, OrtApi, const OrtKernelInfo *);
  const char *(*get_name)(const struct OrtCustomOp *);
  const char *(*get_provider)(const struct OrtCustomOp *);
  int (*get_input_type)(const struct OrtCustomOp *, size_t);
  size_t (*get_input_count)(const struct OrtCustomOp *);
  int (*get_output_type)(const struct OrtCustomOp *, size_t);
  size_t (*get_output_count)(const struct OrtCustomOp *);
  void (*compute)(void *, OrtKernelContext *);
  void (*destroy)(void *);
  int (*get_input_kind)(const struct OrtCustomOp *, size_t);
  int (*get_output_kind)(const struct OrtCustomOp *, size_t);
  int (*get_input_memory)(const struct OrtCustomOp *, size_t);
  int (*variadic_input_arity)(const struct OrtCustomOp *);
  int (*variadic_input_equal)(const struct OrtCustomOp *);
  int (*variadic_output_arity)(const struct OrtCustomOp *);
  int (*variadic_output_equal)(const struct OrtCustomOp *);
  OrtStatus *(*create_kernel_v2)(const struct OrtCustomOp *, OrtApi, const OrtKernelInfo *, void **);
  OrtStatus *(*compute_v2)(void *, OrtKernelContext *);
  OrtStatus *(*infer_shape)(const struct OrtCustomOp *, void *);
  int (*get_start_version)(const struct OrtCustomOp *);
  int (*get_end_version)(const struct OrtCustomOp *);
} OrtCustomOp;

#define ORT_FUNCTION(place, result, name, parameters) \
  enum { ORT_PLACE_##name = place };                  \
  typedef result(*Ort_##name) parameters;
#define ORT(api, name) ((Ort_##name)(api)[ORT_PLACE_##name])

ORT_FUNCTION(0, OrtStatus *, create_status, (int code, const char *message))
ORT_FUNCTION(26, OrtStatus *, create_domain, (const char *name, OrtDomain **out))
ORT_FUNCTION(27, OrtStatus *, domain_add, (OrtDomain *, const OrtCustomOp *))
ORT_FUNCTION(28, OrtStatus *, add_domain, (OrtSessionOptions *, OrtDomain *))
ORT_FUNCTION(51, OrtStatus *, tensor_data, (OrtValue *, void **out))
ORT_FUNCTION(61, OrtStatus *, dimension_count, (const OrtShape *, size_t *out))
ORT_FUNCTION(62, OrtStatus *, dimensions, (const OrtShape *, int64_t *out, size_t count))
ORT_FUNCTION(65, OrtStatus *, tensor_shape, (const OrtValue *, OrtShape **out))
ORT_FUNCTION(85, OrtStatus *, float_attribute, (const OrtKernelInfo *, const char *name, float *out))
ORT_FUNCTION(86, OrtStatus *, int_attribute, (const OrtKernelInfo *, const char *name, int64_t *out))
ORT_FUNCTION(87, OrtStatus *, text_attribute, (const OrtKernelInfo *, const char *name, char *out, size_t *size))
ORT_FUNCTION(88, OrtStatus *, input_count, (const OrtKernelContext *, size_t *out))
ORT_FUNCTION(90, OrtStatus *, input, (const OrtKernelContext *, size_t index, OrtValue **out))
ORT_FUNCTION(91, OrtStatus *, output, (OrtKernelContext *, size_t, const int64_t *sizes, size_t rank, OrtValue **))
ORT_FUNCTION(93, void, release_status, (OrtStatus *))
ORT_FUNCTION(99, void, release_shape, (OrtShape *))
ORT_FUNCTION(249, OrtStatus *, constant_input, (const OrtKernelInfo *, size_t, int *constant, const OrtValue **out))
ORT_FUNCTION(274, OrtStatus *, parallel_for,
             (const OrtKernelContext *, void (*task)(void *, size_t), size_t tasks, size_t batches, void *data))

#endif
