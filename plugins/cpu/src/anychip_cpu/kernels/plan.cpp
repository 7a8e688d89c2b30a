#include "plan.h"

#include <algorithm>
#include <cstring>

namespace anychip {
namespace {

constexpr int64_t kItemRows = 48;    // queries times heads of an item, about
constexpr int64_t kSplitKeys = 256;  // of a split, at least

}  // namespace

Plan plan_attention(const int32_t* query_start, const int32_t* seq_lens, int64_t rows, int64_t kv_heads, int64_t group,
                    int64_t window, int64_t threads) {
  Plan plan;
  const int64_t at_once = std::max<int64_t>(1, kItemRows / group);
  int64_t singles = 0;
  for (int64_t r = 0; r < rows; ++r) singles += cdiv<int64_t>(query_start[r + 1] - query_start[r], at_once);
  const int64_t wanted = threads > 1 ? cdiv(4 * threads, std::max<int64_t>(1, singles * kv_heads)) : 1;
  int32_t partials = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t queries = query_start[r + 1] - query_start[r], before = seq_lens[r] - queries;
    for (int64_t begin = 0; begin < queries; begin += at_once) {
      const int64_t end = std::min(queries, begin + at_once), last = before + end;
      const int64_t first = window ? std::max<int64_t>(0, before + begin + 1 - window) : 0;
      const int64_t splits = queries == 1 ? std::max<int64_t>(1, std::min(wanted, (last - first) / kSplitKeys)) : 1;
      for (int64_t head = 0; head < kv_heads; ++head) {
        AttentionItem item{int32_t(r), int32_t(head), int32_t(begin), int32_t(end), int32_t(first), int32_t(last), -1, 0};
        if (splits == 1) {
          plan.items.push_back(item);
          continue;
        }
        plan.merges.push_back({item.row, item.head, item.query_begin, item.query_end, partials, int32_t(splits)});
        for (int64_t s = 0; s < splits; ++s) {
          item.key_begin = int32_t(first + (last - first) * s / splits);
          item.key_end = int32_t(first + (last - first) * (s + 1) / splits);
          item.partial = partials++;
          plan.items.push_back(item);
        }
      }
    }
  }
  const auto cost = [](const AttentionItem& i) { return int64_t(i.key_end - i.key_begin) * (i.query_end - i.query_begin); };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
  return plan;
}

void StepPlan::renew(int64_t threads) {
  batch.tokens = batch.query_start[batch.rows];
  plan_ = plan_attention(batch.query_start, batch.seq_lens, batch.rows, kv_heads_, group_, window_, threads);
  batch.items = plan_.items.data(), batch.num_items = int64_t(plan_.items.size());
  batch.merges = plan_.merges.data(), batch.num_merges = int64_t(plan_.merges.size());
}

void clear_padding(const AttentionCall& call) {
  const Layer& l = call.layer;
  const int64_t row = l.heads * l.dim * (DType(l.type) == DType::bf16 ? 2 : 4);
  std::memset((char*)call.out + call.batch.tokens * row, 0, (call.batch.room - call.batch.tokens) * row);
}

}  // namespace anychip
