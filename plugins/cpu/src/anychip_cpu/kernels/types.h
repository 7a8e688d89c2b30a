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

// Values as Python passes them: keep in step with anychip_cpu/native.py.
enum class DType : int { f32 = 0, bf16 = 1, i8 = 2, fp8 = 3, i4 = 4 };

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
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
