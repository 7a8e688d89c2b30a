// Eight lanes, FMA and F16C: every x86-64 server since 2013.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace anychip {

struct Avx2 {
  static constexpr int W = 8;
  static constexpr int MR = 6;  // 6 x 2 accumulators of 16 registers
  static constexpr int NV = 2;
  static constexpr bool kHasDot = false;
  static constexpr bool kFastBytes = false;
  static constexpr bool kTiles = false;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F iota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load_n(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store_n(float* p, F x, int n) { _mm256_maskstore_ps(p, mask(n), x); }
  static F load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static F load_n(const bf16* p, int n) {
    bf16 held[W] = {};
    std::memcpy(held, p, 2 * n);
    return load(held);
  }
  static F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F powers(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 23));
  }
  static void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, narrow(x)); }
  static void store_n(bf16* p, F x, int n) {
    bf16 held[W];
    store(held, x);
    std::memcpy(p, held, 2 * n);
  }

  static void store_pairs(float* p, size_t apart, F x) {
    const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    _mm_storel_pi((__m64*)p, low);
    _mm_storeh_pi((__m64*)(p + apart), low);
    _mm_storel_pi((__m64*)(p + 2 * apart), high);
    _mm_storeh_pi((__m64*)(p + 3 * apart), high);
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) {  // a * 2^n, n whole; 0 where the factor would not be normal
    n = _mm256_min_ps(_mm256_max_ps(n, set1(-127)), set1(127));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static F select_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static float sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float most(F a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  // Operands of products: see avx512.h.

  template <int H>
  static F half(const bf16* p, size_t) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)p);
    return _mm256_castsi256_ps(H ? _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(pairs, 16));
  }
  template <int H>
  static F half(const float* p, size_t columns) {
    return _mm256_loadu_ps(p + H * columns);
  }
  template <int H>
  static F half(const int8_t* p, size_t columns) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + H * columns))));
  }
  template <int H>
  static F half(const fp8* p, size_t columns) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(p + H * columns)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(sign, rest));
  }
  template <int J>
  static F nibble(const uint32_t* p) {
    const __m256i words = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i*)p), 4 * J);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(words, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
  }
  template <int J>
  static F byte(const uint32_t* p) {
    const __m256i words = _mm256_loadu_si256((const __m256i*)p);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(J < 3 ? _mm256_slli_epi32(words, 24 - 8 * J) : words, 24));
  }

  static I zero_i() { return _mm256_setzero_si256(); }
  static I load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static I set1_i(int32_t x) { return _mm256_set1_epi32(x); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_i(I a, I b) { return _mm256_or_si256(a, b); }
  static I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int kLeft>
  static I shift(I a) {
    return kLeft < 0 ? _mm256_srli_epi32(a, kLeft < 0 ? -kLeft : 0) : kLeft ? _mm256_slli_epi32(a, kLeft > 0 ? kLeft : 0) : a;
  }
  static I lookup(I indices, const int8_t* table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), indices);
  }
  // vpmaddubsw would saturate: even and odd bytes are multiplied apart, as 16-bit numbers.
  static I dot4(I c, I a, I b) {
    const I even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
  }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static __m128i narrow(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i nearest = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
  }
};

}  // namespace anychip
