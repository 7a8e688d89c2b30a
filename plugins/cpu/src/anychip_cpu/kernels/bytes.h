// float8_e4m3fn, a value at a time.
#pragma once

#include <algorithm>
#include <cmath>

#include "types.h"

namespace anychip {

// Nearest, ties to even, of what is kept within the range of 448.
inline fp8 encode_fp8(float x) {
  const float kept = std::min(448.0f, std::max(-448.0f, x)), size = std::fabs(kept);
  uint32_t bits;
  if (size < 0x1p-6f) {
    bits = uint32_t(std::nearbyint(size * 0x1p9f));  // eighths of the least normal value; 8 is that value itself
  } else {
    std::memcpy(&bits, &size, 4);
    bits = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  }
  return {uint8_t(bits | (std::signbit(kept) ? 0x80 : 0))};
}

inline float decode(fp8 x) {
  const int exponent = (x.bits >> 3) & 15, fraction = x.bits & 7;
  const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
  return x.bits & 0x80 ? -size : size;
}

}  // namespace anychip
