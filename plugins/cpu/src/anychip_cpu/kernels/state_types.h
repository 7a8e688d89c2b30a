// What kernels of state layers are told, as Python packs it: every field is eight bytes wide. Keep in step with
// anychip_cpu/states.py.
#pragma once

#include "types.h"

namespace anychip {

// A step's rows. Row r owns the tokens query_start[r] to query_start[r + 1]. It is fresh where seq_lens[r] is their count:
// its state begins as zeros then, whatever its block holds.
struct StateStep {
  const int32_t *query_start, *seq_lens, *blocks;
  int64_t rows;
  int64_t room;  // tokens that arrays have room for: those past the last row's are padding

  int64_t count(int64_t row) const { return query_start[row + 1] - query_start[row]; }
  bool fresh(int64_t row) const { return seq_lens[row] == count(row); }
};

// An input [tokens, heads, values]: values lie together, tokens and heads so far apart.
struct StateInput {
  const void* data;
  int64_t token, head;

  template <class T>
  const T* at(int64_t t, int64_t h) const {
    return (const T*)data + t * token + h * head;
  }
};

// Recurrences over a matrix by head, S = decay S + key written^T, and the output is query S. What is written is a value, or
// the rest of a value that the key does not read from S yet.
enum class Recurrence : int64_t { gated_delta = 0, kda = 1, lightning = 2, ssd = 3 };

struct MatrixRule {
  Recurrence kind;
  int64_t type;  // DType of queries, keys, values and output
  int64_t heads, groups;  // neighbouring heads share the query and key of a group
  int64_t key_dim, value_dim;
  const float *by_head, *skip;  // [heads]: slopes of lightning; a and d of ssd
};

struct MatrixInputs {
  StateInput q, k, v;
  StateInput g;     // float32: decays of the delta rules, by head or by key; dt of ssd
  StateInput beta;  // float32, of the delta rules
};

struct MatrixCall {
  MatrixRule rule;
  StateStep step;
  MatrixInputs in;
  float* states;  // [blocks, heads, key_dim, value_dim]
  void* out;      // [room, heads, value_dim]
};

struct ConvolutionCall {
  StateStep step;
  int64_t type;  // DType of all
  int64_t channels, width;
  const void *weight, *bias;  // [channels, width], [channels] or null
  const void* x;              // [tokens, channels], tokens so far apart
  int64_t ldx;
  void* tails;  // [blocks, width - 1, channels]: the last inputs, the oldest first
  void* out;    // [room, channels]
};

constexpr int kMostConvolved = 4;  // tokens that an output looks at

struct ScanCall {
  StateStep step;
  int64_t type;  // DType of x, b, c and out
  int64_t channels, state_dim;
  const float *a, *d;  // [channels, state_dim], [channels]
  const void* x;
  int64_t ldx;
  const float* dt;
  int64_t lddt;
  const void* b;
  int64_t ldb;
  const void* c;
  int64_t ldc;
  float* states;  // [blocks, channels, state_dim]
  void* out;      // [room, channels]
};

}  // namespace anychip
