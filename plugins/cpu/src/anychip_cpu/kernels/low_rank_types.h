// What the low-rank update of adapters takes: plugin_api/adapters.py's AdapterStack, and a step's tokens.
#pragma once

#include "types.h"

namespace anychip {

struct LowRank {
  DType type;            // of x, y, down and up
  const void* x;         // [tokens, in], rows ldx apart
  void* y;               // [tokens, out], rows ldy apart
  const void* down;      // [slots, parts, max_rank, in]
  const void* up;        // [slots, max_rank, out]
  const float* scales;   // [slots, parts]
  const int32_t* ranks;  // [slots, parts]
  const int32_t* slot_of;  // [tokens]; negative: none
  const int64_t* offsets;  // [parts + 1]: columns where the parts begin, and where the last one ends
  int64_t tokens, in, out, ldx, ldy, slots, parts, max_rank;
};

}  // namespace anychip
