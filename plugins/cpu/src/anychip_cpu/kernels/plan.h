// Cuts a step's attention into items that threads take one by one.
#pragma once

#include <vector>

#include "attention_types.h"

namespace anychip {

struct Plan {
  std::vector<AttentionItem> items;  // the longest first
  std::vector<AttentionMerge> merges;
};

// Rows of queries [rows + 1] and lengths [rows]; `group` query heads share one of `kv_heads`. With fewer items than
// threads would share well, single queries over many keys are split along them.
Plan plan_attention(const int32_t* query_start, const int32_t* seq_lens, int64_t rows, int64_t kv_heads, int64_t group,
                    int64_t window, int64_t threads);

// A step's plan, over arrays that later steps are put into.
class StepPlan {
 public:
  StepPlan(const Batch& arrays, int64_t kv_heads, int64_t group, int64_t window)
      : batch(arrays), kv_heads_(kv_heads), group_(group), window_(window) {}

  // For what the arrays hold now.
  void renew(int64_t threads);

  Batch batch;

 private:
  Plan plan_;
  const int64_t kv_heads_, group_, window_;
};

// The output of tokens that belong to no row becomes zeros.
void clear_padding(const AttentionCall& call);

}  // namespace anychip
