// Element types of tensors as kernels see them, and small arithmetic that every file needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace anychip {

struct bf16 {
  uint16_t bits;
};

struct fp8 {  // float8_e4m3fn
  uint8_t bits;
};

struct f16 {
  uint16_t bits;
};

// Values as Python passes them: keep in step with anychip_cpu/native.py. `table`: four bits that choose one of sixteen
// numbers. f16 and e8, a power of two in a byte, are scales alone.
enum class DType : int { f32 = 0, bf16 = 1, i8 = 2, fp8 = 3, i4 = 4, i2 = 5, i3 = 6, i5 = 7, i6 = 8, table = 9, f16 = 10, e8 = 11 };

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  float size, result;
  if (rest >= 0x0f800000u) {  // infinity, or no number
    const uint32_t wide = rest + 0x70000000u;
    std::memcpy(&size, &wide, 4);
  } else {
    std::memcpy(&size, &rest, 4);
    size *= 0x1p112f;  // the exponent's bias, of subnormals too
  }
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((bits >> 16) | 0x40)};
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) { *out = to_bf16(x); }

template <class T>
constexpr T cdiv(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
constexpr T round_up(T a, T b) {
  return cdiv(a, b) * b;
}

}  // namespace anychip
