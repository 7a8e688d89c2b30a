// Weights as codes of two to eight bits: how they lie in words, and what they stand for.
//
// A block is 32 inputs of kPanel outputs. Of codes of b bits it takes b words for an output: words of the lower four bits
// (or two), then words of the upper bits. Inputs go by fours, 2 * e + odd being inputs 8 e + odd + {0, 2, 4, 6}, so that one
// shift and one mask give a code in each byte. i8 lies four inputs to a word, in order.
#pragma once

#include "tile.h"
#include "weights.h"

namespace anychip {

constexpr int64_t kCodeInputs = 32;

constexpr int code_bits(DType kind) {
  switch (kind) {
    case DType::i2: return 2;
    case DType::i3: return 3;
    case DType::i5: return 5;
    case DType::i6: return 6;
    case DType::i8: return 8;
    default: return 4;
  }
}
constexpr int lower_bits(DType kind) { return code_bits(kind) < 4 ? 2 : 4; }
constexpr int upper_bits(DType kind) { return code_bits(kind) - lower_bits(kind); }

// What is taken off a code, as an unsigned byte, to get its number, before `lift`.
constexpr int code_zero(DType kind) {
  return kind == DType::table || kind == DType::i8 ? 128 : 1 << (code_bits(kind) - 1);
}

constexpr int32_t every_byte(int byte) { return int32_t(uint32_t(byte) * 0x01010101u); }

// fn with the kind of weights that are coded as a constant.
template <class Fn>
ANYCHIP_INLINE void with_kind(DType kind, const Fn& fn) {
  switch (kind) {
    case DType::i2: return fn(std::integral_constant<DType, DType::i2>{});
    case DType::i3: return fn(std::integral_constant<DType, DType::i3>{});
    case DType::i4: return fn(std::integral_constant<DType, DType::i4>{});
    case DType::i5: return fn(std::integral_constant<DType, DType::i5>{});
    case DType::i6: return fn(std::integral_constant<DType, DType::i6>{});
    case DType::table: return fn(std::integral_constant<DType, DType::table>{});
    default: return fn(std::integral_constant<DType, DType::i8>{});
  }
}

// -- codes ----------------------------------------------------------------------------------------------------------

// Four T of eight of a block, as unsigned bytes of which code_zero is to be taken off. `words` are the block's, from a
// column on.
template <class V, DType kKind, int T>
ANYCHIP_INLINE typename V::I four_codes(const uint32_t* words, const int8_t* table) {
  if constexpr (kKind == DType::i8) return V::xor_i(V::load_i(words + T * kPanel), V::set1_i(every_byte(0x80)));
  constexpr int kEight = T / 2, kOdd = T % 2, kHalf = 4 * (kEight % 2) + 2 * kOdd, kLower = lower_bits(kKind);
  typename V::I codes;
  if constexpr (kLower == 4)
    codes = V::and_i(V::template shift<-4 * kOdd>(V::load_i(words + kEight * kPanel)), V::set1_i(every_byte(15)));
  else
    codes = V::and_i(V::template shift<-kHalf>(V::load_i(words + kEight / 2 * kPanel)), V::set1_i(every_byte(3)));
  const uint32_t* upper = words + kLower * kPanel;
  if constexpr (upper_bits(kKind) == 2)
    codes = V::or_i(codes, V::and_i(V::template shift<kLower - kHalf>(V::load_i(upper + kEight / 2 * kPanel)),
                                    V::set1_i(every_byte(3 << kLower))));
  if constexpr (upper_bits(kKind) == 1)
    codes = V::or_i(codes, V::and_i(V::template shift<kLower - T>(V::load_i(upper)), V::set1_i(every_byte(1 << kLower))));
  if constexpr (kKind == DType::table) codes = V::xor_i(V::lookup(codes, table), V::set1_i(every_byte(0x80)));
  return codes;
}

// The four that has input J of a block, and its byte there.
constexpr int four_of(DType kind, int input) { return kind == DType::i8 ? input / 4 : input / 8 * 2 + input % 2; }
constexpr int byte_of(DType kind, int input) { return kind == DType::i8 ? input % 4 : input % 8 / 2; }

// The numbers of input J of a block; `less` is code_zero - lift.
template <class V, DType kKind, int J>
ANYCHIP_INLINE typename V::F numbers_of(const uint32_t* words, const int8_t* table, typename V::F less) {
  const auto codes = four_codes<V, kKind, four_of(kKind, J)>(words, table);
  constexpr int kDown = -8 * byte_of(kKind, J);
  return V::sub(V::to_float(V::and_i(V::template shift<kDown>(codes), V::set1_i(255))), less);
}

// One weight's number, of output `lane` of a panel.
inline float number_at(const Weights& w, const uint32_t* panel, int lane, int64_t input) {
  const int bits = code_bits(w.kind), j = int(input % kCodeInputs), t = four_of(w.kind, j), at = 8 * byte_of(w.kind, j);
  const uint32_t* words = panel + input / kCodeInputs * bits * kPanel + lane;
  if (w.kind == DType::i8) return float(int8_t(words[t * kPanel] >> at)) + w.lift;
  const int half = at + t % 4 * 2, lower = lower_bits(w.kind);
  int code = lower == 4 ? words[t / 2 * kPanel] >> (at + t % 2 * 4) & 15 : words[t / 4 * kPanel] >> half & 3;
  const uint32_t* upper = words + lower * kPanel;
  if (upper_bits(w.kind) == 2) code |= (upper[t / 4 * kPanel] >> half & 3) << lower;
  if (upper_bits(w.kind) == 1) code |= (upper[0] >> (at + t) & 1) << lower;
  return w.kind == DType::table ? float(w.table[code]) : float(code - code_zero(w.kind)) + w.lift;
}

// -- scales ---------------------------------------------------------------------------------------------------------

// Scales or zeros of a panel's group, from a column on.
template <class V>
ANYCHIP_INLINE typename V::F grouped(const Weights& w, const void* values, const f16* upper, int64_t panel, int64_t group, int column) {
  const int64_t at = (panel * w.groups + group) * kPanel + column;
  switch (w.scale_type) {
    case DType::f16: return V::load((const f16*)values + at);
    case DType::e8: return V::mul(V::powers((const uint8_t*)values + at), V::set1(0.5f));  // numbers of tables are doubled
    case DType::i8:
      return V::mul(V::template half<0>((const int8_t*)values + at, 0),
                    V::load(upper + (panel * w.super_groups() + (group >> w.super_shift)) * kPanel + column));
    default: return V::load((const float*)values + at);
  }
}
template <class V>
ANYCHIP_INLINE typename V::F scales_of(const Weights& w, int64_t panel, int64_t group, int column) {
  return grouped<V>(w, w.scales, w.super_scales, panel, group, column);
}
template <class V>
ANYCHIP_INLINE typename V::F zeros_of(const Weights& w, int64_t panel, int64_t group, int column) {
  return grouped<V>(w, w.zeros, w.super_zeros, panel, group, column);
}

// -- a panel's weights, expanded ------------------------------------------------------------------------------------

// fn(constant J) for the inputs of a block.
template <int J = 0, class Fn>
ANYCHIP_INLINE void each_input(const Fn& fn) {
  fn(std::integral_constant<int, J>{});
  if constexpr (J + 1 < kCodeInputs) each_input<J + 1>(fn);
}

// float32 [count][kPanel] of inputs from `first` on, a multiple of 32; what follows up to the next such is written too.
template <class V, DType kKind>
void expand(float* out, const Weights& w, int64_t panel, int64_t first, int64_t count) {
  using F = typename V::F;
  const F less = V::set1(code_zero(kKind) - w.lift);
  for (int64_t begin = 0; begin < count; begin += kCodeInputs, out += kCodeInputs * kPanel) {
    int64_t group[4];
    for (int e = 0; e < 4; ++e) group[e] = std::min(w.groups - 1, (first + begin + 8 * e) / w.group_size);
    const uint32_t* words = (const uint32_t*)w.panel(panel) + (first + begin) / kCodeInputs * code_bits(kKind) * kPanel;
    for (int column = 0; column < kPanel; column += V::W) {
      F scale, zero;
      each_input([&](auto input) __attribute__((always_inline)) {
        constexpr int J = decltype(input)::value;
        if constexpr (J % 8 == 0) {
          scale = scales_of<V>(w, panel, group[J / 8], column);
          if (w.zeros) zero = zeros_of<V>(w, panel, group[J / 8], column);
        }
        F x = V::mul(numbers_of<V, kKind, J>(words + column, w.table, less), scale);
        if (w.zeros) x = V::sub(x, zero);
        V::store(out + J * kPanel + column, x);
      });
    }
  }
}

// Their numbers, without scales and zeros, as pairs of bf16, which holds every one exactly: [count / 2][kPanel][2].
template <class V, DType kKind>
void expand_numbers(bf16* out, const Weights& w, int64_t panel, int64_t first, int64_t count) {
  const auto less = V::set1(code_zero(kKind) - w.lift);
  for (int64_t begin = 0; begin < count; begin += kCodeInputs, out += kCodeInputs * kPanel) {
    const uint32_t* words = (const uint32_t*)w.panel(panel) + (first + begin) / kCodeInputs * code_bits(kKind) * kPanel;
    for (int column = 0; column < kPanel; column += V::W)
      each_input([&](auto input) __attribute__((always_inline)) {
        constexpr int J = decltype(input)::value;
        if constexpr (J % 2 == 0)
          V::store_pair(out + J * kPanel + 2 * column, numbers_of<V, kKind, J>(words + column, w.table, less),
                        numbers_of<V, kKind, J + 1>(words + column, w.table, less));
      });
  }
}

}  // namespace anychip
