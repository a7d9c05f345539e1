/* Attention for processors without one of the instruction sets. */
#include "attend.h"

#include <math.h>
#include <string.h>

#define LANES 4
#include "attend_rows.h"

const AttentionKernels plain_attention = {"plain", attend, store_row};
