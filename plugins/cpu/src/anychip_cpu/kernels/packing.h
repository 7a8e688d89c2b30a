// Rows of a checkpoint's matrix take their place in panels.
#pragma once

#include <algorithm>

#include "codes.h"
#include "pool.h"
#include "tile.h"
#include "weights.h"

namespace anychip {

// `span` rows of each panel belong to this matrix, from lane `lane` on: kPanel and 0, but where two matrices share
// panels. `source` is [rows][k], of the panels' own type, int4 with a value a byte; its first row is output `first`.
struct PackRows {
  Weights w;
  const void* source;
  int64_t rows, first, span, lane;
};

template <class T, class Place>
void pack_as(const PackRows& a, const Place& place) {
  // Threads take whole panels: bytes of one may be shared by its rows.
  const int64_t begin = a.first / a.span, end = cdiv(a.first + a.rows, a.span);
  parallel_for(end - begin, 1, [&](int64_t index, int64_t stop) {
    for (; index < stop; ++index) {
      const int64_t panel = begin + index;
      const int64_t low = std::max(panel * a.span, a.first), high = std::min((panel + 1) * a.span, a.first + a.rows);
      const T* rows = (const T*)a.source + (low - a.first) * a.w.k;
      place((char*)a.w.panel(panel), rows, int(high - low), int(a.lane + low - panel * a.span));
    }
  });
}

// out[unit * kPanel + i] = rows[i][unit], for `count` rows of `units` that lie `apart` bytes from each other. A line of
// every row is read at once: rows are often a power of two apart, and would push each other out of the cache.
template <class U>
void transpose(U* out, const char* rows, int64_t apart, int count, int64_t units) {
  constexpr int64_t kLine = 64 / sizeof(U);
  U lines[kPanel][kLine];
  for (int64_t begin = 0; begin < units; begin += kLine) {
    const int64_t width = std::min(kLine, units - begin);
    for (int i = 0; i < count; ++i) std::memcpy(lines[i], rows + i * apart + begin * sizeof(U), width * sizeof(U));
    for (int64_t u = 0; u < width; ++u)
      for (int i = 0; i < count; ++i) out[(begin + u) * kPanel + i] = lines[i][u];
  }
}

// The codes of eight inputs, a byte each: bits `from` on of every one, in the order of codes.h, as four bytes.
template <int kBits>
uint32_t eight_codes(uint64_t bytes, int from) {
  constexpr uint64_t kEach = ((1 << kBits) - 1) * 0x0101010101010101ull, kPair = ((1 << 2 * kBits) - 1) * 0x0001000100010001ull;
  bytes = (bytes >> from) & kEach;
  bytes = (bytes | bytes >> (8 - kBits)) & kPair;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffull;
  return uint32_t(bytes | bytes >> 16);
}

template <DType kKind>
void pack_codes(const PackRows& a) {
  constexpr int kLower = lower_bits(kKind), kUpper = upper_bits(kKind), kWords = code_bits(kKind);
  pack_as<uint8_t>(a, [k = a.w.k](char* panel, const uint8_t* rows, int count, int lane) {
    const auto block = [&](uint32_t* to, const uint8_t* from, int64_t inputs) __attribute__((always_inline)) {
      uint64_t eights[4] = {};
      if (inputs >= kCodeInputs) std::memcpy(eights, from, kCodeInputs);
      else std::memcpy(eights, from, inputs);
      uint32_t words[kWords] = {};
      for (int e = 0; e < 4; ++e) {
        if constexpr (kLower == 4) words[e] = eight_codes<4>(eights[e], 0);
        else words[e / 2] |= eight_codes<2>(eights[e], 0) << (4 * (e % 2));
        if constexpr (kUpper == 2) words[kLower + e / 2] |= eight_codes<2>(eights[e], kLower) << (4 * (e % 2));
        if constexpr (kUpper == 1) words[kLower] |= eight_codes<1>(eights[e], kLower) << (2 * e);
      }
      for (int word = 0; word < kWords; ++word) to[word * kPanel] = words[word];
    };
    // Two blocks of a row at a time, which are a line: rows may push each other out of the cache.
    for (int64_t begin = 0; begin < k; begin += 2 * kCodeInputs)
      for (int i = 0; i < count; ++i)
        for (int64_t at = begin; at < std::min(k, begin + 2 * kCodeInputs); at += kCodeInputs)
          block((uint32_t*)panel + at / kCodeInputs * kWords * kPanel + lane + i, rows + i * k + at, k - at);
  });
}

inline void pack(const PackRows& a) {
  const int64_t k = a.w.k;
  if (a.w.kind == DType::bf16) {
    pack_as<bf16>(a, [k](char* panel, const bf16* rows, int count, int lane) {
      uint32_t* to = (uint32_t*)panel + lane;
      transpose(to, (const char*)rows, 2 * k, count, k / 2);
      if (k % 2)
        for (int i = 0; i < count; ++i) to[k / 2 * kPanel + i] = rows[i * k + k - 1].bits;
    });
  } else if (a.w.kind == DType::f32) {
    pack_as<float>(a, [k](char* panel, const float* rows, int count, int lane) {
      transpose((float*)panel + lane, (const char*)rows, 4 * k, count, k);
    });
  } else if (a.w.kind == DType::f16) {  // scales
    pack_as<f16>(a, [k](char* panel, const f16* rows, int count, int lane) {
      transpose((uint16_t*)panel + lane, (const char*)rows, 2 * k, count, k);
    });
  } else if (a.w.kind != DType::i8 && a.w.coded()) {
    with_kind(a.w.kind, [&](auto kind) { pack_codes<decltype(kind)::value>(a); });
  } else if (a.w.kind == DType::i8) {
    pack_as<int8_t>(a, [k](char* panel, const int8_t* rows, int count, int lane) {
      transpose((uint32_t*)panel + lane, (const char*)rows, k, count, k / 4);
      for (int64_t input = k / 4 * 4; input < k; ++input)
        for (int i = 0; i < count; ++i) panel[(input / 4 * kPanel + lane + i) * 4 + input % 4] = char(rows[i * k + input]);
    });
    if (!a.w.sums) return;
    int32_t* sums = const_cast<int32_t*>(a.w.sums);
    parallel_for(a.rows, 64, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int8_t* row = (const int8_t*)a.source + i * k;
        int32_t sum = 0;
        for (int64_t input = 0; input < k; ++input) sum += row[input];
        sums[a.first + i] = 128 * sum;
      }
    });
  } else {
    pack_as<fp8>(a, [k](char* panel, const fp8* rows, int count, int lane) {
      transpose((uint8_t*)panel + lane, (const char*)rows, k, count, k);
    });
  }
}

}  // namespace anychip
