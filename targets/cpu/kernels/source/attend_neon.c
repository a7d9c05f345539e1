/* Attention for aarch64. */
#if defined(__aarch64__)
#include "attend.h"

#include <math.h>
#include <string.h>

#define LANES 4
#include "attend_rows.h"

const AttentionKernels neon_attention = {"neon", attend, store_row};
#endif
