// What attention is told, as Python packs it: every field is eight bytes wide. Keep in step with
// anychip_cpu/paged_attention.py.
#pragma once

#include "types.h"

namespace anychip {

// One layer's cache, [blocks] pages of keys then values, head by head. bf16:
//   keys   [kv heads][padded dim / 2][block size][2]     tokens are columns, dimensions come in pairs
//   values [kv heads][block size / 2][padded dim][2]     dimensions are columns, tokens come in pairs
// Other types: keys [kv heads][padded dim][block size], values [kv heads][block size][padded dim].
struct Layer {
  int64_t heads, kv_heads, dim, padded_dim, block_size;
  int64_t type, kv_type;  // DType of queries, and of the cache
  int64_t window;         // 0: none
  double scale, softcap;  // softcap 0: none
  const float *k_scale, *v_scale;  // [1] or [kv heads], or null
  int64_t scale_per_head;
  const float *sinks, *slopes;  // [heads], or null
  const float *cos, *sin;       // [positions, rotary dim / 2], or null
  int64_t rotary_dim, interleaved;
  const void *q_norm, *k_norm;  // [dim] of `type`, or null
  double norm_eps;
  int64_t norm_unit_offset;

  int64_t group() const { return heads / kv_heads; }
};

// One step, for all layers of a KV group. It is rewritten from step to step where it lies.
struct Batch {
  const int32_t *query_start, *seq_lens, *block_table;  // [rows + 1], [rows], [rows, table_stride]
  const int64_t* slots;                                 // [room]
  const int32_t* positions;                             // [room]
  int64_t rows, room, table_stride;
  int64_t tokens;  // of rows: the first ones; behind them is padding, up to `room`
  const struct AttentionItem* items;
  int64_t num_items;
  const struct AttentionMerge* merges;
  int64_t num_merges;
};

// Queries [query_begin, query_end) of a row, for one KV head, over keys [key_begin, key_end).
struct AttentionItem {
  int32_t row, head, query_begin, query_end, key_begin, key_end;
  int32_t partial;  // where the sums of a split go; -1: straight to the output
  int32_t unused;
};

// Splits of one item, to be added up.
struct AttentionMerge {
  int32_t row, head, query_begin, query_end, partial, count;
};

struct AttentionCall {
  Layer layer;
  const Batch& batch;
  const void *q, *k, *v;  // [tokens, heads or kv heads, dim], rows ld apart; k and v null: the cache is only read
  int64_t ldq, ldk, ldv;
  char* cache;
  void* out;   // [tokens, heads, dim]
  float* lse;  // [tokens, heads], or null: the logarithm of each softmax's sum, and -inf where nothing was seen
};

}  // namespace anychip
