// Many rows of bf16 times codes: a panel's codes become bf16 once for all rows, exactly, and a group's products are summed
// before its scale is put on them.
#pragma once

#include <algorithm>

#include "codes.h"
#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

constexpr int64_t kCodedInputs = 256;  // of a pass: 16 KB of bf16, and their scales, stay in L1

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

// What is taken off the bf16 numbers that a code becomes, see expand_numbers.
inline float excess(const Weights& w) { return biased(w.kind) ? kBias + code_zero(w.kind) - w.lift : 0.0f; }
inline bool takes_sums(const Weights& w) { return w.zeros || excess(w) != 0; }

// A pass over some inputs of a panel: pairs of numbers, and of each group the scale, and what its inputs' sum is times.
struct CodedPass {
  bf16* numbers;         // [kCodedInputs / 2][kPanel][2]
  float *scales, *taken;  // [groups][kPanel]
};

template <class V>
void expand_pass(const CodedPass& pass, const Weights& w, int64_t panel, int64_t begin, int64_t end) {
  with_kind(w.kind, [&](auto kind) { expand_numbers<V, decltype(kind)::value>(pass.numbers, w, panel, begin, end - begin); });
  const int64_t first = begin / w.group_size;
  for (int64_t g = 0; g < groups_within(w, begin, end); ++g)
    for (int column = 0; column < kPanel; column += V::W) {
      const auto scale = scales_of<V>(w, panel, first + g, column);
      auto taken = V::mul(scale, V::set1(excess(w)));
      if (w.zeros) taken = V::add(taken, zeros_of<V>(w, panel, first + g, column));
      V::store(pass.scales + g * kPanel + column, scale);
      V::store(pass.taken + g * kPanel + column, taken);
    }
}

// c += a tile's rows times inputs [begin, end) of a panel; `a` is from `begin` on, and `sums` from its group on.
template <class V, int M>
void coded_tile(float* c, const bf16* a, const CodedPass& pass, const Weights& w, int64_t begin, int64_t end, const float* sums,
                int64_t apart, bool first) {
  constexpr int N = V::NV, W = V::W;
  using F = typename V::F;
  for (int column = 0; column < kPanel; column += N * W) {
    F total[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = V::load(c + m * kPanel + column + n * W);
    int64_t g = 0;
    for (int64_t from = begin; from < end; ++g) {
      const int64_t start = (begin / w.group_size + g) * w.group_size, to = std::min(end, start + w.group_size);
      F acc[M][N];
      const bf16* b[N];
      clear<V, M, N>(acc);
      for (int n = 0; n < N; ++n) b[n] = pass.numbers + (from - begin) * kPanel + 2 * (column + n * W);
      multiply<V, M, N, bf16, false>(acc, a + (from - begin) * M, 2, 2 * M, b, kPanel, cdiv<int64_t>(to - from, 2));
      const bool once = sums && (from == start || first);  // of a group longer than a pass, with its first inputs
      for (int n = 0; n < N; ++n) {
        const F scale = V::load(pass.scales + g * kPanel + column + n * W);
        for (int m = 0; m < M; ++m) total[m][n] = V::fma(acc[m][n], scale, total[m][n]);
        if (!once) continue;
        const F taken = V::load(pass.taken + g * kPanel + column + n * W);
        for (int m = 0; m < M; ++m) total[m][n] = V::sub(total[m][n], V::mul(taken, V::set1(sums[m * apart + g])));
      }
      from = to;
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) V::store(c + m * kPanel + column + n * W, total[m][n]);
  }
}

// c [left.rows][kPanel] += the block times one panel, whose first input is `first` of the weights.
template <class V>
void codes_times_panel(float* c, const LeftBlock<V, bf16>& left, const Weights& w, int64_t panel, int64_t first) {
  static thread_local Scratch stores[3];
  constexpr int64_t kMostGroups = kCodedInputs / 8 + 1;
  const CodedPass pass{stores[0].get<bf16>(kCodedInputs * kPanel), stores[1].get<float>(kMostGroups * kPanel),
                       stores[2].get<float>(kMostGroups * kPanel)};
  const int64_t last = std::min(w.k, first + 2 * left.pairs);
  for (int64_t begin = first; begin < last; begin += kCodedInputs) {
    const int64_t end = std::min(last, begin + kCodedInputs), group = begin / w.group_size - first / w.group_size;
    expand_pass<V>(pass, w, panel, begin, end);
    for (int64_t t = 0; t < left.tiles; ++t) {
      const float* sums = left.groups ? left.sums + left.first(t) * left.groups + group : nullptr;
      with_constant<V::MR>(left.count(t), [&](auto m) {
        coded_tile<V, m>(c + left.first(t) * kPanel, left.tile(t) + (begin - first) * m, pass, w, begin, end, sums, left.groups,
                         begin == first);
      });
    }
  }
}

}  // namespace anychip
