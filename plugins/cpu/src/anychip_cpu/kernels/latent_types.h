// What latent attention is told, as Python packs it: every field is eight bytes wide. Keep in step with
// anychip_cpu/latent_kernel.py.
#pragma once

#include <algorithm>

#include "rotation.h"
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
  int64_t most;  // rows of more queries are left to the caller; they are written nevertheless
  Rotation rotation;
};

// A step's rows, in arrays that later steps are put into.
struct LatentStep {
  const int32_t *query_start, *seq_lens, *block_table;  // [rows + 1], [rows], [rows, table_stride]
  const int64_t* slots;                                 // [room]
  const int32_t* positions;                             // [room]
  int64_t rows, table_stride;
  int64_t room;  // tokens that arrays have room for: those past the last row's are padding

  int64_t tokens() const { return query_start[rows]; }
  // The row of a token.
  int64_t row_of(int64_t token) const {
    return std::upper_bound(query_start, query_start + rows + 1, int32_t(token)) - query_start - 1;
  }
  int64_t queries(int64_t row) const { return query_start[row + 1] - query_start[row]; }
  // How many of its row's tokens a token sees.
  int64_t end(int64_t token, int64_t row) const { return seq_lens[row] - query_start[row + 1] + token + 1; }
};

// Vectors of T [tokens, heads, values]: values lie together, tokens and heads so far apart.
struct LatentInput {
  const void* data;
  int64_t token, head;

  template <class T>
  const T* at(int64_t t, int64_t h = 0) const {
    return (const T*)data + t * token + h * head;
  }
};

struct LatentInputs {
  LatentInput q_nope, q_rope;  // [tokens, heads, nope_dim], [tokens, heads, rope dim] to be rotated
  LatentInput latent, k_rope;  // [tokens, latent_dim], [tokens, rope dim] to be rotated
  const int32_t* chosen;       // [room, top_k] positions, ascending, -1 behind them; null: queries attend to all
  int64_t top_k;
};

struct LatentCall {
  LatentLayer layer;
  LatentStep step;
  LatentInputs in;
  void *cache, *out;  // out [room, heads, v_dim]
};

}  // namespace anychip
