// Recurrences over a matrix S [key_dim][value_dim] by head: the gated delta rule, KDA, lightning attention and SSD.
//
// Tokens of a row go by in small chunks. A chunk reads S once and writes it once, with the columns of a strip in
// registers: what its tokens write is known from what all of them read of the S before the chunk, and from products of
// their keys and queries. One token is a chunk too. Larger chunks would multiply more and read no less: S is in the L2
// cache. Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024.
#pragma once

#include <cmath>

#include "elementwise.h"
#include "pool.h"
#include "state_types.h"

namespace anychip {

// Registers hold two sums of each token and vector.
template <class V>
constexpr int kChunkTokens = V::W == 16 ? 8 : 4;

// What the tokens of a chunk do to S, without S itself. kReads: whether what is written depends on what keys read.
template <int M, bool kReads>
struct ChunkTerms {
  static constexpr int kRead = kReads ? 2 * M : M;
  float* reads;   // [keys][kRead]: by token the query, and behind them the keys that read, through the decays before
  float* writes;  // [keys][M]: the keys that write, through the decays behind them
  float* kept;    // [keys]: what is left of S
  float queried[M][M], read[M][M];  // by token what it sees of what an earlier one, or itself, has written
};

// Columns of S, N vectors of them, taken through a chunk: values [M] are replaced by outputs, rows `apart`.
template <class V, int M, int N, bool kReads, class L>
ANYCHIP_INLINE void advance_strip(const ChunkTerms<M, kReads>& t, float* s, int64_t keys, int64_t stride, float* values,
                                  int64_t apart, L lanes) {
  using F = typename V::F;
  F out[M][N], written[M][N];
  clear<V, M, N>(out);
  clear<V, M, N>(written);
  for (int64_t k = 0; k < keys; ++k) {
    const float* reads = t.reads + k * t.kRead;
    F x[N];
    for (int n = 0; n < N; ++n) x[n] = load<V>(s + k * stride + n * V::W, lanes);
    for (int i = 0; i < M; ++i) {
      const F query = V::set1(reads[i]);
      for (int n = 0; n < N; ++n) out[i][n] = V::fma(query, x[n], out[i][n]);
    }
    if constexpr (kReads)
      for (int i = 0; i < M; ++i) {
        const F key = V::set1(reads[M + i]);
        for (int n = 0; n < N; ++n) written[i][n] = V::fma(key, x[n], written[i][n]);
      }
  }
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < N; ++n) {
      if constexpr (kReads)
        for (int j = 0; j < i; ++j) written[i][n] = V::fma(V::set1(t.read[i][j]), written[j][n], written[i][n]);
      float* value = values + i * apart + n * V::W;
      written[i][n] = V::sub(load<V>(value, lanes), written[i][n]);
      for (int j = 0; j <= i; ++j) out[i][n] = V::fma(V::set1(t.queried[i][j]), written[j][n], out[i][n]);
      store<V>(value, out[i][n], lanes);
    }
  for (int64_t k = 0; k < keys; ++k) {
    const F kept = V::set1(t.kept[k]);
    F x[N];
    for (int n = 0; n < N; ++n) x[n] = V::mul(kept, load<V>(s + k * stride + n * V::W, lanes));
    for (int i = 0; i < M; ++i) {
      const F key = V::set1(t.writes[k * M + i]);
      for (int n = 0; n < N; ++n) x[n] = V::fma(key, written[i][n], x[n]);
    }
    for (int n = 0; n < N; ++n) store<V>(s + k * stride + n * V::W, x[n], lanes);
  }
}

// One head of one row.
template <class V, class T>
class MatrixItem {
  using F = typename V::F;

 public:
  MatrixItem(const MatrixCall& call, int64_t row, int64_t head)
      : call_(call), r_(call.rule), head_(head), group_(head / (r_.heads / r_.groups)),
        width_(round_up<int64_t>(r_.key_dim, V::W)) {
    constexpr int kMost = kChunkTokens<V>;
    static thread_local Scratch store;
    float* at = store.get<float>(size_t(width_ * (4 * kMost + 4) + kMost * r_.value_dim));
    q_ = at, k_ = at += width_, decay_ = at += width_, kept_ = at += width_;
    held_ = at += width_, writes_ = at += kMost * width_, reads_ = at += kMost * width_;
    values_ = at + 2 * kMost * width_;
    state_ = call.states + (call.step.blocks[row] * r_.heads + head) * r_.key_dim * r_.value_dim;
    if (call.step.fresh(row)) std::fill(state_, state_ + r_.key_dim * r_.value_dim, 0.0f);
  }

  void run(int64_t token, int64_t count) {
    constexpr int kMost = kChunkTokens<V>;
    const bool reads = r_.kind == Recurrence::gated_delta || r_.kind == Recurrence::kda;
    for (; count > 0; token += kMost, count -= kMost) {
      const int now = int(std::min<int64_t>(kMost, count));
      reads ? chunk<kMost, true>(token, now) : chunk<kMost, false>(token, now);
    }
  }

 private:
  // Of M tokens, or of half as many where that is enough; those past `count` change nothing.
  template <int M, bool kReads>
  void chunk(int64_t token, int count) {
    if constexpr (M > 1)
      if (count <= M / 2) return chunk<M / 2, kReads>(token, count);
    ChunkTerms<M, kReads> terms;
    terms.reads = reads_, terms.writes = writes_, terms.kept = kept_;
    prepare(terms, token, count);
    constexpr int N = kChunkTokens<V> / M;
    constexpr auto kAll = std::integral_constant<int, V::W>{};
    int64_t c = 0;
    for (; c + N * V::W <= r_.value_dim; c += N * V::W)
      advance_strip<V, M, N, kReads>(terms, state_ + c, r_.key_dim, r_.value_dim, values_ + c, r_.value_dim, kAll);
    for (; c < r_.value_dim; c += V::W)
      advance_strip<V, M, 1, kReads>(terms, state_ + c, r_.key_dim, r_.value_dim, values_ + c, r_.value_dim,
                                     int(std::min<int64_t>(V::W, r_.value_dim - c)));
    for (int i = 0; i < count; ++i) put(token + i, values_ + i * r_.value_dim);
  }

  template <int M, bool kReads>
  void prepare(ChunkTerms<M, kReads>& t, int64_t token, int count) {
    constexpr int kRead = ChunkTerms<M, kReads>::kRead;
    std::fill(kept_, kept_ + width_, 1.0f);
    for (int i = 0; i < M; ++i) {
      float* held = held_ + i * width_;  // the token's key, which the decays behind it go through
      float* value = values_ + i * r_.value_dim;
      if (i >= count) {
        std::fill(value, value + r_.value_dim, 0.0f);
        std::fill(held, held + width_, 0.0f);
        for (int j = 0; j < M; ++j) t.queried[i][j] = t.read[i][j] = 0;
        for (int64_t k = 0; k < r_.key_dim; ++k) {
          reads_[k * kRead + i] = 0;
          if constexpr (kReads) reads_[k * kRead + M + i] = 0;
        }
        continue;
      }
      const float written = take<kReads>(token + i, value);
      for (int64_t k = 0; k < width_; k += V::W) V::store(kept_ + k, V::mul(V::load(kept_ + k), V::load(decay_ + k)));
      for (int j = 0; j < i; ++j) {
        float* earlier = held_ + j * width_;
        F queried = V::zero(), read = V::zero();
        for (int64_t k = 0; k < width_; k += V::W) {
          const F key = V::mul(V::load(earlier + k), V::load(decay_ + k));
          V::store(earlier + k, key);
          queried = V::fma(V::load(q_ + k), key, queried);
          if constexpr (kReads) read = V::fma(V::load(k_ + k), key, read);
        }
        t.queried[i][j] = V::sum(queried), t.read[i][j] = V::sum(read);
      }
      F queried = V::zero();
      for (int64_t k = 0; k < width_; k += V::W) {
        const F key = V::mul(V::set1(written), V::load(k_ + k));
        V::store(held + k, key);
        queried = V::fma(V::load(q_ + k), key, queried);
      }
      t.queried[i][i] = V::sum(queried);
      for (int64_t k = 0; k < r_.key_dim; ++k) {
        reads_[k * kRead + i] = q_[k] * kept_[k];
        if constexpr (kReads) reads_[k * kRead + M + i] = k_[k] * kept_[k];
      }
    }
    for (int i = 0; i < M; ++i)
      for (int64_t k = 0; k < r_.key_dim; ++k) writes_[k * M + i] = held_[i * width_ + k];
  }

  // A token's query and key as they meet S, its decays and its value. Returns what its key is multiplied by where it
  // writes.
  template <bool kDelta>
  float take(int64_t t, float* value) {
    const MatrixInputs& in = call_.in;
    const float queries = widen(q_, in.q.template at<T>(t, group_)), keys = widen(k_, in.k.template at<T>(t, group_));
    float times = 1;
    if constexpr (kDelta) {
      constexpr float kEps = 1e-6f;
      scale(q_, 1 / std::sqrt((queries + kEps) * float(r_.key_dim)));
      scale(k_, 1 / std::sqrt(keys + kEps));
      const float* g = in.g.template at<float>(t, head_);
      if (r_.kind == Recurrence::kda) {
        each_vector<V>(r_.key_dim, [&](int64_t k, auto n) { store<V>(decay_ + k, exp<V>(load<V>(g + k, n)), n); });
        std::fill(decay_ + r_.key_dim, decay_ + width_, 1.0f);
      } else {
        std::fill(decay_, decay_ + width_, std::exp(*g));
      }
    } else if (r_.kind == Recurrence::lightning) {
      std::fill(decay_, decay_ + width_, std::exp(-r_.by_head[head_]));
    } else {
      times = *in.g.template at<float>(t, head_);
      std::fill(decay_, decay_ + width_, std::exp(times * r_.by_head[head_]));
    }
    const T* v = in.v.template at<T>(t, head_);
    each_vector<V>(r_.value_dim, [&](int64_t i, auto n) {
      store<V>(value + i, V::mul(V::set1(times), load<V>(v + i, n)), n);
    });
    return kDelta ? *in.beta.template at<float>(t, head_) : 1.0f;
  }

  // A vector of keys in float32, filled up with zeros; returns the sum of its squares.
  float widen(float* to, const T* from) const {
    F squares = V::zero();
    each_vector<V>(r_.key_dim, [&](int64_t k, auto n) {
      const F x = load<V>(from + k, n);
      squares = V::fma(x, x, squares);
      store<V>(to + k, x, n);
    });
    std::fill(to + r_.key_dim, to + width_, 0.0f);
    return V::sum(squares);
  }

  void scale(float* x, float factor) const {
    for (int64_t k = 0; k < width_; k += V::W) V::store(x + k, V::mul(V::load(x + k), V::set1(factor)));
  }

  void put(int64_t t, const float* found) const {
    T* out = (T*)call_.out + (t * r_.heads + head_) * r_.value_dim;
    const bool skips = r_.kind == Recurrence::ssd;
    const F skip = V::set1(skips ? r_.skip[head_] : 0.0f);
    const T* x = call_.in.v.template at<T>(t, head_);
    each_vector<V>(r_.value_dim, [&](int64_t i, auto n) {
      const F y = load<V>(found + i, n);
      store<V>(out + i, skips ? V::fma(skip, load<V>(x + i, n), y) : y, n);
    });
  }

  const MatrixCall& call_;
  const MatrixRule& r_;
  int64_t head_, group_, width_;
  float *q_, *k_, *decay_, *kept_, *held_, *writes_, *reads_, *values_;
  float* state_;
};

// Padded tokens' outputs, rows of `bytes`, become zeros.
inline void clear_padding(const StateStep& step, void* out, int64_t bytes) {
  const int64_t tokens = step.query_start[step.rows];
  std::memset((char*)out + tokens * bytes, 0, (step.room - tokens) * bytes);
}

template <class V, class T>
void matrix_typed(const MatrixCall& call) {
  const MatrixRule& r = call.rule;
  clear_padding(call.step, call.out, r.heads * r.value_dim * int64_t(sizeof(T)));
  parallel_for(call.step.rows * r.heads, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t row = i / r.heads, count = call.step.count(row);
      if (count) MatrixItem<V, T>(call, row, i % r.heads).run(call.step.query_start[row], count);
    }
  });
}

template <class V>
void matrix_state(const MatrixCall& call) {
  if (DType(call.rule.type) == DType::bf16) matrix_typed<V, bf16>(call); else matrix_typed<V, float>(call);
}

}  // namespace anychip
