// Products with weights of a byte or half of one, expanded to float32 on the way.
#pragma once

#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "codes.h"
#include "functions.h"
#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

constexpr int kQuantizedRows = 6;  // of a tile: its sums, and those of the group at hand

// Inputs that a word of four bytes holds.
constexpr int inputs_of_word(DType kind) { return kind == DType::i4 ? 8 : 4; }

// Whether few rows meet weights without their being expanded first.
constexpr bool direct_kind(DType kind) { return kind == DType::i4 || kind == DType::i8 || kind == DType::fp8; }

// Input J of every word.
template <class V, DType kKind, int J>
ANYCHIP_INLINE typename V::F input_of(const uint32_t* words) {
  if constexpr (kKind == DType::i4) return V::template nibble<J>(words);
  else return V::template byte<J>(words);
}

// acc += rows times strip and, if kSums, sums += rows, over inputs [begin, end) of weights in words; groups end at
// multiples of eight. Left rows are packed by pairs, [k / 2][M][2]: inputs past the last are not there.
template <class V, int M, int N, bool kSums, DType kKind>
ANYCHIP_INLINE void words_multiply(typename V::F (&acc)[M][N], typename V::F (&sums)[M], const float* a,
                                   const char* panel, int column, int64_t begin, int64_t end) {
  constexpr int S = kSets<M, N>, kInputs = inputs_of_word(kKind);
  typename V::F sets[S][M][N];
  for (int s = 0; s < S; ++s) clear<V, M, N>(sets[s]);
  const auto step = [&](const uint32_t* at, int64_t i, auto place) __attribute__((always_inline)) {
    constexpr int J = decltype(place)::value;
    typename V::F b[N];
    for (int n = 0; n < N; ++n) b[n] = input_of<V, kKind, J>(at + n * V::W);
    const float* x = a + (i + J) / 2 * 2 * M + (J & 1);
    for (int m = 0; m < M; ++m) {
      const auto value = V::set1(x[2 * m]);
      for (int n = 0; n < N; ++n) sets[J % S][m][n] = V::fma(value, b[n], sets[J % S][m][n]);
      if constexpr (kSums) sums[m] = V::add(sums[m], value);
    }
  };
  const auto word = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const uint32_t* at = (const uint32_t*)panel + column + i / kInputs * kPanel;
    step(at, i, std::integral_constant<int, 0>{});
    if (count > 1) step(at, i, std::integral_constant<int, 1>{});
    if (count > 2) step(at, i, std::integral_constant<int, 2>{});
    if (count > 3) step(at, i, std::integral_constant<int, 3>{});
    if constexpr (kInputs == 8) {
      if (count > 4) step(at, i, std::integral_constant<int, 4>{});
      if (count > 5) step(at, i, std::integral_constant<int, 5>{});
      if (count > 6) step(at, i, std::integral_constant<int, 6>{});
      if (count > 7) step(at, i, std::integral_constant<int, 7>{});
    }
  };
  int64_t i = begin;
  for (; i + kInputs <= end; i += kInputs) {
    for (int n = 0; n < N; ++n)
      __builtin_prefetch((const uint32_t*)panel + column + i / kInputs * kPanel + n * V::W + 512);
    word(i, kInputs);
  }
  if (i < end) word(i, end - i);
  add_sets<V, S, M, N>(sets);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = V::add(acc[m][n], sets[0][m][n]);
}

template <class V, int M, int N, bool kSums>
ANYCHIP_INLINE void quantized_multiply(typename V::F (&acc)[M][N], typename V::F (&sums)[M], const float* a,
                                       const Weights& w, const char* panel, int column, int64_t begin, int64_t end) {
  if (w.kind == DType::i4) return words_multiply<V, M, N, kSums, DType::i4>(acc, sums, a, panel, column, begin, end);
  if (w.kind == DType::i8) return words_multiply<V, M, N, kSums, DType::i8>(acc, sums, a, panel, column, begin, end);
  // Two inputs at a time; a group's odd end is half a pair.
  const fp8* b[N];
  for (int n = 0; n < N; ++n) b[n] = (const fp8*)panel + begin * kPanel + column + n * V::W;
  multiply<V, M, N, fp8>(acc, a + begin * M, 2, 2 * M, b, kPanel, cdiv<int64_t>(end - begin, 2));
}

// c[m][column] += a tile's rows times a panel over all inputs; `a` is [k / 2][M][2].
template <class V, int M>
void quantized_tile(float* c, const float* a, const Weights& w, int64_t panel) {
  constexpr int N = V::NV, W = V::W;
  using F = typename V::F;
  const char* values = w.panel(panel);
  const float implied = w.kind == DType::fp8 ? kFp8Bias : 1.0f;
  const bool offset = w.zeros || w.lift != 0;
  for (int column = 0; column < kPanel; column += N * W) {
    F total[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = V::load(c + m * kPanel + column + n * W);
    for (int64_t group = 0; group < w.groups; ++group) {
      const int64_t begin = group * w.group_size, end = std::min(w.k, begin + w.group_size);
      F acc[M][N], sums[M];
      clear<V, M, N>(acc);
      for (int m = 0; m < M; ++m) sums[m] = V::zero();
      if (offset) quantized_multiply<V, M, N, true>(acc, sums, a, w, values, column, begin, end);
      else quantized_multiply<V, M, N, false>(acc, sums, a, w, values, column, begin, end);
      for (int n = 0; n < N; ++n) {
        const F scale = V::mul(scales_of<V>(w, panel, group, column + n * W), V::set1(implied));
        for (int m = 0; m < M; ++m) total[m][n] = V::fma(acc[m][n], scale, total[m][n]);
        if (!offset) continue;
        F added = V::mul(scale, V::set1(w.lift));
        if (w.zeros) added = V::sub(added, zeros_of<V>(w, panel, group, column + n * W));
        for (int m = 0; m < M; ++m) total[m][n] = V::fma(sums[m], added, total[m][n]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) V::store(c + m * kPanel + column + n * W, total[m][n]);
  }
}

// float32 [count][kPanel] of a panel's inputs from `first` on, a multiple of 32; inputs past the last become zero. There
// must be room up to the next multiple of 32.
template <class V>
void dequantize(float* out, const Weights& w, int64_t panel, int64_t first, int64_t count) {
  const int64_t held = std::max<int64_t>(0, std::min(count, w.k - first));
  if (w.coded()) {
    with_kind(w.kind, [&](auto kind) { expand<V, decltype(kind)::value>(out, w, panel, first, held); });
  } else {
    for (int64_t i = 0; i < held; ++i)
      for (int column = 0; column < kPanel; column += V::W) {
        const auto x = V::template half<0>((const fp8*)w.panel(panel) + (first + i) * kPanel + column, 0);
        const auto scale = scales_of<V>(w, panel, (first + i) / w.group_size, column);
        V::store(out + i * kPanel + column, V::mul(x, V::mul(scale, V::set1(kFp8Bias))));
      }
  }
  if (held < count) std::memset(out + held * kPanel, 0, sizeof(float) * kPanel * (count - held));
}

// -- activations in a byte ---------------------------------------------------------------------------------------

// A row as its scheme's product sees it, in float32 again.
template <class V, class X>
void round_row(float* out, const X* x, const Weights& w) {
  const float limit = w.rounding == DType::i8 ? 127.0f : 448.0f;
  for (int64_t begin = 0; begin < w.k; begin += w.rounding_group) {
    const int64_t end = std::min(w.k, begin + w.rounding_group);
    const float scale = w.fixed_scale ? *w.fixed_scale : largest_of<V>(x + begin, end - begin) / limit;
    for (int64_t i = begin; i < end; ++i) {
      const float scaled = to_float(x[i]) / scale;
      out[i] = scale * (w.rounding == DType::i8 ? std::nearbyint(scaled) : decode(encode_fp8(scaled)));
    }
  }
}

}  // namespace anychip
