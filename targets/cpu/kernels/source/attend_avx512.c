/* Attention for x86-64 with AVX-512. */
#if defined(__x86_64__) || defined(_M_X64)
#include "attend.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define LANES 16
#include "attend_rows.h"

const AttentionKernels avx512_attention = {"avx512", attend, store_row};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
