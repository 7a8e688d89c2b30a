// Sixteen lanes. With kDot, products of bf16 pairs go through vdpbf16ps; without it they are expanded to float32 and
// go through FMA, which is twice as fast on Intel's cores (their vdpbf16ps issues every other cycle).
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace anychip {

template <bool kDot>
struct Avx512 {
  static constexpr int W = 16;
  static constexpr int MR = 12;  // rows of a tile: 12 x 2 accumulators of 32 registers
  static constexpr int NV = 2;   // vectors of a tile
  static constexpr bool kHasDot = kDot;
  static constexpr bool kFastBytes = true;  // products of bytes in one instruction
  static constexpr bool kTiles = false;  // AMX
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }
  static F load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static F load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F powers(const uint8_t* p) {  // 2^(byte - 127); 0 for byte 0
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23));
  }
  static void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
  static void store_n(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, mask(n), narrow(x)); }

  // Lanes two by two, `apart` floats from one pair to the next.
  static void store_pairs(float* p, size_t apart, F x) {
    const auto four = [&](float* to, __m128 a) {
      _mm_storel_pi((__m64*)to, a);
      _mm_storeh_pi((__m64*)(to + apart), a);
    };
    four(p, _mm512_castps512_ps128(x));
    four(p + 2 * apart, _mm512_extractf32x4_ps(x, 1));
    four(p + 4 * apart, _mm512_extractf32x4_ps(x, 2));
    four(p + 6 * apart, _mm512_extractf32x4_ps(x, 3));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n whole
  static F select_less(F a, F b, F yes, F no) {  // a < b ? yes : no
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float most(F a) { return _mm512_reduce_max_ps(a); }

  // -- operands of products ---------------------------------------------------------------------------------
  // half<H>: of a pair of rows, row H of 16 columns. bf16 rows are interleaved pairwise, others lie one after the
  // other, `columns` apart.

  template <int H>
  static F half(const bf16* p, size_t) {
    const __m512i pairs = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(H ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
  }
  template <int H>
  static F half(const float* p, size_t columns) {
    return _mm512_loadu_ps(p + H * columns);
  }
  template <int H>
  static F half(const int8_t* p, size_t columns) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + H * columns))));
  }
  // 2^-8 of the value: the exponent's bias is float16's, see kFp8Bias in tile.h.
  template <int H>
  static F half(const fp8* p, size_t columns) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + H * columns)));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
  }
  // Nibble J of eight in every word, less 8.
  template <int J>
  static F nibble(const uint32_t* p) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i words = _mm512_loadu_si512(p);
    return _mm512_permutexvar_ps(J ? _mm512_srli_epi32(words, 4 * J) : words, table);  // looks at four bits alone
  }

  // Byte J of four in every word.
  template <int J>
  static F byte(const uint32_t* p) {
    const __m512i words = _mm512_loadu_si512(p);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(J < 3 ? _mm512_slli_epi32(words, 24 - 8 * J) : words, 24));
  }

#ifdef __AVX512BF16__
  using Pair = __m512bh;
  static Pair pair(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Pair pair1(const bf16* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static F dot(F c, Pair a, Pair b) { return _mm512_dpbf16_ps(c, a, b); }
  // Side by side, of numbers that bf16 holds.
  static void store_pair(bf16* p, F even, F odd) {
    const I low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(odd)));
  }
#endif

  static I zero_i() { return _mm512_setzero_si512(); }
  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  static I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int kLeft>  // to the right where it is negative
  static I shift(I a) {
    return kLeft < 0 ? _mm512_srli_epi32(a, kLeft < 0 ? -kLeft : 0) : kLeft ? _mm512_slli_epi32(a, kLeft > 0 ? kLeft : 0) : a;
  }
  // The table's entries of indices in bytes.
  static I lookup(I indices, const int8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), indices);
  }
  // Sums of four products of unsigned by signed bytes, added to c.
  static I dot4(I c, I a, I b) { return _mm512_dpbusd_epi32(c, a, b); }

 private:
  static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
  static F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m256i narrow(F x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i nearest = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16));
#endif
  }
};

// With AMX for products of many rows; see amx.h.
struct Avx512Amx : Avx512<false> {
  static constexpr bool kTiles = true;
};

}  // namespace anychip
