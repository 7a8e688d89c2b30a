// Which tokens each query attends to: scores of every earlier token by index keys, and the greatest of them.
//
// Keys lie as products want them, with tokens as columns, so that lanes are tokens: a score is the same sum wherever its
// key lies, and equal keys have equal scores. The greatest are found by counting bits from the top, without sorting.
// Source: DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 2.1.
#pragma once

#include <cfloat>
#include <cmath>

#include "choice_types.h"
#include "elementwise.h"
#include "pool.h"
#include "tile.h"

namespace anychip {

constexpr int64_t kScoreBytes = 64 << 20;  // of scores that are held at once, about
constexpr int64_t kKeysAtOnce = 1024;      // of an item

// Every token's key at its slot.
template <class T>
void write_index(const ChoiceCall& call) {
  const IndexLayer& l = call.layer;
  static Scratch store;
  T* key = store.get<T>(l.padded_dim());
  key[l.padded_dim() - 1] = T{};
  for (int64_t token = 0; token < call.step.tokens(); ++token) {
    const int64_t slot = call.step.slots[token];
    if (slot < 0) continue;
    std::copy_n(call.in.keys.at<T>(token), l.dim, key);
    rotate(l.rotation, key, call.step.positions[token]);
    T* page = (T*)call.cache + slot / l.block_size * l.block_size * l.padded_dim();
    const int64_t column = slot % l.block_size;
    for (int64_t d = 0; d < l.padded_dim(); ++d) {
      if (sizeof(T) == 2) page[(d / 2 * l.block_size + column) * 2 + d % 2] = key[d];
      else page[d * l.block_size + column] = key[d];
    }
  }
}

// Scores of a page's W tokens from `column` on.
template <class V, class T>
ANYCHIP_INLINE typename V::F page_scores(const IndexLayer& l, const Left<V, T>* queries, const float* weights,
                                         const T* page, int64_t column) {
  using F = typename V::F;
  constexpr int kHeads = 8;
  const T* strip[1] = {page + column * (sizeof(T) == 2 ? 2 : 1)};
  F score = V::zero();
  for (int64_t head = 0; head < l.heads; head += kHeads)
    with_constant<kHeads>(int(std::min<int64_t>(kHeads, l.heads - head)), [&](auto m) {
      F acc[m][1];
      clear<V, m, 1>(acc);
      multiply<V, m, 1, T, false>(acc, queries + head * l.padded_dim(), l.padded_dim(), 2, strip, l.block_size,
                                  l.padded_dim() / 2);
      // The greater of zero and no number is no number in this order.
      for (int i = 0; i < m; ++i) score = V::fma(V::set1(weights[head + i]), V::max(V::zero(), acc[i][0]), score);
    });
  return score;
}

// Scores of tokens [begin, end) of a row.
template <class V, class T>
void score_keys(const ChoiceCall& call, int64_t token, int64_t row, int64_t begin, int64_t end, float* scores) {
  const IndexLayer& l = call.layer;
  static thread_local Scratch store, turned_store;
  auto* queries = store.get<Left<V, T>>(l.heads * l.padded_dim());
  T* turned = turned_store.get<T>(l.padded_dim());
  turned[l.padded_dim() - 1] = T{};
  for (int64_t head = 0; head < l.heads; ++head) {
    std::copy_n(call.in.queries.at<T>(token, head), l.dim, turned);
    rotate(l.rotation, turned, call.step.positions[token]);
    for (int64_t d = 0; d < l.padded_dim(); ++d) from_float(to_float(turned[d]), queries + head * l.padded_dim() + d);
  }
  const int32_t* table = call.step.block_table + row * call.step.table_stride;
  for (int64_t key = begin; key < end; key += V::W) {
    const T* page = (const T*)call.cache + table[key / l.block_size] * l.block_size * l.padded_dim();
    V::store(scores + key, page_scores<V, T>(l, queries, call.in.weights + token * call.in.ldw, page, key % l.block_size));
  }
}

// A score as an integer in the same order; what is no number, or infinite, counts as the nearest number.
inline uint32_t in_order(float score) {
  const float kept = std::isnan(score) ? -FLT_MAX : std::min(FLT_MAX, std::max(-FLT_MAX, score)) + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &kept, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Positions of the `top_k` greatest of more scores, ascending; of equal ones the lower positions.
inline void pick(float* scores, int64_t count, int64_t top_k, int32_t* chosen) {
  uint32_t* keys = (uint32_t*)scores;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = in_order(scores[i]);
    std::memcpy(keys + i, &key, 4);
  }
  uint32_t found = 0, known = 0;  // the bits of the least that is chosen, as far as they are known
  int64_t left = top_k;           // of those that begin with these bits
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < count; ++i)
      if ((keys[i] & known) == found) ++counts[keys[i] >> shift & 255];
    int digit = 255;
    while (counts[digit] < left) left -= counts[digit--];
    found |= uint32_t(digit) << shift, known |= 255u << shift;
  }
  for (int64_t i = 0; i < count; ++i)
    if (keys[i] > found || (keys[i] == found && left-- > 0)) *chosen++ = int32_t(i);
}

template <class V, class T>
void choose_typed(const ChoiceCall& call) {
  const LatentStep& step = call.step;
  const int64_t tokens = step.tokens(), top_k = call.layer.top_k;
  write_index<T>(call);
  int64_t longest = 1;
  for (int64_t row = 0; row < step.rows; ++row) longest = std::max<int64_t>(longest, step.seq_lens[row]);
  const int64_t width = round_up<int64_t>(longest, V::W), parts = cdiv(width, kKeysAtOnce);
  const int64_t at_once = std::max<int64_t>(1, kScoreBytes / (4 * width));
  static Scratch store;
  float* scores = store.get<float>(size_t(std::min(at_once, tokens) * width));
  for (int64_t first = 0; first < tokens; first += at_once) {
    const int64_t count = std::min(at_once, tokens - first);
    parallel_for(count * parts, 1, [&](int64_t i, int64_t stop) {
      for (; i < stop; ++i) {
        const int64_t token = first + i / parts, row = step.row_of(token), end = step.end(token, row);
        const int64_t begin = i % parts * kKeysAtOnce;
        if (end <= top_k || begin >= end) continue;  // all are chosen
        score_keys<V, T>(call, token, row, begin, std::min(end, begin + kKeysAtOnce), scores + i / parts * width);
      }
    });
    parallel_for(count, 1, [&](int64_t i, int64_t stop) {
      for (; i < stop; ++i) {
        const int64_t token = first + i, end = step.end(token, step.row_of(token));
        int32_t* chosen = call.chosen + token * top_k;
        if (end > top_k) {
          pick(scores + i * width, end, top_k, chosen);
          continue;
        }
        for (int64_t at = 0; at < top_k; ++at) chosen[at] = at < end ? int32_t(at) : -1;
      }
    });
  }
  std::fill(call.chosen + tokens * top_k, call.chosen + step.room * top_k, -1);
}

template <class V>
void choose(const ChoiceCall& call) {
  if (DType(call.layer.type) == DType::bf16) choose_typed<V, bf16>(call); else choose_typed<V, float>(call);
}

}  // namespace anychip
