// What a choice by index keys is told, as Python packs it: every field is eight bytes wide. Keep in step with
// anychip_cpu/sparse_kernel.py.
#pragma once

#include "latent_types.h"

namespace anychip {

// One layer's index keys, [blocks] pages. bf16: [padded dim / 2][block size][2], tokens are columns and values come in
// pairs; float32: [padded dim][block size].
struct IndexLayer {
  int64_t heads, dim, block_size, top_k;
  int64_t type;  // DType of queries, keys and cache
  Rotation rotation;

  int64_t padded_dim() const { return dim + dim % 2; }
};

struct IndexInputs {
  LatentInput queries, keys;  // [tokens, heads, dim], [tokens, dim], both to be rotated
  const float* weights;       // [tokens, heads], tokens so far apart
  int64_t ldw;
};

struct ChoiceCall {
  IndexLayer layer;
  LatentStep step;
  IndexInputs in;
  void* cache;
  int32_t* chosen;  // [room, top_k]
};

void choose(const ChoiceCall& call);

}  // namespace anychip
