// What latent attention is told, as Python packs it: every field is eight bytes wide. Keep in step with
// anychip_cpu/latent_kernel.py.
#pragma once

#include "types.h"

namespace anychip {

// One layer's cache is [blocks][block size][row dim] of `type`: latent values, then the rotated ones. Its factors are
// k_up [heads, nope_dim, latent_dim] and v_up [heads, v_dim, latent_dim].
struct LatentLayer {
  int64_t heads, latent_dim, row_dim, nope_dim, v_dim, block_size;
  int64_t type;    // DType of queries, factors, cache and output
  int64_t window;  // 0: none
  double scale;
  const void *k_up, *v_up;
};

// Queries that attend by themselves: each is a token of a row, and sees the row's first `ends` tokens.
struct LatentStep {
  const int32_t *tokens, *rows, *ends;  // [queries]
  int64_t queries;
  const int32_t* block_table;  // [rows, table_stride]
  int64_t table_stride;
};

struct LatentCall {
  const LatentLayer& layer;
  const LatentStep& step;
  const void* q_nope;  // [tokens, heads, nope_dim], tokens and heads so far apart
  int64_t token_stride, head_stride;
  const void *q_rope, *cache;  // q_rope [tokens, heads, rope_dim]
  void* out;                   // [tokens, heads, v_dim]
};

}  // namespace anychip
