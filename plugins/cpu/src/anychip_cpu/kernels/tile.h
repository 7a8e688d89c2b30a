// The product at the heart of every kernel: a few rows of the left operand, in registers against a strip of columns.
//
// A right operand is stored by pairs of rows: bf16 with the two rows' values of a column side by side (what vdpbf16ps
// and AMX read), every other type with the two rows one after the other. `columns` is the row length, so that a pair
// takes 2 * columns elements either way.
#pragma once

#include <type_traits>

#include "types.h"

#define ANYCHIP_INLINE inline __attribute__((always_inline))

namespace anychip {

constexpr int kPanel = 32;  // columns of packed weights that lie together
constexpr int64_t kBlockRows = 96;  // of a left operand that is taken through all panels
constexpr float kFp8Bias = 256.0f;  // what `half` of fp8 leaves out; folded into scales

// What the left operand is converted to: pairs of bf16 where the processor multiplies those, float32 elsewhere.
template <class V, class B>
using Left = std::conditional_t<V::kHasDot && std::is_same_v<B, bf16>, bf16, float>;

// Calls fn with the integral constant equal to n, 1 <= n <= Max.
template <int Max, class Fn>
ANYCHIP_INLINE void with_constant(int n, const Fn& fn) {
  if constexpr (Max > 1) {
    if (n < Max) return with_constant<Max - 1>(n, fn);
  }
  fn(std::integral_constant<int, Max>{});
}

template <class V, int M, int N>
ANYCHIP_INLINE void clear(typename V::F (&acc)[M][N]) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
}

// A few sums alone would wait for one another: so many sets of them take turns.
template <int M, int N>
constexpr int kSets = M * N <= 2 ? 4 : M * N <= 8 ? 2 : 1;

// The first of S sets of sums becomes the sum of all.
template <class V, int S, int M, int N>
ANYCHIP_INLINE void add_sets(typename V::F (&sets)[S][M][N]) {
  for (int s = 1; s < S; ++s)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sets[0][m][n] = V::add(sets[0][m][n], sets[s][m][n]);
}

// acc[m][n] += sum over pairs of left row m times strip n, W columns from b[n] on. Element h of pair p of row m is
// a[m * row + p * pair + h]. kStream: the strips come from memory, and are asked for ahead.
template <class V, int M, int N, class B, bool kStream = true>
ANYCHIP_INLINE void multiply(typename V::F (&acc)[M][N], const Left<V, B>* a, size_t row, size_t pair,
                             const B* const (&b)[N], size_t columns, size_t pairs) {
  [[maybe_unused]] constexpr size_t kAhead = 8192 / sizeof(B);
  constexpr bool kPairs = std::is_same_v<Left<V, B>, bf16>;  // one product for both halves of a pair
  constexpr int S = kSets<M, N>, kTurns = kPairs ? S : (S + 1) / 2;
  typename V::F sets[S][M][N];
  for (int s = 1; s < S; ++s) clear<V, M, N>(sets[s]);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sets[0][m][n] = acc[m][n];
  const auto half = [&](typename V::F (&sums)[M][N], auto h, const auto* x, size_t at) __attribute__((always_inline)) {
    typename V::F w[N];
    for (int n = 0; n < N; ++n) w[n] = V::template half<decltype(h)::value>(b[n] + at, columns);
    for (int m = 0; m < M; ++m) {
      const auto value = V::set1(x[m * row + decltype(h)::value]);
      for (int n = 0; n < N; ++n) sums[m][n] = V::fma(value, w[n], sums[m][n]);
    }
  };
  const auto step = [&](size_t p, auto turn) __attribute__((always_inline)) {
    constexpr int kTurn = decltype(turn)::value;
    const size_t at = p * 2 * columns;
    const auto* x = a + p * pair;
    if constexpr (kStream)
      for (int n = 0; n < N; ++n) __builtin_prefetch(b[n] + at + kAhead, 0, 2);
    if constexpr (kPairs) {
      typename V::Pair w[N];
      for (int n = 0; n < N; ++n) w[n] = V::pair(b[n] + at);
      for (int m = 0; m < M; ++m) {
        const auto both = V::pair1(x + m * row);
        for (int n = 0; n < N; ++n) sets[kTurn][m][n] = V::dot(sets[kTurn][m][n], both, w[n]);
      }
    } else {
      half(sets[2 * kTurn % S], std::integral_constant<int, 0>{}, x, at);
      half(sets[(2 * kTurn + 1) % S], std::integral_constant<int, 1>{}, x, at);
    }
  };
  size_t p = 0;
  if constexpr (kTurns == 4)
    for (; p + 4 <= pairs; p += 4) {
      step(p, std::integral_constant<int, 0>{}), step(p + 1, std::integral_constant<int, 1>{});
      step(p + 2, std::integral_constant<int, 2>{}), step(p + 3, std::integral_constant<int, 3>{});
    }
  if constexpr (kTurns == 2)
    for (; p + 2 <= pairs; p += 2) step(p, std::integral_constant<int, 0>{}), step(p + 1, std::integral_constant<int, 1>{});
  for (; p < pairs; ++p) step(p, std::integral_constant<int, 0>{});
  add_sets<V, S, M, N>(sets);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = sets[0][m][n];
}

// One row of x as row `to` of a left operand [pairs][rows][2]; an odd end is filled up with zero.
template <class V, class T, class X>
inline void pack_left(T* to, int64_t rows, const X* x, int64_t width) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>)
    for (; i + V::W <= width; i += V::W, to += V::W * rows) V::store_pairs(to, 2 * rows, V::load(x + i));
  for (; i + 1 < width; i += 2, to += 2 * rows) {
    if constexpr (std::is_same_v<T, X>) {
      std::memcpy(to, x + i, 2 * sizeof(T));
    } else {
      from_float(to_float(x[i]), &to[0]);
      from_float(to_float(x[i + 1]), &to[1]);
    }
  }
  if (i < width) from_float(to_float(x[i]), &to[0]), from_float(0, &to[1]);
}

}  // namespace anychip
