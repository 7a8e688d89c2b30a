// Many rows of bf16 times codes: a panel's codes become bf16 once for all rows, exactly, and a group's products are summed
// before its scale is put on them.
#pragma once

#include <algorithm>

#include "codes.h"
#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

constexpr int64_t kCodedInputs = 512;  // of a pass: 32 KB of bf16 stay in L1

template <class V, class B>
constexpr bool kTakesCodes = V::kHasDot && std::is_same_v<B, bf16>;

// Rows of tile `index` of `tiles` that share `rows` as evenly as they can.
inline int64_t tile_start(int64_t rows, int64_t tiles, int64_t index) { return rows * index / tiles; }

// The left operand of some rows and inputs: tiles one after the other, each [pairs][its rows][2].
template <class V, class B>
struct LeftBlock {
  int64_t rows, tiles, pairs;
  Left<V, B>* data;
  float* sums = nullptr;  // [rows][groups], of products that want them
  int64_t groups = 0;

  LeftBlock(int64_t rows, int64_t width, Left<V, B>* data, int64_t most = V::MR)
      : rows(rows), tiles(cdiv(rows, most)), pairs(cdiv<int64_t>(width, 2)), data(data) {}
  static size_t size(int64_t rows, int64_t width) { return rows * 2 * cdiv<int64_t>(width, 2); }
  int64_t first(int64_t tile) const { return tile_start(rows, tiles, tile); }
  int count(int64_t tile) const { return int(first(tile + 1) - first(tile)); }
  Left<V, B>* tile(int64_t t) const { return data + first(t) * 2 * pairs; }
};

// Groups that inputs [begin, end) touch.
inline int64_t groups_within(const Weights& w, int64_t begin, int64_t end) {
  return (end - 1) / w.group_size - begin / w.group_size + 1;
}

template <class V>
void sum_groups(float* sums, const bf16* x, const Weights& w, int64_t begin, int64_t end) {
  for (int64_t from = begin; from < end;) {
    const int64_t to = std::min(end, (from / w.group_size + 1) * w.group_size);
    typename V::F four = V::zero();
    int64_t i = from;
    for (; i + V::W <= to; i += V::W) four = V::add(four, V::load(x + i));
    float sum = V::sum(four);
    for (; i < to; ++i) sum += to_float(x[i]);
    *sums++ = sum;
    from = to;
  }
}

// c += a tile's rows times inputs [begin, end) of a panel, within one group, of which `numbers` are the bf16 pairs.
template <class V, int M>
void group_times_panel(float* c, const bf16* a, const bf16* numbers, const Weights& w, int64_t panel, int64_t group, int64_t pairs,
                       const float* sums, int64_t apart) {
  constexpr int N = V::NV, W = V::W;
  using F = typename V::F;
  for (int column = 0; column < kPanel; column += N * W) {
    F acc[M][N];
    const bf16* b[N];
    clear<V, M, N>(acc);
    for (int n = 0; n < N; ++n) b[n] = numbers + 2 * (column + n * W);
    multiply<V, M, N, bf16, false>(acc, a, 2, 2 * M, b, kPanel, pairs);
    for (int n = 0; n < N; ++n) {
      const F scale = scales_of<V>(w, panel, group, column + n * W);
      F zero;
      if (sums) zero = zeros_of<V>(w, panel, group, column + n * W);
      for (int m = 0; m < M; ++m) {
        float* to = c + m * kPanel + column + n * W;
        F total = V::fma(acc[m][n], scale, V::load(to));
        if (sums) total = V::sub(total, V::mul(zero, V::set1(sums[m * apart])));
        V::store(to, total);
      }
    }
  }
}

// c [left.rows][kPanel] += the block times one panel, whose first input is `first` of the weights.
template <class V>
void codes_times_panel(float* c, const LeftBlock<V, bf16>& left, const Weights& w, int64_t panel, int64_t first) {
  static thread_local Scratch scratch;
  bf16* numbers = scratch.get<bf16>(kCodedInputs * kPanel);
  const int64_t last = std::min(w.k, first + 2 * left.pairs);
  for (int64_t begin = first; begin < last; begin += kCodedInputs) {
    const int64_t end = std::min(last, begin + kCodedInputs);
    with_kind(w.kind, [&](auto kind) { expand_numbers<V, decltype(kind)::value>(numbers, w, panel, begin, end - begin); });
    for (int64_t t = 0; t < left.tiles; ++t)
      for (int64_t from = begin; from < end;) {
        const int64_t group = from / w.group_size, to = std::min(end, (group + 1) * w.group_size);
        const float* sums = left.groups ? left.sums + left.first(t) * left.groups + group - first / w.group_size : nullptr;
        // A group that is longer than a pass has its zeros taken off with its first inputs.
        const bool once = from == first || from == group * w.group_size;
        with_constant<V::MR>(left.count(t), [&](auto m) {
          group_times_panel<V, m>(c + left.first(t) * kPanel, left.tile(t) + (from - first) * m, numbers + (from - begin) * kPanel,
                                  w, panel, group, cdiv<int64_t>(to - from, 2), once ? sums : nullptr, left.groups);
        });
        from = to;
      }
  }
}

}  // namespace anychip
