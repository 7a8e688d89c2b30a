// Products with weights as a checkpoint has them, [n, k] row by row: the output head that shares its embedding's
// storage. Lanes lie along k, so that a product ends in a sum over a vector.
#pragma once

#include <algorithm>
#include <atomic>

#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

// The even and the odd values of W pairs.
template <class V>
ANYCHIP_INLINE void split(const bf16* p, typename V::F& even, typename V::F& odd) {
  even = V::template half<0>(p, 0);
  odd = V::template half<1>(p, 0);
}

template <class V>
ANYCHIP_INLINE void split(const float* p, typename V::F& even, typename V::F& odd) {
  even = V::load(p);  // any order serves, as long as both operands have it
  odd = V::load(p + V::W);
}

template <class V, int M, int N, class T>
void rows_tile(const Gemm& g, int64_t row, int64_t column) {
  typename V::F acc[M][N];
  clear<V, M, N>(acc);
  const T* w = (const T*)g.w.panels + column * g.w.k;
  const T* x = (const T*)g.x + row * g.ldx;
  constexpr int64_t step = 2 * V::W;
  int64_t i = 0;
  const auto add = [&](const T* const (&xs)[M], const T* const (&ws)[N]) __attribute__((always_inline)) {
    typename V::F even[N], odd[N];
    for (int n = 0; n < N; ++n) split<V>(ws[n], even[n], odd[n]);
    for (int m = 0; m < M; ++m) {
      typename V::F a, b;
      split<V>(xs[m], a, b);
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(b, odd[n], V::fma(a, even[n], acc[m][n]));
    }
  };
  const T *xs[M], *ws[N];
  for (; i + step <= g.w.k; i += step) {
    for (int m = 0; m < M; ++m) xs[m] = x + m * g.ldx + i;
    for (int n = 0; n < N; ++n) {
      ws[n] = w + n * g.w.k + i;
      if constexpr (M <= 4) __builtin_prefetch(ws[n] + 1024 / sizeof(T));
    }
    add(xs, ws);
  }
  if (i < g.w.k) {
    T tails[M + N][step] = {};
    for (int m = 0; m < M; ++m) std::memcpy(tails[m], x + m * g.ldx + i, sizeof(T) * (g.w.k - i)), xs[m] = tails[m];
    for (int n = 0; n < N; ++n) std::memcpy(tails[M + n], w + n * g.w.k + i, sizeof(T) * (g.w.k - i)), ws[n] = tails[M + n];
    add(xs, ws);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) from_float(V::sum(acc[m][n]), (T*)g.out + (row + m) * g.ldo + column + n);
}

// x, weights and output of one type; no bias.
template <class V, class T>
void rows_typed(const Gemm& g) {
  constexpr int N = V::NV == 2 && V::W == 8 ? 2 : 4;      // weight rows of a tile
  constexpr int M = V::W == 8 ? 4 : 6;                     // of x
  stream_for(cdiv<int64_t>(g.w.n, N), 16, [&](int64_t tile, int64_t end) {
    for (; tile < end; ++tile) {
      const int64_t column = tile * N;
      for (int64_t row = 0; row < g.m; row += M)
        with_constant<M>(int(std::min<int64_t>(M, g.m - row)), [&](auto m) {
          if (column + N <= g.w.n) return rows_tile<V, m, N, T>(g, row, column);
          for (int64_t last = column; last < g.w.n; ++last) rows_tile<V, m, 1, T>(g, row, last);
        });
    }
  });
}

template <class V>
void rows(const Gemm& g) {
  if (g.w.kind == DType::bf16) rows_typed<V, bf16>(g); else rows_typed<V, float>(g);
}

// Reads memory and does next to nothing with it: what a stream of weights can reach at most.
template <class V>
float read(const float* data, int64_t count) {
  std::atomic<float> kept{0};
  stream_for(count / 64, 1024, [&](int64_t piece, int64_t end) {
    typename V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = piece * 64; i < end * 64; i += 64) {
      for (int64_t line = 0; line < 64; line += 16) __builtin_prefetch(data + i + 512 + line);
      for (int64_t at = 0; at < 64; at += V::W) sums[at / V::W % 4] = V::max(sums[at / V::W % 4], V::load(data + i + at));
    }
    kept = V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  });
  return kept;
}

}  // namespace anychip
