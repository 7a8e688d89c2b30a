// Elementary functions on vectors.
#pragma once

#include <algorithm>
#include <cmath>

#include "tile.h"

namespace anychip {

// e^x within 2 units in the last place: 2^n times a polynomial of the rest, within ln 2 / 2 of zero.
template <class V>
ANYCHIP_INLINE typename V::F exp(typename V::F x) {
  x = V::max(V::min(x, V::set1(88.7f)), V::set1(-104.0f));
  const auto n = V::round(V::mul(x, V::set1(1.44269504f)));
  auto r = V::fma(n, V::set1(-0.693359375f), x);  // ln 2 in two parts
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto y = V::set1(1.0f / 720);
  y = V::fma(y, r, V::set1(1.0f / 120));
  y = V::fma(y, r, V::set1(1.0f / 24));
  y = V::fma(y, r, V::set1(1.0f / 6));
  y = V::fma(y, r, V::set1(0.5f));
  y = V::fma(y, r, V::set1(1.0f));
  y = V::fma(y, r, V::set1(1.0f));
  return V::scale(y, n);
}

// e^x of a softmax, x at most a rounding error above zero: within 4e-6 of itself, and zero below -87, -inf too.
template <class V>
ANYCHIP_INLINE typename V::F weight_of(typename V::F x) {
  x = V::max(x, V::set1(-88));
  const auto n = V::round(V::mul(x, V::set1(1.44269504f)));
  const auto r = V::fma(n, V::set1(-0.693147181f), x);
  auto y = V::set1(1.0f / 120);
  y = V::fma(y, r, V::set1(1.0f / 24));
  y = V::fma(y, r, V::set1(1.0f / 6));
  y = V::fma(y, r, V::set1(0.5f));
  y = V::fma(y, r, V::set1(1.0f));
  y = V::fma(y, r, V::set1(1.0f));
  return V::select_less(x, V::set1(-87), V::zero(), V::scale(y, n));
}

template <class V>
ANYCHIP_INLINE typename V::F sigmoid(typename V::F x) {
  return V::div(V::set1(1), V::add(V::set1(1), exp<V>(V::mul(x, V::set1(-1)))));
}

template <class V>
ANYCHIP_INLINE typename V::F tanh(typename V::F x) {
  // 1 - 2 / (1 + e^2x) loses the small ones: those are taken from the series.
  const auto square = V::mul(x, x);
  const auto wide = V::sub(V::set1(1), V::div(V::set1(2), V::add(V::set1(1), exp<V>(V::add(x, x)))));
  auto series = V::set1(-17.0f / 315);
  series = V::fma(series, square, V::set1(2.0f / 15));
  series = V::fma(series, square, V::set1(-1.0f / 3));
  series = V::fma(V::mul(series, square), x, x);
  return V::select_less(square, V::set1(0.01f), series, wide);
}

// The greatest magnitude in x [k], and never zero.
template <class V, class X>
float largest_of(const X* x, int64_t k) {
  using F = typename V::F;
  F most = V::zero();
  int64_t i = 0;
  for (; i + V::W <= k; i += V::W) {
    const F value = V::load(x + i);
    most = V::max(most, V::max(value, V::mul(value, V::set1(-1))));
  }
  float largest = V::most(most);
  for (; i < k; ++i) largest = std::max(largest, std::fabs(to_float(x[i])));
  return std::max(largest, 1e-12f);
}

enum class Activation : int { silu = 0, gelu_tanh = 1, swiglu_clamped = 2 };

template <class V>
ANYCHIP_INLINE typename V::F gated(Activation activation, typename V::F gate, typename V::F up) {
  using F = typename V::F;
  if (activation == Activation::silu) return V::mul(V::mul(gate, sigmoid<V>(gate)), up);
  if (activation == Activation::gelu_tanh) {
    const F cube = V::mul(V::mul(gate, gate), gate);
    const F inner = V::mul(V::set1(0.7978845608f), V::fma(V::set1(0.044715f), cube, gate));
    return V::mul(V::mul(V::mul(V::set1(0.5f), gate), V::add(V::set1(1), tanh<V>(inner))), up);
  }
  gate = V::min(gate, V::set1(7));
  up = V::max(V::min(up, V::set1(7)), V::set1(-7));
  return V::mul(V::add(up, V::set1(1)), V::mul(gate, sigmoid<V>(V::mul(V::set1(1.702f), gate))));
}

}  // namespace anychip
