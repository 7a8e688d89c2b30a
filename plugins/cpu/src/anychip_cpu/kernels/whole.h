// The product for forms of the left operand that take a row whole, from its first input to its last.
//
// A form says how many rows make a tile (kRows) and what a row takes: row_bytes, and a scale and a sum for each of its
// `blocks`. It puts a row in its place in a tile (pack), and multiplies a tile with a panel (tile).
#pragma once

#include <algorithm>

#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

constexpr int64_t kRegionBlocks = 24;        // of rows between two joins, at most
constexpr int64_t kRegionBytes = 32 << 20;  // that are kept for them, about

// Rows that are packed, and then multiplied, without a join between their blocks; `bytes` are kept for each.
inline int64_t region_rows(int64_t bytes) {
  return kBlockRows * std::clamp<int64_t>(kRegionBytes / (kBlockRows * bytes), 1, kRegionBlocks);
}

// Some rows, tile after tile.
template <class Form>
struct WholeRows {
  int64_t rows, tiles, width, blocks;
  uint8_t* bytes;
  float* scales;
  int32_t* sums;

  // Block `block` of several, in storage that `stores` keeps: bytes, scales and sums. `all` are the rows of all.
  WholeRows(int64_t rows, const Weights& w, Scratch (&stores)[3], int64_t block = 0, int64_t all = 0)
      : rows(rows), tiles(cdiv<int64_t>(rows, Form::kRows)), width(Form::row_bytes(w)), blocks(Form::blocks(w)) {
    all = std::max(all, rows);
    const int64_t most = cdiv(all, kBlockRows) * (std::min(all, kBlockRows) + Form::kRows);  // a last tile may be read as if full
    bytes = stores[0].get<uint8_t>(most * width) + block * (kBlockRows + Form::kRows) * width;
    scales = stores[1].get<float>(all * blocks + 1) + block * kBlockRows * blocks;
    sums = stores[2].get<int32_t>(all * blocks + 1) + block * kBlockRows * blocks;
  }

  int64_t first(int64_t tile) const { return rows * tile / tiles; }
  int count(int64_t tile) const { return int(first(tile + 1) - first(tile)); }

  // row_of(m) of x is row m.
  template <class X, class RowOf>
  void pack(int64_t tile, const X* x, int64_t ldx, const Weights& w, const RowOf& row_of) const {
    for (int64_t m = 0; m < count(tile); ++m) {
      const int64_t row = first(tile) + m;
      Form::pack(bytes + first(tile) * width, m, count(tile), x + row_of(row) * ldx, w, scales + row * blocks, sums + row * blocks);
    }
  }

  // c [rows, to a full last tile][kPanel] becomes the product with a panel.
  void times_panel(float* c, const Weights& w, int64_t panel) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = first(t);
      Form::tile(c + m * kPanel, bytes + m * width, count(t), scales + m * blocks, sums + m * blocks, w, panel);
    }
  }
};

// store(c, row, rows, panel) takes the products of some rows with a panel.
template <class Form, class Store>
void whole_gemm(const Gemm& g, const Store& store) {
  static Scratch stores[3];
  const int64_t panels = cdiv<int64_t>(g.w.n, kPanel);
  const int64_t tiles = cdiv<int64_t>(kBlockRows, Form::kRows);  // of a whole block
  const int64_t most = region_rows(Form::row_bytes(g.w));
  for (int64_t row = 0; row < g.m; row += most) {
    const int64_t rows = std::min(most, g.m - row), blocks = cdiv(rows, kBlockRows);
    const auto block_of = [&](int64_t block) {  // storage has grown with the first: any thread may ask then
      return WholeRows<Form>(std::min(kBlockRows, rows - block * kBlockRows), g.w, stores, block, rows);
    };
    const int64_t all_tiles = (blocks - 1) * tiles + block_of(blocks - 1).tiles;
    parallel_for(all_tiles, 1, [&](int64_t t, int64_t stop) {
      for (; t < stop; ++t) {
        const WholeRows<Form> left = block_of(t / tiles);
        const auto row_of = [&](int64_t m) { return row + t / tiles * kBlockRows + m; };
        if (g.x_type == DType::bf16) left.pack(t % tiles, (const bf16*)g.x, g.ldx, g.w, row_of);
        else left.pack(t % tiles, (const float*)g.x, g.ldx, g.w, row_of);
      }
    });
    stream_for(blocks * panels, 1, [&](int64_t item, int64_t stop) {
      alignas(64) float c[kBlockRows * kPanel];
      for (; item < stop; ++item) {
        const WholeRows<Form> left = block_of(item / panels);
        left.times_panel(c, g.w, item % panels);
        store(c, row + item / panels * kBlockRows, left.rows, item % panels);
      }
    });
  }
}

}  // namespace anychip
