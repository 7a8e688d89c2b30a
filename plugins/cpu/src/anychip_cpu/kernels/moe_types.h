// What a mixture of experts is told.
#pragma once

#include "weights.h"

namespace anychip {

// Every field is eight bytes wide. Keep in step with anychip_cpu/experts.py.
struct Experts {
  PackedWeights gate_up, down;  // the first expert's
  int64_t experts, hidden, intermediate;
  int64_t gate_up_stride, down_stride;              // bytes of panels from one expert to the next
  int64_t gate_up_scale_stride, down_scale_stride;  // bytes of scales and of zeros
  int64_t gate_up_super_stride, down_super_stride;  // elements of what multiplies those
  const float *gate_up_bias, *down_bias;            // [experts, padded outputs] in the panels' order, or null
  int64_t activation;
};

struct Moe {
  Experts e;
  DType type;      // of x and out
  const void* x;   // [tokens, hidden], rows ldx apart
  void* out;       // [tokens, hidden]
  const int64_t* ids;    // [tokens, top_k]; -1: nobody here
  const float* weights;  // [tokens, top_k]
  int64_t tokens, top_k, ldx;
};

}  // namespace anychip
