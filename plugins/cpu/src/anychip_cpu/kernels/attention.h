// Paged attention over ragged rows: prefill, chunks and single queries in one pass, with a running softmax.
//
// An item is some queries of one row for one KV head; the query heads that share it stand as rows of one product. Keys
// go by in tiles of kKeys. A cache's bytes may be anything where no token was written: scores of such places are
// masked, and values are only read where a query of the item sees them.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include <limits>

#include "kv_write.h"

namespace anychip {

constexpr int kKeys = 128;       // of a tile
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// out = sums / total, a sink taking its share of the total; *lse, where it is wanted, the logarithm of the total of
// whole exponentials.
template <class V, class T>
void finish(T* out, float* lse, const float* sums, float most, float total, const Layer& l, int64_t head, float factor) {
  if (l.sinks) {
    const float top = std::max(most, l.sinks[head]);
    const float shrink = most == kHidden ? 0.0f : std::exp(most - top);
    total = total * shrink + std::exp(l.sinks[head] - top);
    factor *= shrink;
    most = top;
  }
  if (lse) *lse = total > 0 ? most + std::log(total) : kHidden;
  const auto scale = V::set1(total > 0 ? factor / total : 0.0f);
  each_vector<V>(l.dim, [&](int64_t i, auto n) { store<V>(out + i, V::mul(V::load(sums + i), scale), n); });
}

template <class V, class T, class B>
class Item {
  using F = typename V::F;
  using L = Left<V, B>;

 public:
  Item(const AttentionCall& call, const AttentionItem& item, const T* q, int64_t ldq)
      : call_(call), l_(call.layer), item_(item) {
    group_ = l_.group();
    rows_ = (item.query_end - item.query_begin) * group_;
    first_token_ = call.batch.query_start[item.row] + item.query_begin;
    const int64_t queries = call.batch.query_start[item.row + 1] - call.batch.query_start[item.row];
    first_position_ = call.batch.seq_lens[item.row] - queries + item.query_begin;
    table_ = call.batch.block_table + item.row * call.batch.table_stride;
    page_ = 2 * l_.kv_heads * l_.padded_dim * l_.block_size;
    static thread_local Scratch query_store, score_store, weight_store, sum_store, row_store, edge_store;
    queries_ = query_store.get<L>(rows_ * round_up<int64_t>(l_.dim, 2));
    scores_ = score_store.get<float>(rows_ * kKeys);
    weights_ = std::is_same_v<L, float> ? (L*)scores_ : weight_store.get<L>(rows_ * kKeys);
    sums_ = sum_store.get<float>(rows_ * l_.padded_dim);
    most_ = row_store.get<float>(3 * rows_), total_ = most_ + rows_, shrink_ = total_ + rows_;
    edge_ = edge_store.get<B>(2 * 2 * l_.padded_dim);
    pack_queries(q, ldq);
  }

  void run() {
    std::fill(most_, most_ + rows_, kHidden);
    std::fill(total_, total_ + rows_, 0.0f);
    std::fill(sums_, sums_ + rows_ * l_.padded_dim, 0.0f);
    for (int64_t key = item_.key_begin / 16 * 16; key < item_.key_end; key += kKeys) {
      score(key);
      for (int64_t m = 0; m < rows_; ++m) soften(m, key);
      weigh(key);
    }
    if (item_.partial < 0) write(); else keep();
  }

 private:
  int64_t tiles() const { return cdiv<int64_t>(rows_, V::MR); }
  int64_t first(int64_t tile) const { return rows_ * tile / tiles(); }
  int64_t position(int64_t m) const { return first_position_ + m / group_; }
  const B* page(int64_t token) const { return (const B*)call_.cache + table_[token / l_.block_size] * page_; }

  void pack_queries(const T* q, int64_t ldq) {
    const int64_t dims = round_up<int64_t>(l_.dim, 2);
    for (int64_t t = 0; t < tiles(); ++t) {
      const int64_t begin = first(t), count = first(t + 1) - begin;
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = begin + m;
        const T* from = q + (first_token_ + row / group_) * ldq + (item_.head * group_ + row % group_) * l_.dim;
        L* to = queries_ + begin * dims + 2 * m;
        for (int64_t d = 0; d < dims; ++d) from_float(d < l_.dim ? to_float(from[d]) : 0.0f, &to[d / 2 * 2 * count + d % 2]);
      }
    }
  }

  // Products of queries with keys [key, key + kKeys).
  void score(int64_t key) {
    constexpr int N = V::NV, W = V::W;
    const int64_t dims = round_up<int64_t>(l_.dim, 2), end = std::min<int64_t>(item_.key_end, key + kKeys);
    for (int64_t token = key; token < end; token += N * W) {
      const B* strips[N];
      for (int n = 0; n < N; ++n) {
        const int64_t at = std::min(token + n * W, (end - 1) / W * W);  // past the end: any page that there is
        strips[n] = page(at) + key_place<B>(l_, item_.head, at % l_.block_size, 0);
      }
      for (int64_t t = 0; t < tiles(); ++t)
        with_constant<V::MR>(int(first(t + 1) - first(t)), [&](auto m) {
          F acc[m][N];
          clear<V, m, N>(acc);
          multiply<V, m, N, B, false>(acc, queries_ + first(t) * dims, 2, 2 * m, strips, l_.block_size, dims / 2);
          float* out = scores_ + first(t) * kKeys + (token - key);
          for (int i = 0; i < m; ++i)
            for (int n = 0; n < N; ++n) V::store(out + i * kKeys + n * W, acc[i][n]);
        });
    }
  }

  // A row's scores become weights, relative to the greatest score so far.
  void soften(int64_t m, int64_t key) {
    const int64_t query = position(m);
    const int64_t width = std::min<int64_t>(kKeys, round_up<int64_t>(item_.key_end - key, V::NV * V::W));
    const int64_t last = std::min<int64_t>(query + 1, item_.key_end) - key;
    const int64_t since = std::max<int64_t>(l_.window ? query + 1 - l_.window : 0, item_.key_begin) - key;
    const float scale = float(l_.scale) * factor(l_.k_scale);
    const bool whole = last >= width && since <= 0;
    if (whole && scale > 0 && !l_.softcap && !l_.slopes) return weigh_scores(m, width, scale, scale * highest(m, width));
    weigh_scores(m, width, 1, shape_scores(m, key, width, since, last, scale));
  }

  float highest(int64_t m, int64_t width) const {
    const float* row = scores_ + m * kKeys;
    F first = V::set1(kHidden), second = first;
    for (int64_t i = 0; i < width; i += 2 * V::W) {
      first = V::max(first, V::load(row + i));
      second = V::max(second, V::load(row + i + V::W));
    }
    return V::most(V::max(first, second));
  }

  // Scores as the softmax sees them: scaled, capped, biased, hidden outside [since, last). Returns the greatest.
  float shape_scores(int64_t m, int64_t key, int64_t width, int64_t since, int64_t last, float scale) {
    float* row = scores_ + m * kKeys;
    const int64_t query = position(m), head = item_.head * group_ + m % group_;
    const F low = V::set1(float(since)), high = V::set1(float(last));
    F best = V::set1(kHidden);
    for (int64_t i = 0; i < width; i += V::W) {
      F x = V::mul(V::load(row + i), V::set1(scale));
      const F index = V::add(V::iota(), V::set1(float(i)));
      if (l_.softcap) x = V::mul(V::set1(float(l_.softcap)), tanh<V>(V::div(x, V::set1(float(l_.softcap)))));
      if (l_.slopes) x = V::fma(V::set1(l_.slopes[head]), V::add(index, V::set1(float(key - query))), x);
      x = V::select_less(index, high, x, V::set1(kHidden));
      x = V::select_less(index, low, V::set1(kHidden), x);
      best = V::max(best, x);
      V::store(row + i, x);
    }
    return V::most(best);
  }

  // weights = e^(scale * scores - greatest); sums of before shrink where this tile's greatest score is above theirs.
  void weigh_scores(int64_t m, int64_t width, float scale, float highest) {
    const float* row = scores_ + m * kKeys;
    L* weights = weights_ + m * kKeys;
    const float most = std::max(most_[m], highest);
    shrink_[m] = most_[m] == most ? 1.0f : most_[m] == kHidden ? 0.0f : std::exp(most_[m] - most);
    most_[m] = most;
    if (most == kHidden) {  // nothing that this query sees
      std::fill(weights, weights + width, L{});
      return;
    }
    F first = V::zero(), second = first;
    const F factor = V::set1(scale), less = V::set1(-most);
    for (int64_t i = 0; i < width; i += 2 * V::W) {
      const F x = weight_of<V>(V::fma(V::load(row + i), factor, less));
      const F y = weight_of<V>(V::fma(V::load(row + i + V::W), factor, less));
      first = V::add(first, x), second = V::add(second, y);
      V::store(weights + i, x), V::store(weights + i + V::W, y);
    }
    total_[m] = total_[m] * shrink_[m] + V::sum(V::add(first, second));
  }

  struct Segment {
    const B* values;
    int64_t at, pairs;  // first key's place in the tile
  };

  // sums = sums * shrink + weights times values of [key, key + kKeys), as far as the item's keys go.
  void weigh(int64_t key) {
    constexpr int kSide = sizeof(B) == 2 ? 2 : 1;
    const int64_t begin = std::max<int64_t>(key, item_.key_begin), end = std::min<int64_t>(item_.key_end, key + kKeys);
    Segment segments[kKeys / 16 + 4];
    int count = 0;
    int64_t token = begin;
    if (token % 2) segments[count++] = {edge(token, 0), token - 1 - key, 1}, ++token;
    while (token + 1 < end) {
      const int64_t stop = std::min(end, (token / l_.block_size + 1) * l_.block_size);
      segments[count++] = {page(token) + value_place<B>(l_, item_.head, token % l_.block_size, 0), token - key, (stop - token) / 2};
      token += (stop - token) / 2 * 2;
    }
    if (token < end) segments[count++] = {edge(token, 1), token - key, 1};
    constexpr int N = V::NV, W = V::W;
    int64_t column = 0;
    for (; column + N * W <= l_.padded_dim; column += N * W) strip<N>(segments, count, column, kSide);
    for (; column < l_.padded_dim; column += W) strip<1>(segments, count, column, kSide);
  }

  template <int N>
  void strip(const Segment* segments, int count, int64_t column, int side) {
    constexpr int W = V::W;
    for (int64_t t = 0; t < tiles(); ++t)
      with_constant<V::MR>(int(first(t + 1) - first(t)), [&](auto m) {
        F acc[m][N];
        float* sums = sums_ + first(t) * l_.padded_dim + column;
        for (int i = 0; i < m; ++i)
          for (int n = 0; n < N; ++n)
            acc[i][n] = V::mul(V::load(sums + i * l_.padded_dim + n * W), V::set1(shrink_[first(t) + i]));
        for (int s = 0; s < count; ++s) {
          const B* b[N];
          for (int n = 0; n < N; ++n) b[n] = segments[s].values + (column + n * W) * side;
          multiply<V, m, N, B, false>(acc, weights_ + first(t) * kKeys + segments[s].at, kKeys, 2, b, l_.padded_dim, segments[s].pairs);
        }
        for (int i = 0; i < m; ++i)
          for (int n = 0; n < N; ++n) V::store(sums + i * l_.padded_dim + n * W, acc[i][n]);
      });
  }

  // One token's values as a pair of which the other is zero: its neighbour may hold anything, and even a weight of
  // zero would not hide a NaN. `which`: 0 before the first key, 1 after the last.
  const B* edge(int64_t token, int which) {
    B* pair = edge_ + which * 2 * l_.padded_dim;
    std::memset((void*)pair, 0, sizeof(B) * 2 * l_.padded_dim);
    const B* held = page(token) + value_place<B>(l_, item_.head, token % l_.block_size, 0);
    const int64_t odd = token % 2;
    for (int64_t d = 0; d < l_.dim; ++d) {
      if constexpr (sizeof(B) == 2) pair[2 * d + odd] = held[2 * d];
      else pair[odd * l_.padded_dim + d] = held[d];
    }
    return pair;
  }

  float factor(const float* scale) const {
    const float implied = std::is_same_v<B, fp8> ? kFp8Bias : 1.0f;
    return scale ? scale[l_.scale_per_head ? item_.head : 0] * implied : implied;
  }

  void write() {
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t head = item_.head * group_ + m % group_;
      const int64_t place = (first_token_ + m / group_) * l_.heads + head;
      float* lse = call_.lse ? call_.lse + place : nullptr;
      finish<V, T>((T*)call_.out + place * l_.dim, lse, sums_ + m * l_.padded_dim, most_[m], total_[m], l_, head, factor(l_.v_scale));
    }
  }

  // [rows][padded dim], then greatest scores and totals.
  void keep() {
    float* to = partials(call_) + item_.partial * partial_size(l_, rows_);
    std::memcpy(to, sums_, sizeof(float) * rows_ * l_.padded_dim);
    for (int64_t m = 0; m < rows_; ++m) {
      for (int64_t d = 0; d < l_.dim; ++d) to[m * l_.padded_dim + d] *= factor(l_.v_scale);
      to[rows_ * l_.padded_dim + m] = most_[m], to[rows_ * (l_.padded_dim + 1) + m] = total_[m];
    }
  }

 public:
  static int64_t partial_size(const Layer& l, int64_t rows) { return rows * (l.padded_dim + 2); }
  static float* partials(const AttentionCall& call) {
    static Scratch store;
    int64_t count = 0;
    for (int64_t i = 0; i < call.batch.num_merges; ++i)
      count = std::max<int64_t>(count, call.batch.merges[i].partial + call.batch.merges[i].count);
    return store.get<float>(count * partial_size(call.layer, call.layer.group()));
  }

 private:
  const AttentionCall& call_;
  const Layer& l_;
  const AttentionItem& item_;
  int64_t group_, rows_, first_token_, first_position_, page_;
  const int32_t* table_;
  L *queries_, *weights_;
  float *scores_, *sums_, *most_, *total_, *shrink_;
  B* edge_;
};

template <class V, class T, class B>
void merge(const AttentionCall& call, const AttentionMerge& merge) {
  const Layer& l = call.layer;
  const int64_t rows = l.group(), size = Item<V, T, B>::partial_size(l, rows);
  const float* parts = Item<V, T, B>::partials(call) + merge.partial * size;
  static thread_local Scratch store;
  float* sums = store.get<float>(l.padded_dim);
  for (int64_t m = 0; m < rows; ++m) {
    float most = kHidden, total = 0;
    for (int i = 0; i < merge.count; ++i) most = std::max(most, parts[i * size + rows * l.padded_dim + m]);
    std::fill(sums, sums + l.padded_dim, 0.0f);
    for (int i = 0; i < merge.count; ++i) {
      const float* part = parts + i * size;
      const float shrink = std::exp(part[rows * l.padded_dim + m] - most);
      if (most == kHidden) continue;
      total += part[rows * (l.padded_dim + 1) + m] * shrink;
      for (int64_t d = 0; d < l.dim; ++d) sums[d] += part[m * l.padded_dim + d] * shrink;
    }
    const int64_t head = merge.head * rows + m, token = call.batch.query_start[merge.row] + merge.query_begin;
    const int64_t place = token * l.heads + head;
    finish<V, T>((T*)call.out + place * l.dim, call.lse ? call.lse + place : nullptr, sums, most, total, l, head, 1.0f);
  }
}

template <class V, class T, class B>
void attention_typed(const AttentionCall& call) {
  int64_t ldq = 0;
  const T* q = prepare<V, T, B>(call, &ldq);
  if (call.batch.num_merges) Item<V, T, B>::partials(call);  // grows here, not in the threads
  parallel_for(call.batch.num_items, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) Item<V, T, B>(call, call.batch.items[i], q, ldq).run();
  });
  parallel_for(call.batch.num_merges, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) merge<V, T, B>(call, call.batch.merges[i]);
  });
}

template <class V>
void attention(const AttentionCall& call) {
  const bool narrow = DType(call.layer.type) == DType::bf16;
  switch (DType(call.layer.kv_type)) {
    case DType::i8: return narrow ? attention_typed<V, bf16, int8_t>(call) : attention_typed<V, float, int8_t>(call);
    case DType::fp8: return narrow ? attention_typed<V, bf16, fp8>(call) : attention_typed<V, float, fp8>(call);
    default: return narrow ? attention_typed<V, bf16, bf16>(call) : attention_typed<V, float, float>(call);
  }
}

}  // namespace anychip
