// Latent attention in its absorbed form: heads attend over rows that all of them share.
//
// An item is some heads of one query: it folds them with k_up, attends, and unfolds the sums with v_up. Rows go by in
// tiles, copied to where they are padded with zeros: places where no token was written may hold anything, and are never
// read. Scores have their lanes along a row, sums theirs along its latent values, so one layout serves both products.
// Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018.
#pragma once

#include <limits>

#include "elementwise.h"
#include "functions.h"
#include "latent_types.h"
#include "pool.h"

namespace anychip {

template <class V, class T>
class LatentItem {
  using F = typename V::F;
  using L = Left<V, T>;  // what products read

 public:
  static constexpr int kHeads = V::W == 16 ? 8 : 4;  // of an item: with two vectors each they fit the registers
  static constexpr int64_t kRows = 64;               // of a tile
  static constexpr int64_t kStep = 32;               // rows and queries are padded to a multiple of so many values

  LatentItem(const LatentCall& call, int64_t token, int64_t row, int64_t head, int heads)
      : call_(call), l_(call.layer), token_(token), head_(head), heads_(heads) {
    width_ = round_up<int64_t>(l_.row_dim, kStep), latent_ = round_up<int64_t>(l_.latent_dim, kStep);
    end_ = call.step.end(token, row);
    begin_ = l_.window ? std::max<int64_t>(0, end_ - l_.window) : 0;
    table_ = call.step.block_table + row * call.step.table_stride;
    if (call.in.chosen) {
      chosen_ = call.in.chosen + token * call.in.top_k;
      begin_ = 0, end_ = std::find(chosen_, chosen_ + call.in.top_k, -1) - chosen_;
    }
    static thread_local Scratch query_store, row_store, score_store, sum_store;
    q_ = query_store.get<L>(kHeads * width_);
    rows_ = row_store.get<L>(kRows * width_);
    scores_ = score_store.get<float>(kHeads * kRows);
    sums_ = sum_store.get<float>(kHeads * latent_);
    for (int m = 0; m < heads; ++m) fold(m);
  }

  void run() {
    with_constant<kHeads>(heads_, [&](auto m) {
      std::fill(sums_, sums_ + m * latent_, 0.0f);
      std::fill(most_, most_ + m, -std::numeric_limits<float>::infinity());
      std::fill(total_, total_ + m, 0.0f);
      for (int64_t key = begin_; key < end_; key += kRows) {
        const int64_t count = std::min(kRows, end_ - key);
        fetch(key, count);
        score<m>(count);
        for (int i = 0; i < m; ++i) soften(i, count);
        weigh<m>(count);
      }
      for (int i = 0; i < m; ++i) unfold(i);
    });
  }

 private:
  // A head's query becomes one of a row's width: what k_up makes of its first part, and its rotated part.
  void fold(int m) const {
    constexpr int kTogether = 4;  // rows of the factor, which is read from its front to its end
    const T* q = call_.in.q_nope.template at<T>(token_, head_ + m);
    const T* up = (const T*)l_.k_up + (head_ + m) * l_.nope_dim * l_.latent_dim;
    L* to = q_ + m * width_;
    float* sums = sums_;
    std::fill(sums, sums + latent_, 0.0f);
    for (int64_t d = 0; d < l_.nope_dim; d += kTogether)
      with_constant<kTogether>(int(std::min<int64_t>(kTogether, l_.nope_dim - d)), [&](auto count) {
        F factor[count];
        for (int i = 0; i < count; ++i) factor[i] = V::set1(to_float(q[d + i]));
        each_vector<V>(l_.latent_dim, [&](int64_t c, auto n) {
          F sum = V::load(sums + c);
          for (int i = 0; i < count; ++i) {
            const T* row = up + (d + i) * l_.latent_dim + c;
            __builtin_prefetch(row + kTogether * l_.latent_dim, 0, 2);
            sum = V::fma(factor[i], load<V>(row, n), sum);
          }
          V::store(sums + c, sum);
        });
      });
    int64_t c = 0;
    for (; c < l_.latent_dim; ++c) from_float(sums[c], to + c);
    const int64_t rope = l_.row_dim - l_.latent_dim;
    static thread_local Scratch turned_store;
    T* turned = turned_store.get<T>(rope);
    std::copy_n(call_.in.q_rope.template at<T>(token_, head_ + m), rope, turned);
    rotate(l_.rotation, turned, call_.step.positions[token_]);
    for (int64_t i = 0; i < rope; ++i) from_float(to_float(turned[i]), to + c + i);
    std::memset((void*)(to + l_.row_dim), 0, sizeof(L) * (width_ - l_.row_dim));
  }

  // A head's output is what v_up makes of its sums.
  void unfold(int m) const {
    constexpr int N = 4;
    const float* sums = sums_ + m * latent_;
    const float factor = total_[m] > 0 ? 1 / total_[m] : 0.0f;
    const T* up = (const T*)l_.v_up + (head_ + m) * l_.v_dim * l_.latent_dim;
    T* out = (T*)call_.out + (token_ * l_.heads + head_ + m) * l_.v_dim;
    const int64_t whole = l_.latent_dim / V::W * V::W;
    for (int64_t v = 0; v < l_.v_dim; v += N)
      with_constant<N>(int(std::min<int64_t>(N, l_.v_dim - v)), [&](auto count) {
        F acc[1][count];
        clear<V, 1, count>(acc);
        const T* rows = up + v * l_.latent_dim;
        for (int64_t c = 0; c < whole; c += V::W)
          for (int n = 0; n < count; ++n) {
            __builtin_prefetch(rows + (N + n) * l_.latent_dim + c, 0, 2);
            acc[0][n] = V::fma(V::load(sums + c), V::load(rows + n * l_.latent_dim + c), acc[0][n]);
          }
        for (int n = 0; n < count; ++n) {
          float sum = V::sum(acc[0][n]);
          for (int64_t c = whole; c < l_.latent_dim; ++c) sum += sums[c] * to_float(rows[n * l_.latent_dim + c]);
          from_float(sum * factor, out + v + n);
        }
      });
  }

  void copy(L* to, const T* from) const {
    if constexpr (std::is_same_v<L, T>) std::memcpy((void*)to, from, sizeof(T) * l_.row_dim);
    else each_vector<V>(l_.row_dim, [&](int64_t i, auto n) { store<V>(to + i, load<V>(from + i, n), n); });
    std::memset((void*)(to + l_.row_dim), 0, sizeof(L) * (width_ - l_.row_dim));
  }

  void fetch(int64_t key, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = chosen_ ? chosen_[key + i] : key + i, block = table_[token / l_.block_size];
      copy(rows_ + i * width_, (const T*)call_.cache + (block * l_.block_size + token % l_.block_size) * l_.row_dim);
    }
    if (count % 2) std::memset((void*)(rows_ + count * width_), 0, sizeof(L) * width_);
  }

  // Products of M queries with rows two by two.
  template <int M>
  void score(int64_t count) const {
    for (int64_t key = 0; key < count; key += 2) {
      F acc[M][2];
      clear<V, M, 2>(acc);
      const L *a = rows_ + key * width_, *b = a + width_;
      if constexpr (std::is_same_v<L, bf16>) {
        for (int64_t i = 0; i < width_; i += 32) {
          const auto x = V::pair(a + i), y = V::pair(b + i);
          for (int m = 0; m < M; ++m) {
            const auto q = V::pair(q_ + m * width_ + i);
            acc[m][0] = V::dot(acc[m][0], q, x), acc[m][1] = V::dot(acc[m][1], q, y);
          }
        }
      } else {
        for (int64_t i = 0; i < width_; i += V::W) {
          const F x = V::load(a + i), y = V::load(b + i);
          for (int m = 0; m < M; ++m) {
            const F q = V::load(q_ + m * width_ + i);
            acc[m][0] = V::fma(q, x, acc[m][0]), acc[m][1] = V::fma(q, y, acc[m][1]);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        scores_[m * kRows + key] = V::sum(acc[m][0]) * float(l_.scale);
        scores_[m * kRows + key + 1] = V::sum(acc[m][1]) * float(l_.scale);
      }
    }
  }

  // A head's scores become weights, relative to the greatest score so far; past the last row they are zeros.
  void soften(int m, int64_t count) {
    float* row = scores_ + m * kRows;
    std::fill(row + count, row + kRows, -std::numeric_limits<float>::infinity());
    F best = V::load(row);
    for (int64_t i = V::W; i < kRows; i += V::W) best = V::max(best, V::load(row + i));
    const float most = std::max(most_[m], V::most(best));
    shrink_[m] = most_[m] == most ? 1.0f : std::exp(most_[m] - most);
    most_[m] = most;
    F sum = V::zero();
    for (int64_t i = 0; i < kRows; i += V::W) {
      const F weight = weight_of<V>(V::sub(V::load(row + i), V::set1(most)));
      sum = V::add(sum, weight);
      V::store(row + i, weight);
    }
    total_[m] = total_[m] * shrink_[m] + V::sum(sum);
  }

  // sums = sums * shrink + weights times the rows' latent values; what is padded may hold rotated ones, and is not read.
  template <int M>
  void weigh(int64_t count) const {
    for (int64_t c = 0; c < latent_; c += 2 * V::W) {
      F acc[M][2];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < 2; ++n) acc[m][n] = V::mul(V::load(sums_ + m * latent_ + c + n * V::W), V::set1(shrink_[m]));
      const L* row = rows_ + c;
      for (int64_t k = 0; k < count; ++k, row += width_) {
        const F x = V::load(row), y = V::load(row + V::W);
        for (int m = 0; m < M; ++m) {
          const F weight = V::set1(scores_[m * kRows + k]);
          acc[m][0] = V::fma(weight, x, acc[m][0]), acc[m][1] = V::fma(weight, y, acc[m][1]);
        }
      }
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < 2; ++n) V::store(sums_ + m * latent_ + c + n * V::W, acc[m][n]);
    }
  }

  const LatentCall& call_;
  const LatentLayer& l_;
  int64_t token_, head_;
  int heads_;
  int64_t width_, latent_, begin_, end_;
  const int32_t *table_, *chosen_ = nullptr;
  L *q_, *rows_;
  float *scores_, *sums_;
  float most_[kHeads], total_[kHeads], shrink_[kHeads];
};

// Every token's row at its slot.
template <class T>
void write_latent(const LatentCall& call) {
  const LatentLayer& l = call.layer;
  for (int64_t token = 0; token < call.step.tokens(); ++token) {
    if (call.step.slots[token] < 0) continue;
    T* row = (T*)call.cache + call.step.slots[token] * l.row_dim;
    std::copy_n(call.in.latent.at<T>(token), l.latent_dim, row);
    std::copy_n(call.in.k_rope.at<T>(token), l.row_dim - l.latent_dim, row + l.latent_dim);
    rotate(l.rotation, row + l.latent_dim, call.step.positions[token]);
  }
}

template <class V, class T>
void latent_typed(const LatentCall& call) {
  constexpr int64_t kMost = LatentItem<V, T>::kHeads;
  const int64_t heads = call.layer.heads, tokens = call.step.tokens();
  write_latent<T>(call);
  std::memset((T*)call.out + tokens * heads * call.layer.v_dim, 0,
              sizeof(T) * (call.step.room - tokens) * heads * call.layer.v_dim);
  // As few items as keep every thread at work: an item reads all the rows.
  const int64_t wanted = cdiv<int64_t>(num_threads(), std::max<int64_t>(1, tokens));
  const int64_t tiles = std::min(heads, std::max(cdiv(heads, kMost), wanted));
  parallel_for(tokens * tiles, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t token = i / tiles, first = heads * (i % tiles) / tiles, last = heads * (i % tiles + 1) / tiles;
      const int64_t row = call.step.row_of(token);
      if (call.in.chosen || call.step.queries(row) <= call.layer.most)
        LatentItem<V, T>(call, token, row, first, int(last - first)).run();
    }
  });
}

template <class V>
void latent_attention(const LatentCall& call) {
  if (DType(call.layer.type) == DType::bf16) latent_typed<V, bf16>(call); else latent_typed<V, float>(call);
}

}  // namespace anychip
