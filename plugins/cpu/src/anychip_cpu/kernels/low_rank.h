// Adapters behind a product: y[t] += scale * (x[t] down[s]^T) up[s] for each token t with slot s, part by part of the
// product's columns. Two passes over work that threads share out: the inner products, whose lanes lie along the inputs,
// then the outputs, whose lanes lie along the columns. Tokens of one slot go through its matrices together.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "low_rank_types.h"
#include "tile.h"

namespace anychip {

// Tokens of one slot, `count` of them from `first` on in the order of slots.
struct LowRankTile {
  int32_t slot, first, count;
};

constexpr int kLowRankTokens = 4;      // of a tile
constexpr int kLowRankRanks = 4;       // of a task of the first pass
constexpr int64_t kLowRankColumns = 512;  // of a task of the second

// inner[m][r] for some tokens of a tile and N ranks of one part, times the part's scale.
template <class V, int M, int N, class T>
void shrink(const LowRank& a, const int32_t* tokens, const T* down, float scale, float* inner) {
  typename V::F acc[M][N];
  clear<V, M, N>(acc);
  const T* x[M];
  for (int m = 0; m < M; ++m) x[m] = (const T*)a.x + tokens[m] * a.ldx;
  each_vector<V>(a.in, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    typename V::F w[N];
    for (int n = 0; n < N; ++n) w[n] = load<V>(down + n * a.in + i, lanes);
    for (int m = 0; m < M; ++m) {
      const typename V::F v = load<V>(x[m] + i, lanes);
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(v, w[n], acc[m][n]);
    }
  });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) inner[m * a.parts * a.max_rank + n] = scale * V::sum(acc[m][n]);
}

// Columns of some tokens of a tile: what is there, and what `rank` inner products add.
template <class V, int M, class T>
void expand(const LowRank& a, const int32_t* tokens, const T* up, const float* inner, int64_t rank, int64_t begin,
            int64_t end) {
  T* y[M];
  for (int m = 0; m < M; ++m) y[m] = (T*)a.y + tokens[m] * a.ldy + begin;
  each_vector<V>(end - begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    typename V::F acc[M];
    for (int m = 0; m < M; ++m) acc[m] = V::zero();
    for (int64_t r = 0; r < rank; ++r) {
      const typename V::F w = load<V>(up + r * a.out + begin + i, lanes);
      for (int m = 0; m < M; ++m) acc[m] = V::fma(V::set1(inner[m * a.parts * a.max_rank + r]), w, acc[m]);
    }
    for (int m = 0; m < M; ++m) store<V>(y[m] + i, V::add(load<V>(y[m] + i, lanes), acc[m]), lanes);
  });
}

template <class V, class T>
void low_rank_typed(const LowRank& a) {
  static Scratch order_store, tile_store, inner_store;
  int32_t* order = order_store.get<int32_t>(size_t(a.tokens));
  LowRankTile* tiles = tile_store.get<LowRankTile>(size_t(a.tokens));
  int64_t num_tiles = 0, placed = 0;
  for (int32_t slot = 0; slot < a.slots; ++slot) {
    const int64_t first = placed;
    for (int64_t t = 0; t < a.tokens; ++t)
      if (a.slot_of[t] == slot) order[placed++] = int32_t(t);
    for (int64_t at = first; at < placed; at += kLowRankTokens)
      tiles[num_tiles++] = {slot, int32_t(at), int32_t(std::min<int64_t>(kLowRankTokens, placed - at))};
  }
  if (!num_tiles) return;
  const int64_t width = a.parts * a.max_rank;
  float* inner = inner_store.get<float>(size_t(placed * width));

  const int64_t blocks = cdiv<int64_t>(a.max_rank, kLowRankRanks);
  parallel_for(num_tiles * a.parts * blocks, std::max<int64_t>(1, blocks), [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const LowRankTile& tile = tiles[task / (a.parts * blocks)];
      const int64_t part = task / blocks % a.parts, r = task % blocks * kLowRankRanks;
      const int64_t at = tile.slot * a.parts + part, left = a.ranks[at] - r;
      if (left <= 0) continue;
      const T* down = (const T*)a.down + (at * a.max_rank + r) * a.in;
      float* to = inner + tile.first * width + part * a.max_rank + r;
      with_constant<kLowRankTokens>(tile.count, [&](auto m) {
        with_constant<kLowRankRanks>(int(std::min<int64_t>(kLowRankRanks, left)), [&](auto n) {
          shrink<V, m, n, T>(a, order + tile.first, down, a.scales[at], to);
        });
      });
    }
  });

  const int64_t columns = cdiv<int64_t>(a.out, kLowRankColumns);
  parallel_for(num_tiles * columns, 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const LowRankTile& tile = tiles[task / columns];
      const int64_t from = task % columns * kLowRankColumns, to = std::min(a.out, from + kLowRankColumns);
      for (int64_t part = 0; part < a.parts; ++part) {
        const int64_t begin = std::max(from, a.offsets[part]), until = std::min(to, a.offsets[part + 1]);
        const int64_t rank = a.ranks[tile.slot * a.parts + part];
        if (begin >= until || !rank) continue;
        const T* up = (const T*)a.up + tile.slot * a.max_rank * a.out;
        const float* held = inner + tile.first * width + part * a.max_rank;
        with_constant<kLowRankTokens>(tile.count, [&](auto m) {
          expand<V, m, T>(a, order + tile.first, up, held, rank, begin, until);
        });
      }
    }
  });
}

template <class V>
void low_rank(const LowRank& a) {
  if (a.type == DType::bf16) low_rank_typed<V, bf16>(a); else low_rank_typed<V, float>(a);
}

}  // namespace anychip
