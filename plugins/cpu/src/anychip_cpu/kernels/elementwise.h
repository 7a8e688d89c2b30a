// Ops whose cost is reading and writing: norms, gated activations, rows of an embedding.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "pool.h"

namespace anychip {

constexpr int64_t kWorthThreads = 16384;  // values; below, waking threads costs more than it saves

inline int64_t row_grain(int64_t rows, int64_t width) {
  return rows * width < kWorthThreads ? rows : std::max<int64_t>(1, cdiv<int64_t>(rows, 4 * num_threads()));
}

// fn(i, lanes) over a row, a vector at a time.
template <class V, class Fn>
ANYCHIP_INLINE void each_vector(int64_t width, const Fn& fn) {
  int64_t i = 0;
  for (; i + V::W <= width; i += V::W) fn(i, std::integral_constant<int, V::W>{});
  if (i < width) fn(i, int(width - i));
}

template <class V, class T, class N>
ANYCHIP_INLINE typename V::F load(const T* p, N lanes) {
  if constexpr (std::is_same_v<N, int>) return V::load_n(p, lanes);
  else return V::load(p);
}

template <class V, class T, class N>
ANYCHIP_INLINE void store(T* p, typename V::F x, N lanes) {
  if constexpr (std::is_same_v<N, int>) V::store_n(p, x, lanes);
  else V::store(p, x);
}

// As values of T hold it.
template <class V, class T>
ANYCHIP_INLINE typename V::F rounded(typename V::F x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T held[V::W];
  V::store(held, x);
  return V::load(held);
}

// -- norms ------------------------------------------------------------------------------------------------------

struct Norm {
  DType type;
  const void* x;         // [rows, width], rows ldx apart
  const void* residual;  // [rows, width], rows ldr apart, or null
  const void* weight;    // [width]
  void* out;             // [rows, width]
  void* total;           // [rows, width]: x + residual; null without a residual
  int64_t rows, width, ldx, ldr;
  float eps;
  bool unit_offset;
};

// The norm is rounded before the weight multiplies it, unless one is added to the weight: as checkpoints were trained.
template <class V, class T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps, bool unit_offset) {
  using F = typename V::F;
  F squares = V::zero();
  each_vector<V>(width, [&](int64_t i, auto n) {
    const F v = load<V>(x + i, n);
    squares = V::fma(v, v, squares);
  });
  const F scale = V::set1(1.0f / std::sqrt(V::sum(squares) / float(width) + eps));
  each_vector<V>(width, [&](int64_t i, auto n) {
    const F v = V::mul(load<V>(x + i, n), scale), w = load<V>(weight + i, n);
    store<V>(out + i, unit_offset ? V::mul(v, V::add(w, V::set1(1))) : V::mul(rounded<V, T>(v), w), n);
  });
}

template <class V, class T>
void norm_typed(const Norm& a) {
  parallel_for(a.rows, row_grain(a.rows, a.width), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const T* x = (const T*)a.x + row * a.ldx;
      if (a.residual) {
        const T* residual = (const T*)a.residual + row * a.ldr;
        T* total = (T*)a.total + row * a.width;
        each_vector<V>(a.width, [&](int64_t i, auto n) {
          store<V>(total + i, V::add(load<V>(x + i, n), load<V>(residual + i, n)), n);
        });
        x = total;
      }
      norm_row<V>(x, (const T*)a.weight, (T*)a.out + row * a.width, a.width, a.eps, a.unit_offset);
    }
  });
}

template <class V>
void norm(const Norm& a) {
  if (a.type == DType::bf16) norm_typed<V, bf16>(a); else norm_typed<V, float>(a);
}

// -- gated activation -------------------------------------------------------------------------------------------

struct Gate {
  DType type;
  const void* x;  // [rows, 2 * width], gates then ups, rows ldx apart
  void* out;      // [rows, width]
  int64_t rows, width, ldx;
  Activation activation;
};

template <class V, class T>
void gate_typed(const Gate& a) {
  parallel_for(a.rows, row_grain(a.rows, a.width), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const T* x = (const T*)a.x + row * a.ldx;
      T* out = (T*)a.out + row * a.width;
      each_vector<V>(a.width, [&](int64_t i, auto n) {
        store<V>(out + i, gated<V>(a.activation, load<V>(x + i, n), load<V>(x + a.width + i, n)), n);
      });
    }
  });
}

template <class V>
void gate(const Gate& a) {
  if (a.type == DType::bf16) gate_typed<V, bf16>(a); else gate_typed<V, float>(a);
}

// -- embedding --------------------------------------------------------------------------------------------------

struct Lookup {
  const int32_t* ids;  // [tokens]
  const char* weight;  // [rows] of row_bytes; the first is that of id `first`
  char* out;           // [tokens]
  int64_t tokens, rows, row_bytes, first;
};

// An id that the rows do not hold becomes zeros.
inline void look_up(const Lookup& l) {
  parallel_for(l.tokens, std::max<int64_t>(8, l.tokens / (4 * num_threads())), [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t row = l.ids[i] - l.first;
      if (row >= 0 && row < l.rows) std::memcpy(l.out + i * l.row_bytes, l.weight + row * l.row_bytes, l.row_bytes);
      else std::memset(l.out + i * l.row_bytes, 0, l.row_bytes);
    }
  });
}

}  // namespace anychip
