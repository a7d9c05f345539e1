/* Attention for x86-64 with AVX2, FMA and F16C. */
#if defined(__x86_64__) || defined(_M_X64)
#include "attend.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LANES 8
#include "attend_rows.h"

const AttentionKernels avx2_attention = {"avx2", attend, store_row};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
