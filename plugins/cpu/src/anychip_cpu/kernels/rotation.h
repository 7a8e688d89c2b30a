// Rotary embedding of a vector.
#pragma once

#include "types.h"

namespace anychip {

struct Rotation {
  const float *cos, *sin;  // [positions, rotary dim / 2], or null: nothing turns
  int64_t rotary_dim, interleaved;
};

// The first values of x turn in place, each rounded to T as a model's own ops would.
template <class T>
void rotate(const Rotation& r, T* x, int64_t position) {
  if (!r.cos) return;
  const int64_t half = r.rotary_dim / 2;
  const float *cos = r.cos + position * half, *sin = r.sin + position * half;
  const int64_t step = r.interleaved ? 2 : 1, apart = r.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i * step]), b = to_float(x[i * step + apart]);
    from_float(a * cos[i] - b * sin[i], &x[i * step]);
    from_float(b * cos[i] + a * sin[i], &x[i * step + apart]);
  }
}

}  // namespace anychip
