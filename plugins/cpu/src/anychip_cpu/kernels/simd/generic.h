// Four lanes in the compiler's own vector type: NEON on ARM, SSE on x86, and what runs where nothing faster was built.
#pragma once

#include <cmath>

#include "../types.h"

namespace anychip {

struct Generic {
  static constexpr int W = 4;
  static constexpr int MR = 6;  // 6 x 4 accumulators: ARM has 32 registers
  static constexpr int NV = 4;
  static constexpr bool kHasDot = false;
  static constexpr bool kFastBytes = false;
  static constexpr bool kTiles = false;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  static F zero() { return F{0, 0, 0, 0}; }
  static F set1(float x) { return F{x, x, x, x}; }
  static F iota() { return F{0, 1, 2, 3}; }
  static F load(const float* p) { return copied<F>(p); }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F load_n(const float* p, int n) {
    F held = zero();
    std::memcpy(&held, p, 4 * n);
    return held;
  }
  static void store_n(float* p, F x, int n) { std::memcpy(p, &x, 4 * n); }
  static F load(const bf16* p) { return F{anychip::to_float(p[0]), anychip::to_float(p[1]), anychip::to_float(p[2]), anychip::to_float(p[3])}; }
  static F load_n(const bf16* p, int n) {
    bf16 held[W] = {};
    std::memcpy(held, p, 2 * n);
    return load(held);
  }
  static F load(const f16* p) { return F{anychip::to_float(p[0]), anychip::to_float(p[1]), anychip::to_float(p[2]), anychip::to_float(p[3])}; }
  static F powers(const uint8_t* p) { return (F)(U{p[0], p[1], p[2], p[3]} << 23); }
  static void store(bf16* p, F x) { store_n(p, x, W); }
  static void store_n(bf16* p, F x, int n) {
    for (int i = 0; i < n; ++i) p[i] = to_bf16(x[i]);
  }

  static void store_pairs(float* p, size_t apart, F x) {
    std::memcpy(p, &x, 8);
    std::memcpy(p + apart, (const char*)&x + 8, 8);
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }  // contracted where the target has FMA
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F round(F a) { return F{std::nearbyint(a[0]), std::nearbyint(a[1]), std::nearbyint(a[2]), std::nearbyint(a[3])}; }
  static F scale(F a, F n) {
    n = min(max(n, set1(-127)), set1(127));
    const I exponent = __builtin_convertvector(n, I) + 127;
    return a * (F)(exponent << 23);
  }
  static F select_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static float sum(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static float most(F a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }

  // Operands of products: see avx512.h.

  template <int H>
  static F half(const bf16* p, size_t) {
    const U pairs = copied<U>(p);
    return (F)(H ? pairs & 0xffff0000u : pairs << 16);
  }
  template <int H>
  static F half(const float* p, size_t columns) {
    return load(p + H * columns);
  }
  template <int H>
  static F half(const int8_t* p, size_t columns) {
    p += H * columns;
    return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
  }
  template <int H>
  static F half(const fp8* p, size_t columns) {
    p += H * columns;
    const U bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    // The smallest values are not normal in float32 either; the factor makes them right.
    const U wide = ((bits & 0x80) << 24) | ((bits & 0x7f) << 20);
    return (F)wide * 0x1p112f;
  }
  template <int J>
  static F nibble(const uint32_t* p) {
    return __builtin_convertvector((I)((copied<U>(p) >> (4 * J)) & 15) - 8, F);
  }
  template <int J>
  static F byte(const uint32_t* p) {
    return __builtin_convertvector((I)(copied<U>(p) << (24 - 8 * J)) >> 24, F);
  }

  static I zero_i() { return I{0, 0, 0, 0}; }
  static I load_i(const void* p) { return copied<I>(p); }
  static I set1_i(int32_t x) { return I{x, x, x, x}; }
  static F to_float(I x) { return __builtin_convertvector(x, F); }
  static I and_i(I a, I b) { return a & b; }
  static I or_i(I a, I b) { return a | b; }
  static I xor_i(I a, I b) { return a ^ b; }
  template <int kLeft>
  static I shift(I a) {
    return (I)(kLeft < 0 ? (U)a >> (kLeft < 0 ? -kLeft : 0) : (U)a << (kLeft > 0 ? kLeft : 0));
  }
  static I lookup(I indices, const int8_t* table) {
    int8_t held[4 * W];
    std::memcpy(held, &indices, sizeof held);
    for (int8_t& each : held) each = table[each & 15];
    return load_i(held);
  }
  static I dot4(I c, I a, I b) {
    for (int byte = 0; byte < 4; ++byte) c += ((a >> (8 * byte)) & 0xff) * ((b << (24 - 8 * byte)) >> 24);
    return c;
  }

 private:
  template <class T>
  static T copied(const void* p) {
    T held;
    std::memcpy(&held, p, sizeof held);
    return held;
  }
};

}  // namespace anychip
