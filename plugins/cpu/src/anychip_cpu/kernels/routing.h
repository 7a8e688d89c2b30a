// Picks experts: scores, the best of them, their weights.
#pragma once

#include "types.h"

namespace anychip {

struct Route {
  DType type;
  const void* logits;  // [tokens, experts], rows ld apart
  const float* bias;   // [experts], added for picking alone, or null
  int64_t tokens, experts, ld, top_k;
  bool sigmoid, renormalize;  // scores by sigmoid; softmax otherwise
  float scale;
  float* weights;  // [tokens, top_k]
  int64_t* ids;
};

void route(const Route& a);

}  // namespace anychip
