// Products with packed weights, from one row to thousands.
//
// Rows are cut into tiles that fit the registers, and tiles into blocks whose left operand stays in the L2 cache.
// Every panel of weights is read once a block: a decode step streams the weights once, whatever its batch.
#pragma once

#include <algorithm>

#include "amx.h"
#include "coded.h"
#include "integer.h"
#include "pool.h"
#include "quantized.h"
#include "tile.h"
#include "weights.h"
#include "whole.h"

namespace anychip {

constexpr int64_t kOuterInputs = 2048; // of a block, at most: 96 x 2048 float32 are 768 KB
constexpr int64_t kInnerInputs = 512;  // of a pass: 32 KB of bf16 panel stay in L1
constexpr int64_t kWorthPacking = 16384; // values of a left operand, from which on threads share its packing
constexpr int64_t kDirectTiles = 2;    // from more tiles on, a quantized panel is dequantized once for all

// c[m][column] += rows of a tile times a panel, over `pairs` pairs from pair `begin` on.
template <class V, int M, class B>
void tile_times_panel(float* c, const Left<V, B>* a, const B* panel, size_t begin, size_t pairs) {
  constexpr int N = V::NV, W = V::W;
  for (int column = 0; column < kPanel; column += N * W) {
    typename V::F acc[M][N];
    const B* b[N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = V::load(c + m * kPanel + column + n * W);
    constexpr int kSide = sizeof(B) == 2 ? 2 : 1;  // interleaved columns are two elements wide
    for (int n = 0; n < N; ++n) b[n] = panel + begin * 2 * kPanel + (column + n * W) * kSide;
    multiply<V, M, N, B>(acc, a + begin * 2 * M, 2, 2 * M, b, kPanel, pairs);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) V::store(c + m * kPanel + column + n * W, acc[m][n]);
  }
}

// c [left.rows][kPanel] += the block times one panel, whose first input is `first` of the weights.
template <class V, class B>
void block_times_panel(float* c, const LeftBlock<V, B>& left, const Weights& w, int64_t panel, int64_t first) {
  const B* values = (const B*)w.panel(panel) + first * kPanel;
  for (int64_t begin = 0; begin < left.pairs; begin += kInnerInputs / 2) {
    const int64_t pairs = std::min(kInnerInputs / 2, left.pairs - begin);
    for (int64_t t = 0; t < left.tiles; ++t)
      with_constant<V::MR>(left.count(t), [&](auto m) {
        tile_times_panel<V, m, B>(c + left.first(t) * kPanel, left.tile(t), values, begin, pairs);
      });
  }
}

// The same for weights of one or half a byte and float32 rows.
template <class V>
void quantized_block_times_panel(float* c, const LeftBlock<V, float>& left, const Weights& w, int64_t panel,
                                 int64_t first, bool direct) {
  if (direct) {
    for (int64_t t = 0; t < left.tiles; ++t)
      with_constant<kQuantizedRows>(left.count(t), [&](auto m) {
        quantized_tile<V, m>(c + left.first(t) * kPanel, left.tile(t), w, panel);
      });
    return;
  }
  static thread_local Scratch scratch;
  float* wide = scratch.get<float>(kInnerInputs * kPanel);
  for (int64_t begin = 0; begin < left.pairs; begin += kInnerInputs / 2) {
    const int64_t pairs = std::min(kInnerInputs / 2, left.pairs - begin);
    dequantize<V>(wide, w, panel, first + 2 * begin, 2 * pairs);
    for (int64_t t = 0; t < left.tiles; ++t)
      with_constant<V::MR>(left.count(t), [&](auto m) {
        tile_times_panel<V, m, float>(c + left.first(t) * kPanel, left.tile(t) + begin * 2 * m, wide, 0, pairs);
      });
  }
}

// Whichever of the two it takes.
template <class V, class B>
void panel_product(float* c, const LeftBlock<V, B>& left, const Weights& w, int64_t panel, int64_t first, bool direct) {
  if constexpr (std::is_same_v<B, float>) {
    if (w.quantized()) return quantized_block_times_panel<V>(c, left, w, panel, first, direct);
  }
  if constexpr (kTakesCodes<V, B>) {
    if (w.coded()) return codes_times_panel<V>(c, left, w, panel, first);
  }
  block_times_panel<V, B>(c, left, w, panel, first);
}

template <class V, class T>
void store_panel(const Gemm& g, const float* c, int64_t row, int64_t rows, int64_t panel) {
  using F = typename V::F;
  const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, g.w.n - column);
  for (int64_t m = 0; m < rows; ++m) {
    T* out = (T*)g.out + (row + m) * g.ldo + column;
    const T* bias = g.bias ? (const T*)g.bias + column : nullptr;
    for (int64_t n = 0; n < width; n += V::W) {
      const int lanes = int(std::min<int64_t>(V::W, width - n));
      F x = V::load(c + m * kPanel + n);
      if (bias) x = V::add(x, V::load_n(bias + n, lanes));
      if (lanes == V::W) V::store(out + n, x); else V::store_n(out + n, x, lanes);
    }
  }
}

template <class V>
void store_panel(const Gemm& g, const float* c, int64_t row, int64_t rows, int64_t panel) {
  if (g.out_type == DType::bf16) store_panel<V, bf16>(g, c, row, rows, panel);
  else store_panel<V, float>(g, c, row, rows, panel);
}

// Inputs begin to end of a tile's rows; row m of the block is row_of(m) of x.
template <class V, class B, class X, class RowOf>
void pack_tile(const LeftBlock<V, B>& left, int64_t tile, const Weights& w, const X* x, int64_t ldx, int64_t begin,
               int64_t end, const RowOf& row_of) {
  static thread_local Scratch store;
  for (int m = 0; m < left.count(tile); ++m) {
    const X* row = x + row_of(left.first(tile) + m) * ldx;
    auto* to = left.tile(tile) + 2 * m;
    if (w.rounding == DType::f32) {
      pack_left<V>(to, left.count(tile), row + begin, end - begin);
    } else {
      float* rounded = store.get<float>(w.k);
      round_row<V>(rounded, row, w);
      pack_left<V>(to, left.count(tile), rounded + begin, end - begin);
    }
  }
}

// Of rows that meet codes with zeros: their sums over each group of inputs, [rows][groups].
template <class V, class B>
void sum_rows(const Gemm& g, const LeftBlock<V, B>& left, int64_t row, int64_t begin, int64_t end, int64_t tile) {
  for (int64_t m = left.first(tile); m < left.first(tile) + left.count(tile); ++m)
    sum_groups<V>(left.sums + m * left.groups, (const bf16*)g.x + (row + m) * g.ldx, g.w, begin, end);
}

template <class V, class B>
void pack_rows(const Gemm& g, const LeftBlock<V, B>& left, int64_t row, int64_t begin, int64_t end, int64_t tile) {
  const auto row_of = [&](int64_t m) { return row + m; };
  if (g.x_type == DType::bf16) pack_tile(left, tile, g.w, (const bf16*)g.x, g.ldx, begin, end, row_of);
  else pack_tile(left, tile, g.w, (const float*)g.x, g.ldx, begin, end, row_of);
}

// B: what panels hold; quantized weights take B = float, and codes bf16 where its pairs are multiplied.
template <class V, class B>
void gemm_typed(const Gemm& g) {
  const Weights& w = g.w;
  const int64_t panels = cdiv<int64_t>(w.n, kPanel);
  const bool direct = direct_kind(w.kind) && g.m <= kQuantizedRows * kDirectTiles;
  const int64_t outer = direct ? w.k : kOuterInputs;
  const bool summed = kTakesCodes<V, B> && w.coded() && w.zeros;
  static Scratch left_store, sum_store, group_store;
  const int64_t tiles = cdiv<int64_t>(kBlockRows, direct ? kQuantizedRows : V::MR);  // of a whole block
  const int64_t most = region_rows(sizeof(Left<V, B>) * std::min(w.k, outer) + (w.k > outer ? sizeof(float) * panels * kPanel : 0));
  for (int64_t row = 0; row < g.m; row += most) {
    const int64_t rows = std::min(most, g.m - row), blocks = cdiv(rows, kBlockRows);
    float* sums = w.k > outer ? sum_store.get<float>(panels * rows * kPanel) : nullptr;
    for (int64_t begin = 0; begin < w.k; begin += outer) {
      const int64_t end = std::min(w.k, begin + outer), groups = summed ? groups_within(w, begin, end) : 0;
      Left<V, B>* const store = left_store.get<Left<V, B>>(LeftBlock<V, B>::size(rows, end - begin));
      float* const group_sums = group_store.get<float>(rows * groups + 1);
      const auto block_of = [&](int64_t block) {
        const int64_t first = block * kBlockRows;
        LeftBlock<V, B> left(std::min(kBlockRows, rows - first), end - begin,
                             store + LeftBlock<V, B>::size(first, end - begin), direct ? kQuantizedRows : V::MR);
        left.groups = groups;
        left.sums = group_sums + first * groups;
        return left;
      };
      const int64_t all_tiles = (blocks - 1) * tiles + block_of(blocks - 1).tiles;
      // A few rows are packed sooner than another thread would have begun.
      parallel_for(all_tiles, rows * (end - begin) <= kWorthPacking ? all_tiles : 1, [&](int64_t t, int64_t stop) {
        for (; t < stop; ++t) {
          const LeftBlock<V, B> left = block_of(t / tiles);
          const int64_t first = row + t / tiles * kBlockRows;
          pack_rows(g, left, first, begin, end, t % tiles);
          if (summed) sum_rows(g, left, first, begin, end, t % tiles);
        }
      });
      stream_for(blocks * panels, 1, [&](int64_t item, int64_t stop) {
        alignas(64) float c[kBlockRows * kPanel];
        for (; item < stop; ++item) {
          const int64_t first = item / panels * kBlockRows, panel = item % panels;
          const LeftBlock<V, B> left = block_of(item / panels);
          const size_t bytes = sizeof(float) * left.rows * kPanel;
          float* kept = sums ? sums + (first * panels + panel * left.rows) * kPanel : nullptr;
          if (begin) std::memcpy(c, kept, bytes); else std::memset(c, 0, bytes);
          panel_product<V, B>(c, left, w, panel, begin, direct);
          if (end < w.k) std::memcpy(kept, c, bytes); else store_panel<V>(g, c, row + first, left.rows, panel);
        }
      });
    }
  }
}

template <class V>
void gemm(const Gemm& g) {
  const auto store = [&](const float* c, int64_t row, int64_t rows, int64_t panel) {
    store_panel<V>(g, c, row, rows, panel);
  };
  if (g.w.sums) return whole_gemm<W8A8<V>>(g, store);
  if constexpr (V::kFastBytes) {
    if (FixedPoint<V>::serves(g)) return whole_gemm<FixedPoint<V>>(g, store);
  }
  if constexpr (V::kTiles) {
    if (TiledRows<V>::serves(g.w, g.m)) return whole_gemm<TiledRows<V>>(g, store);
  }
  // Codes are whole numbers, which bf16 holds as they are: scales are put on for a group at a time.
  const bool codes = kTakesCodes<V, bf16> && g.w.coded() && g.w.rounding == DType::f32 && g.x_type == DType::bf16;
  if (g.w.kind == DType::bf16 || codes) gemm_typed<V, bf16>(g);
  else gemm_typed<V, float>(g);
}

}  // namespace anychip
