// States by channel: the causal convolution, whose state is its last inputs, and Mamba's selective scan.
#pragma once

#include "elementwise.h"
#include "matrix_state.h"
#include "pool.h"
#include "state_types.h"

namespace anychip {

// -- causal convolution -----------------------------------------------------------------------------------------

// Some channels of every row, with lanes along the channels. The inputs that a token sees stay in registers.
template <class V, class T, int kWidth, class L>
ANYCHIP_INLINE void convolve(const ConvolutionCall& c, int64_t channel, L lanes) {
  using F = typename V::F;
  constexpr int kPast = kWidth - 1;
  float by_tap[kWidth][V::W] = {};
  const T* weight = (const T*)c.weight + channel * kWidth;
  for (int l = 0; l < int(lanes); ++l)
    for (int i = 0; i < kWidth; ++i) by_tap[i][l] = to_float(weight[l * kWidth + i]);
  F w[kWidth];
  for (int i = 0; i < kWidth; ++i) w[i] = V::load(by_tap[i]);
  const F bias = c.bias ? load<V>((const T*)c.bias + channel, lanes) : V::zero();
  for (int64_t row = 0; row < c.step.rows; ++row) {
    if (!c.step.count(row)) continue;
    T* tail = (T*)c.tails + c.step.blocks[row] * kPast * c.channels + channel;
    F seen[kWidth];
    for (int i = 0; i < kPast; ++i) seen[i] = c.step.fresh(row) ? V::zero() : load<V>(tail + i * c.channels, lanes);
    for (int64_t t = c.step.query_start[row]; t < c.step.query_start[row + 1]; ++t) {
      seen[kPast] = load<V>((const T*)c.x + t * c.ldx + channel, lanes);
      F sum = V::mul(w[0], seen[0]);
      for (int i = 1; i < kWidth; ++i) sum = V::fma(w[i], seen[i], sum);
      store<V>((T*)c.out + t * c.channels + channel, V::add(sum, bias), lanes);
      for (int i = 0; i < kPast; ++i) seen[i] = seen[i + 1];
    }
    for (int i = 0; i < kPast; ++i) store<V>(tail + i * c.channels, seen[i], lanes);
  }
}

template <class V, class T>
void convolution_typed(const ConvolutionCall& c) {
  clear_padding(c.step, c.out, c.channels * int64_t(sizeof(T)));
  const int64_t strips = cdiv<int64_t>(c.channels, V::W), tokens = c.step.query_start[c.step.rows];
  with_constant<kMostConvolved>(int(c.width), [&](auto width) {
    parallel_for(strips, row_grain(strips, tokens * V::W), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int64_t channel = i * V::W, left = c.channels - channel;
        if (left >= V::W) convolve<V, T, width>(c, channel, std::integral_constant<int, V::W>{});
        else convolve<V, T, width>(c, channel, int(left));
      }
    });
  });
}

template <class V>
void convolution(const ConvolutionCall& c) {
  if (DType(c.type) == DType::bf16) convolution_typed<V, bf16>(c); else convolution_typed<V, float>(c);
}

// -- selective scan ---------------------------------------------------------------------------------------------

constexpr int kScanned = 4;  // channels that share what is loaded of b and c

// `count` channels of a row over some values of the state, which stay in registers for all tokens; `sums`
// [tokens][kScanned] grow by what these values give.
template <class V, class T, class L>
ANYCHIP_INLINE void scan_part(const ScanCall& s, int64_t first, int64_t tokens, float* state, const float* a,
                              int64_t channel, int count, int64_t value, L lanes, float* sums) {
  using F = typename V::F;
  F held[kScanned], decays[kScanned];
  for (int i = 0; i < kScanned; ++i) {
    const int mine = std::min(i, count - 1);  // those past the last repeat it, and are not kept
    held[i] = load<V>(state + mine * s.state_dim, lanes), decays[i] = load<V>(a + mine * s.state_dim, lanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const F b = load<V>((const T*)s.b + (first + t) * s.ldb + value, lanes);
    const F c = load<V>((const T*)s.c + (first + t) * s.ldc + value, lanes);
    const float* dt = s.dt + (first + t) * s.lddt + channel;
    const T* x = (const T*)s.x + (first + t) * s.ldx + channel;
    for (int i = 0; i < kScanned; ++i) {
      const int mine = std::min(i, count - 1);
      const F kept = V::mul(exp<V>(V::mul(V::set1(dt[mine]), decays[i])), held[i]);
      held[i] = V::fma(V::set1(dt[mine] * to_float(x[mine])), b, kept);
      sums[t * kScanned + i] += V::sum(V::mul(held[i], c));
    }
  }
  for (int i = 0; i < count; ++i) store<V>(state + i * s.state_dim, held[i], lanes);
}

template <class V, class T>
void scan_channels(const ScanCall& s, int64_t row, int64_t channel, int count) {
  static thread_local Scratch store;
  const int64_t first = s.step.query_start[row], tokens = s.step.count(row);
  float* sums = store.get<float>(size_t(tokens * kScanned));
  std::fill(sums, sums + tokens * kScanned, 0.0f);
  float* states = s.states + (s.step.blocks[row] * s.channels + channel) * s.state_dim;
  if (s.step.fresh(row)) std::fill(states, states + count * s.state_dim, 0.0f);
  each_vector<V>(s.state_dim, [&](int64_t value, auto lanes) {
    scan_part<V, T>(s, first, tokens, states + value, s.a + channel * s.state_dim + value, channel, count, value, lanes,
                    sums);
  });
  for (int64_t t = 0; t < tokens; ++t)
    for (int i = 0; i < count; ++i) {
      const float x = to_float(((const T*)s.x)[(first + t) * s.ldx + channel + i]);
      from_float(sums[t * kScanned + i] + s.d[channel + i] * x, (T*)s.out + (first + t) * s.channels + channel + i);
    }
}

template <class V, class T>
void scan_typed(const ScanCall& s) {
  clear_padding(s.step, s.out, s.channels * int64_t(sizeof(T)));
  const int64_t parts = cdiv<int64_t>(s.channels, kScanned), tokens = s.step.query_start[s.step.rows];
  parallel_for(s.step.rows * parts, row_grain(s.step.rows * parts, 1 + tokens / s.step.rows * kScanned * s.state_dim),
               [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t row = i / parts, channel = i % parts * kScanned;
      if (s.step.count(row)) scan_channels<V, T>(s, row, channel, int(std::min<int64_t>(kScanned, s.channels - channel)));
    }
  });
}

template <class V>
void scan(const ScanCall& s) {
  if (DType(s.type) == DType::bf16) scan_typed<V, bf16>(s); else scan_typed<V, float>(s);
}

}  // namespace anychip
