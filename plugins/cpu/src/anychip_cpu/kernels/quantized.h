// Products with weights of a byte or half of one: expanded to float32 on the way, and whole in bytes (W8A8).
#pragma once

#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

// Panels that a thread takes at a time: few, so that nobody waits long for the last.
inline int64_t panel_grain(int64_t panels) {
  return std::max<int64_t>(1, std::min<int64_t>(8, panels / (16 * num_threads())));
}

constexpr int kQuantizedRows = 6;  // of a tile: its sums, and those of the group at hand

// acc += rows times strip and, if kSums, sums += rows, over inputs [begin, end): groups end at multiples of eight.
template <class V, int M, int N, bool kSums>
ANYCHIP_INLINE void quantized_multiply(typename V::F (&acc)[M][N], typename V::F (&sums)[M], const float* a, const Weights& w, const char* panel,
                                       int column, int64_t begin, int64_t end) {
  if (w.kind == DType::i4) {
    const uint32_t* words = (const uint32_t*)panel + column;
    // Left rows are packed by pairs, [k / 2][M][2]: inputs past the last are not there.
    const auto step = [&](const uint32_t* at, int64_t i, auto nibble) {
      constexpr int J = decltype(nibble)::value;
      typename V::F b[N];
      for (int n = 0; n < N; ++n) b[n] = V::template nibble<J>(at + n * V::W);
      const float* x = a + (i + J) / 2 * 2 * M + (J & 1);
      for (int m = 0; m < M; ++m) {
        const auto value = V::set1(x[2 * m]);
        for (int n = 0; n < N; ++n) acc[m][n] = V::fma(value, b[n], acc[m][n]);
        if constexpr (kSums) sums[m] = V::add(sums[m], value);
      }
    };
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      const uint32_t* at = words + i / 8 * kPanel;
      for (int n = 0; n < N; ++n) __builtin_prefetch(at + n * V::W + 512);
      step(at, i, std::integral_constant<int, 0>{});
      step(at, i, std::integral_constant<int, 1>{});
      step(at, i, std::integral_constant<int, 2>{});
      step(at, i, std::integral_constant<int, 3>{});
      step(at, i, std::integral_constant<int, 4>{});
      step(at, i, std::integral_constant<int, 5>{});
      step(at, i, std::integral_constant<int, 6>{});
      step(at, i, std::integral_constant<int, 7>{});
    }
    if (i < end) {
      const uint32_t* at = words + i / 8 * kPanel;
      const int64_t left = end - i;
      step(at, i, std::integral_constant<int, 0>{});
      if (left > 1) step(at, i, std::integral_constant<int, 1>{});
      if (left > 2) step(at, i, std::integral_constant<int, 2>{});
      if (left > 3) step(at, i, std::integral_constant<int, 3>{});
      if (left > 4) step(at, i, std::integral_constant<int, 4>{});
      if (left > 5) step(at, i, std::integral_constant<int, 5>{});
      if (left > 6) step(at, i, std::integral_constant<int, 6>{});
    }
    return;
  }
  // Two inputs at a time; a group's odd end is half a pair.
  const auto pairs = [&](auto value) {
    using B = decltype(value);
    const B* b[N];
    for (int n = 0; n < N; ++n) b[n] = (const B*)panel + begin * kPanel + column + n * V::W;
    multiply<V, M, N, B>(acc, a + begin * M, 2, 2 * M, b, kPanel, cdiv<int64_t>(end - begin, 2));
  };
  if (w.kind == DType::i8) pairs(int8_t{});
  else pairs(fp8{});
}

// c[m][column] += a tile's rows times a panel over all inputs; `a` is [k / 2][M][2].
template <class V, int M>
void quantized_tile(float* c, const float* a, const Weights& w, int64_t panel) {
  constexpr int N = V::NV, W = V::W;
  using F = typename V::F;
  const int64_t padded = round_up<int64_t>(w.n, kPanel);
  const char* values = w.panel(panel);
  const float implied = w.kind == DType::fp8 ? kFp8Bias : 1.0f;
  for (int column = 0; column < kPanel; column += N * W) {
    F total[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = V::load(c + m * kPanel + column + n * W);
    for (int64_t group = 0; group < w.groups; ++group) {
      const int64_t begin = group * w.group_size, end = std::min(w.k, begin + w.group_size);
      F acc[M][N], sums[M];
      clear<V, M, N>(acc);
      for (int m = 0; m < M; ++m) sums[m] = V::zero();
      if (w.zeros) quantized_multiply<V, M, N, true>(acc, sums, a, w, values, column, begin, end);
      else quantized_multiply<V, M, N, false>(acc, sums, a, w, values, column, begin, end);
      const int64_t place = group * padded + panel * kPanel + column;
      for (int n = 0; n < N; ++n) {
        const F scale = V::mul(V::load(w.scales + place + n * W), V::set1(implied));
        for (int m = 0; m < M; ++m) total[m][n] = V::fma(acc[m][n], scale, total[m][n]);
        if (!w.zeros) continue;
        const F zero = V::mul(V::load(w.zeros + place + n * W), V::set1(-1));
        for (int m = 0; m < M; ++m) total[m][n] = V::fma(sums[m], zero, total[m][n]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) V::store(c + m * kPanel + column + n * W, total[m][n]);
  }
}

// float32 [count][kPanel] of a panel's inputs from `first` on; inputs past the last become zero.
template <class V>
void dequantize(float* out, const Weights& w, int64_t panel, int64_t first, int64_t count) {
  using F = typename V::F;
  const int64_t padded = round_up<int64_t>(w.n, kPanel);
  const float implied = w.kind == DType::fp8 ? kFp8Bias : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t input = first + i;
    float* row = out + i * kPanel;
    if (input >= w.k) {
      std::memset(row, 0, sizeof(float) * kPanel);
      continue;
    }
    const int64_t place = input / w.group_size * padded + panel * kPanel;
    for (int column = 0; column < kPanel; column += V::W) {
      F x;
      if (w.kind == DType::i4) {
        const uint32_t* words = (const uint32_t*)w.panel(panel) + input / 8 * kPanel + column;
        switch (input % 8) {
          case 0: x = V::template nibble<0>(words); break;
          case 1: x = V::template nibble<1>(words); break;
          case 2: x = V::template nibble<2>(words); break;
          case 3: x = V::template nibble<3>(words); break;
          case 4: x = V::template nibble<4>(words); break;
          case 5: x = V::template nibble<5>(words); break;
          case 6: x = V::template nibble<6>(words); break;
          default: x = V::template nibble<7>(words);
        }
      } else if (w.kind == DType::i8) {
        x = V::template half<0>((const int8_t*)w.panel(panel) + input * kPanel + column, 0);
      } else {
        x = V::template half<0>((const fp8*)w.panel(panel) + input * kPanel + column, 0);
      }
      x = V::mul(x, V::mul(V::load(w.scales + place + column), V::set1(implied)));
      if (w.zeros) x = V::sub(x, V::load(w.zeros + place + column));
      V::store(row + column, x);
    }
  }
}

// -- activations in a byte ---------------------------------------------------------------------------------------

// A row as its scheme's product sees it, in float32 again.
template <class V, class X>
void round_row(float* out, const X* x, const Weights& w) {
  const float limit = w.rounding == DType::i8 ? 127.0f : 448.0f;
  for (int64_t begin = 0; begin < w.k; begin += w.rounding_group) {
    const int64_t end = std::min(w.k, begin + w.rounding_group);
    float largest = 0;
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(to_float(x[i])));
    const float scale = w.fixed_scale ? *w.fixed_scale : std::max(largest, 1e-12f) / limit;
    for (int64_t i = begin; i < end; ++i) {
      const float scaled = to_float(x[i]) / scale;
      out[i] = scale * (w.rounding == DType::i8 ? std::nearbyint(scaled) : decode(encode_fp8(scaled)));
    }
  }
}

// -- W8A8: activations in bytes too, with a scale for each row ------------------------------------------------------

// A row as unsigned bytes, 128 added, and its scale: symmetric, rounded to nearest, largest value 127.
template <class V, class X>
float quantize_row(uint8_t* out, size_t stride, const X* x, int64_t k) {
  using F = typename V::F;
  const F sign = V::set1(-1);
  F most = V::zero();
  int64_t i = 0;
  for (; i + V::W <= k; i += V::W) {
    const F value = V::load(x + i);
    most = V::max(most, V::max(value, V::mul(value, sign)));
  }
  float largest = V::most(most);
  for (; i < k; ++i) largest = std::max(largest, std::fabs(to_float(x[i])));
  const float scale = std::max(largest, 1e-12f) / 127.0f;
  for (i = 0; i < k; ++i) out[i / 4 * stride + i % 4] = uint8_t(int(std::nearbyint(to_float(x[i]) / scale)) + 128);
  for (; i % 4; ++i) out[i / 4 * stride + i % 4] = 128;
  return scale;
}

template <class V, int M>
void bytes_tile(float* c, const uint8_t* a, const float* row_scales, const Weights& w, int64_t panel) {
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
      for (int m = 0; m < M; ++m) {
        int32_t four;
        std::memcpy(&four, x + 4 * m, 4);
        for (int n = 0; n < N; ++n) acc[m][n] = V::dot4(acc[m][n], V::set1_i(four), b[n]);
      }
    }
    for (int n = 0; n < N; ++n) {
      const int64_t place = panel * kPanel + column + n * W;
      const auto scale = V::load(w.scales + place);
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

// All tiles of `rows` rows, tile t from row rows * t / tiles on.
template <class V>
void bytes_panel(float* c, const uint8_t* left, const float* scales, const Weights& w, int64_t panel, int64_t rows,
                 int64_t tiles) {
  const int64_t width = cdiv<int64_t>(w.k, 4) * 4;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, count = rows * (t + 1) / tiles - begin;
    with_constant<V::MR>(int(count), [&](auto m) {
      constexpr int M = decltype(m)::value;
      bytes_tile<V, M>(c + begin * kPanel, left + begin * width, scales + begin, w, panel);
    });
  }
}

template <class V, class Store>
void gemm_bytes(const Gemm& g, const Store& store) {
  const Weights& w = g.w;
  const int64_t panels = cdiv<int64_t>(w.n, kPanel), quads = cdiv<int64_t>(w.k, 4);
  static Scratch shared_left, shared_scales;
  for (int64_t row = 0; row < g.m; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, g.m - row), tiles = cdiv<int64_t>(rows, V::MR);
    uint8_t* left = shared_left.get<uint8_t>(rows * quads * 4);
    float* scales = shared_scales.get<float>(rows);
    const auto first = [&](int64_t tile) { return rows * tile / tiles; };
    parallel_for(tiles, 1, [&](int64_t t, int64_t stop) {
      for (; t < stop; ++t) {
        const int64_t begin = first(t), count = first(t + 1) - begin;
        for (int64_t m = 0; m < count; ++m) {
          uint8_t* to = left + begin * quads * 4 + 4 * m;
          const int64_t at = (row + begin + m) * g.ldx;
          scales[begin + m] = g.x_type == DType::bf16 ? quantize_row<V>(to, 4 * count, (const bf16*)g.x + at, w.k)
                                                      : quantize_row<V>(to, 4 * count, (const float*)g.x + at, w.k);
        }
      }
    });
    parallel_for(panels, panel_grain(panels),
                 [&](int64_t panel, int64_t stop) {
                   alignas(64) float c[kBlockRows * kPanel];
                   for (; panel < stop; ++panel) {
                     bytes_panel<V>(c, left, scales, w, panel, rows, tiles);
                     store(g, c, row, rows, panel);
                   }
                 });
  }
}

}  // namespace anychip
