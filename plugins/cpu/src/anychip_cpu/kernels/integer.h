// Products in whole numbers, of which a processor adds up four bytes at a time.
//
// W8A8 takes activations as a byte, as its scheme asks. FixedPoint serves weights of a byte or half of one that are to
// meet bfloat16 activations as they are: a block of a row becomes 16-bit fixed point, in two bytes a value, which keeps
// 2^-16 of its greatest value; bfloat16 itself keeps 2^-9 of that. Blocks keep a model's few huge activations from
// flattening the others of their row.
#pragma once

#include <algorithm>
#include <cmath>

#include "codes.h"
#include "functions.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

inline int32_t four_bytes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// -- activations in a byte ---------------------------------------------------------------------------------------

// Rows as unsigned bytes, 128 added, symmetric, rounded to nearest: tile by tile [quads][its rows][4].
template <class V>
struct W8A8 {
  static constexpr int kRows = V::MR;  // of a tile
  static int64_t row_bytes(const Weights& w) { return round_up<int64_t>(w.k, 4); }
  static int64_t blocks(const Weights&) { return 1; }

  // Row m of a tile of `count`.
  template <class X>
  static void pack(uint8_t* out, int64_t m, int64_t count, const X* x, const Weights& w, float* scales, int32_t*) {
    out += 4 * m;
    const float scale = *scales = largest_of<V>(x, w.k) / 127.0f;
    int64_t i = 0;
    for (; i < w.k; ++i) out[i / 4 * 4 * count + i % 4] = uint8_t(int(std::nearbyint(to_float(x[i]) / scale)) + 128);
    for (; i % 4; ++i) out[i / 4 * 4 * count + i % 4] = 128;
  }

  static void tile(float* c, const uint8_t* a, int count, const float* row_scales, const int32_t*, const Weights& w, int64_t panel) {
    with_constant<kRows>(count, [&](auto rows) { tile_of<decltype(rows)::value>(c, a, row_scales, w, panel); });
  }

 private:
  template <int M>
  static void tile_of(float* c, const uint8_t* a, const float* row_scales, const Weights& w, int64_t panel) {
    constexpr int N = V::NV, W = V::W;
    const int8_t* values = (const int8_t*)w.panel(panel);
    const int64_t quads = cdiv<int64_t>(w.k, 4);
    for (int column = 0; column < kPanel; column += N * W) {
      typename V::I acc[M][N];
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) acc[m][n] = V::zero_i();
      const uint8_t* x = a;
      for (int64_t q = 0; q < quads; ++q, x += 4 * M) {
        const int8_t* at = values + (q * kPanel + column) * 4;
        typename V::I b[N];
        for (int n = 0; n < N; ++n) b[n] = V::load_i(at + n * W * 4);
        if constexpr (M <= 4)
          for (int n = 0; n < N; ++n) __builtin_prefetch(at + n * W * 4 + 2048);
        for (int m = 0; m < M; ++m)
          for (int n = 0; n < N; ++n) acc[m][n] = V::dot4(acc[m][n], V::set1_i(four_bytes(x + 4 * m)), b[n]);
      }
      for (int n = 0; n < N; ++n) {
        const int64_t place = panel * kPanel + column + n * W;
        const auto scale = V::load((const float*)w.scales + place);
        int32_t sums[W], held[W];
        std::memcpy(sums, w.sums + place, sizeof sums);
        for (int m = 0; m < M; ++m) {
          std::memcpy(held, &acc[m][n], sizeof held);
          for (int i = 0; i < W; ++i) held[i] -= sums[i];
          const auto exact = V::to_float(V::load_i(held));
          V::store(c + m * kPanel + column + n * W, V::mul(V::mul(exact, V::set1(row_scales[m])), scale));
        }
      }
    }
  }
};

// -- activations in 16-bit fixed point -----------------------------------------------------------------------------

// Rows by eight inputs: [eights][2][high, low][its rows][4], the halves of an eight being the fours that codes.h makes. A
// block is a group of the weights', or kBlock inputs where they have one scale. Weights are taken as unsigned codes; what
// that adds is taken off again by the rows' sums over each block.
template <class V>
struct FixedPoint {
  static constexpr int kRows = 6;
  static constexpr int64_t kMost = 32;  // rows; of more, weights are expanded once for all
  static constexpr int64_t kBlock = 128;

  static bool serves(const Gemm& g) {
    return g.w.coded() && g.w.rounding == DType::f32 && g.x_type == DType::bf16 && g.m <= kMost;
  }
  static int64_t row_bytes(const Weights& w) { return cdiv<int64_t>(w.k, 8) * 16; }
  static int64_t block_size(const Weights& w) { return w.groups > 1 ? w.group_size : kBlock; }
  static int64_t blocks(const Weights& w) { return cdiv(w.k, block_size(w)); }

  template <class X>
  static void pack(uint8_t* out, int64_t m, int64_t count, const X* x, const Weights& w, float* scales, int32_t* sums) {
    out += 4 * m;
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    for (int64_t block = 0; block < blocks(w); ++block) {
      const int64_t begin = block * block_size(w), end = std::min(w.k, begin + block_size(w));
      const float factor = 32512.0f / largest_of<V>(x + begin, end - begin);
      float unsound = 0;  // NaN where the block holds one, or an infinity: no integer says so
      int32_t sum = 0;
      for (int64_t i = begin; i < end; i += 8) {
        int32_t fixed[8] = {};
        for (int64_t j = 0; j < std::min<int64_t>(8, end - i); ++j) {
          const float value = to_float(x[i + j]), whole = value * factor + kToInteger;
          unsound += value * 0.0f;
          fixed[j] = four_bytes(&whole) - 0x4b400000;
          sum += fixed[j];
        }
        uint8_t* to = out + i * 2 * count;
        for (int half = 0; half < 2; ++half)
          for (int j = 0; j < 4; ++j) {
            const int32_t value = fixed[w.kind == DType::i8 ? 4 * half + j : 2 * j + half];
            to[half * 8 * count + j] = uint8_t((value + 128) >> 8);
            to[half * 8 * count + 4 * count + j] = uint8_t(value);
          }
      }
      scales[block] = 1 / factor + unsound;
      sums[block] = sum;
    }
  }

  static void tile(float* c, const uint8_t* a, int count, const float* row_scales, const int32_t* sums, const Weights& w, int64_t panel) {
    with_constant<kRows>(count, [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      with_kind(w.kind, [&](auto kind) { tile_of<M, decltype(kind)::value>(c, a, row_scales, sums, w, panel); });
    });
  }

 private:
  template <int M, DType kKind>
  static void tile_of(float* c, const uint8_t* a, const float* row_scales, const int32_t* sums, const Weights& w, int64_t panel) {
    constexpr int N = V::NV, W = V::W, kWords = code_bits(kKind) * kPanel;  // of a block of codes
    constexpr int S = M == 1 ? 2 : 1;                                       // one row's sums would wait for one another
    using F = typename V::F;
    using I = typename V::I;
    const F less = V::set1(-(code_zero(kKind) - w.lift));
    for (int column = 0; column < kPanel; column += N * W) {
      const uint32_t* words = (const uint32_t*)w.panel(panel) + column;
      F total[M][N];
      clear<V, M, N>(total);
      for (int64_t block = 0; block < blocks(w); ++block) {
        const int64_t begin = block * block_size(w) / 8, end = cdiv<int64_t>(std::min(w.k, (block + 1) * block_size(w)), 8);
        I sets[S][2][M][N];
        for (auto& set : sets)
          for (auto& part : set)
            for (auto& row : part)
              for (I& sum : row) sum = V::zero_i();
        const auto four = [&](int64_t eight, auto which) __attribute__((always_inline)) {
          constexpr int T = decltype(which)::value, kOdd = T % 2;
          const uint32_t* at = words + eight / 4 * kWords;
          const uint8_t* x = a + eight * 16 * M + kOdd * 8 * M;
          I b[N];
          for (int n = 0; n < N; ++n) b[n] = four_codes<V, kKind, T>(at + n * W, w.table);
          for (int m = 0; m < M; ++m)
            for (int part = 0; part < 2; ++part) {
              const I value = V::set1_i(four_bytes(x + part * 4 * M + 4 * m));
              for (int n = 0; n < N; ++n) sets[kOdd % S][part][m][n] = V::dot4(sets[kOdd % S][part][m][n], b[n], value);
            }
        };
        const auto both = [&](int64_t eight, auto of) __attribute__((always_inline)) {  // `of` four of its block
          constexpr int E = decltype(of)::value;
          four(eight, std::integral_constant<int, 2 * E>{});
          four(eight, std::integral_constant<int, 2 * E + 1>{});
        };
        for (int64_t eight = begin; eight < end;) {
          const int64_t left = end - eight;
          if (eight % 4 == 0)
            for (int i = 0; i < kWords / kPanel; ++i)
              for (int n = 0; n < N; ++n)
                __builtin_prefetch(words + eight / 4 * kWords + i * kPanel + n * W + 1024, 0, 2);
          if (eight % 4 == 0 && left >= 4) {
            both(eight, kNumber<0>), both(eight + 1, kNumber<1>), both(eight + 2, kNumber<2>), both(eight + 3, kNumber<3>);
            eight += 4;
          } else if (eight % 2 == 0 && left >= 2) {
            if (eight % 4 == 0) both(eight, kNumber<0>), both(eight + 1, kNumber<1>);
            else both(eight, kNumber<2>), both(eight + 1, kNumber<3>);
            eight += 2;
          } else {
            with_constant<4>(int(eight % 4) + 1, [&](auto n) { both(eight, kNumber<decltype(n)::value - 1>); });
            ++eight;
          }
        }
        const int64_t group = w.groups > 1 ? block : 0;
        for (int n = 0; n < N; ++n) {
          const F scale = scales_of<V>(w, panel, group, column + n * W);
          F zero;
          if (w.zeros) zero = zeros_of<V>(w, panel, group, column + n * W);
          for (int m = 0; m < M; ++m) {
            const int64_t at = m * blocks(w) + block;
            F high = V::to_float(sets[0][0][m][n]), low = V::to_float(sets[0][1][m][n]);
            if constexpr (S == 2) {
              high = V::add(high, V::to_float(sets[1][0][m][n]));
              low = V::add(low, V::to_float(sets[1][1][m][n]));
            }
            const F sum = V::set1(float(sums[at]));
            F exact = V::mul(V::fma(less, sum, V::fma(high, V::set1(256), low)), scale);
            if (w.zeros) exact = V::sub(exact, V::mul(sum, zero));
            total[m][n] = V::fma(exact, V::set1(row_scales[at]), total[m][n]);
          }
        }
      }
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) V::store(c + m * kPanel + column + n * W, total[m][n]);
    }
  }

  template <int kValue>
  static constexpr std::integral_constant<int, kValue> kNumber{};
};

}  // namespace anychip
