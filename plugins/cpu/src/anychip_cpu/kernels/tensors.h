// What torch does between kernels, for recordings: the same bits, without its calls.
#pragma once

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "types.h"

namespace anychip {

// One operator on contiguous tensors of `rows` by `width`.
struct Elementwise {
  enum Op : int64_t { kAdd, kMultiply, kScale, kConvert, kLess, kSelect, kWiden };
  Op op;
  DType type;       // of a and b; what kSelect picks is four bytes wide, and kLess compares int32, which kWiden makes int64
  DType out_type;   // of the result of kConvert
  const void *a, *b;  // b null: none
  const bool* condition;  // of kSelect: a where it holds
  void* out;
  int64_t rows, width;
  double scalar;
};

template <class T, class Fn>
void each_value(const Elementwise& e, int64_t begin, int64_t end, const Fn& fn) {
  const T *a = (const T*)e.a, *b = (const T*)e.b;
  T* out = (T*)e.out;
  for (int64_t i = begin; i < end; ++i) from_float(fn(to_float(a[i]), b ? to_float(b[i]) : 0.0f), out + i);
}

template <class T>
void apply_part(const Elementwise& e, int64_t begin, int64_t end) {
  const float scalar = float(e.scalar);
  switch (e.op) {
    case Elementwise::kAdd: return each_value<T>(e, begin, end, [](float a, float b) { return a + b; });
    case Elementwise::kMultiply: return each_value<T>(e, begin, end, [](float a, float b) { return a * b; });
    case Elementwise::kScale: return each_value<T>(e, begin, end, [=](float a, float) { return a * scalar; });
    case Elementwise::kConvert:
      for (int64_t i = begin; i < end; ++i) {
        const float value = to_float(((const T*)e.a)[i]);
        if (e.out_type == DType::bf16) from_float(value, (bf16*)e.out + i);
        else from_float(value, (float*)e.out + i);
      }
      return;
    case Elementwise::kLess:
      for (int64_t i = begin; i < end; ++i) ((bool*)e.out)[i] = ((const int32_t*)e.a)[i] < e.scalar;
      return;
    case Elementwise::kWiden:
      for (int64_t i = begin; i < end; ++i) ((int64_t*)e.out)[i] = ((const int32_t*)e.a)[i];
      return;
    case Elementwise::kSelect:
      for (int64_t i = begin; i < end; ++i)
        ((int32_t*)e.out)[i] = (e.condition[i] ? (const int32_t*)e.a : (const int32_t*)e.b)[i];
      return;
  }
}

inline void apply(const Elementwise& e) {
  constexpr int64_t kPart = 1 << 14;  // values; below, waking threads costs more than it saves
  parallel_for(e.rows * e.width, kPart, [&](int64_t begin, int64_t end) {
    if (e.type == DType::bf16) apply_part<bf16>(e, begin, end); else apply_part<float>(e, begin, end);
  });
}

// Rows by their indices, negative ones counted from the end; one that is out of range becomes zeros.
struct Gather {
  const char* source;  // [source_rows] of row_bytes
  const void* indices;  // [rows] int64, or int32
  bool wide;
  char* out;  // [rows]
  int64_t rows, source_rows, row_bytes;
};

inline void gather(const Gather& g) {
  for (int64_t i = 0; i < g.rows; ++i) {
    int64_t row = g.wide ? ((const int64_t*)g.indices)[i] : ((const int32_t*)g.indices)[i];
    if (row < 0) row += g.source_rows;
    if (row >= 0 && row < g.source_rows) std::memcpy(g.out + i * g.row_bytes, g.source + row * g.row_bytes, g.row_bytes);
    else std::memset(g.out + i * g.row_bytes, 0, g.row_bytes);
  }
}

// A copy of `base` with rows replaced; the last of several for one place stays.
struct Replace {
  const char* base;        // [base_rows] of row_bytes
  const int64_t* indices;  // [rows], each within base_rows
  const char* source;      // [rows]
  char* out;               // [base_rows]
  int64_t rows, base_rows, row_bytes;
};

inline void replace_rows(const Replace& r) {
  std::memcpy(r.out, r.base, r.base_rows * r.row_bytes);
  for (int64_t i = 0; i < r.rows; ++i)
    if (r.indices[i] >= 0 && r.indices[i] < r.base_rows)
      std::memcpy(r.out + r.indices[i] * r.row_bytes, r.source + i * r.row_bytes, r.row_bytes);
}

}  // namespace anychip
