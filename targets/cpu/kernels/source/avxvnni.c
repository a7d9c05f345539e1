/* Many rows of activations on x86-64 with AVX-VNNI: dot products of bytes in vectors of 256 bits, without AVX-512. */
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

/* For a test on a processor that has the same instruction as a part of AVX-512 only. */
#if defined(MOEC_TEST_WITH_AVX512)
#define TARGET "avx2,fma,avx512vl,avx512vnni"
#define DOT_PRODUCTS _mm256_dpbusd_epi32
#else
#define TARGET "avx2,fma,avxvnni"
#define DOT_PRODUCTS _mm256_dpbusd_avx_epi32
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(TARGET))), apply_to = function)
#else
#define PRAGMA(text) _Pragma(#text)
#define USE_TARGET(names) PRAGMA(GCC target(names))
USE_TARGET(TARGET)
#endif

#define INLINE static inline __attribute__((always_inline))
#define STEP 4
#define TILE_LOWERED(bits) 0
#include <stdint.h>
typedef uint32_t Word;

INLINE __m256i add_steps(int bits, __m256i sum, __m256i a, __m256i x, __m256i b, __m256i y) {
  (void)bits;
  return DOT_PRODUCTS(DOT_PRODUCTS(sum, a, x), b, y);
}

#include "tiles256.h"

const Tiles avxvnni_tiles = {"avx-vnni", 12, multiply_tile};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
