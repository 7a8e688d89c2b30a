// Products in AMX's tile registers: 16 rows of 64 bytes each, eight of them. A panel of bf16 weights lies as they want it,
// pairs of inputs side by side.
//
// Compiled with ANYCHIP_EMULATE_AMX the registers are arrays, and everything around them is as it is: what `tools/
// emulate_amx.py` runs where no processor has them.
#pragma once

#include <algorithm>

#include "tile.h"
#include "weights.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace anychip {

// 32 rows times 32 columns: sums in tiles 0 to 3, rows in 4 and 5, columns in 6 and 7. Strides are bytes.
#if defined(__AMX_BF16__)
struct TileRegisters {
  // A thread's registers are its own: they are there from construction to destruction.
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }

  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  void multiply(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(5, (const char*)a + 16 * a_stride, a_stride);
    _tile_loadd(6, b, b_stride);
    _tile_loadd(7, b + 32, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  void store(float* c) {
    _tile_stored(0, c, 4 * kPanel);
    _tile_stored(1, c + 16, 4 * kPanel);
    _tile_stored(2, c + 16 * kPanel, 4 * kPanel);
    _tile_stored(3, c + 16 * kPanel + 16, 4 * kPanel);
  }
};
#else
struct TileRegisters {
  float sums[32][kPanel];

  void clear() { std::memset(sums, 0, sizeof sums); }
  void multiply(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride) {
    for (int m = 0; m < 32; ++m)
      for (int p = 0; p < 16; ++p) {
        const bf16* pair = (const bf16*)((const char*)a + m * a_stride) + 2 * p;
        const bf16* columns = (const bf16*)((const char*)b + p * b_stride);
        for (int n = 0; n < kPanel; ++n) {
          sums[m][n] += to_float(pair[0]) * to_float(columns[2 * n]);
          sums[m][n] += to_float(pair[1]) * to_float(columns[2 * n + 1]);
        }
      }
  }
  void store(float* c) { std::memcpy(c, sums, sizeof sums); }
};
#endif

// Rows of bf16, one after the other, padded with zeros to whole tiles.
template <class V>
struct TiledRows {
  static constexpr int kRows = 32;
  static constexpr int64_t kLeast = 16;  // rows; fewer stream the weights as fast through vectors
  static constexpr int64_t kInputs = 32;

  static bool serves(const Weights& w, int64_t rows) { return w.kind == DType::bf16 && rows >= kLeast; }
  static int64_t row_bytes(const Weights& w) { return 2 * round_up<int64_t>(w.k, kInputs); }
  static int64_t blocks(const Weights&) { return 0; }

  template <class X>
  static void pack(uint8_t* out, int64_t m, int64_t, const X* x, const Weights& w, float*, int32_t*) {
    bf16* to = (bf16*)(out + m * row_bytes(w));
    int64_t i = 0;
    for (; i + V::W <= w.k; i += V::W) V::store(to + i, V::load(x + i));
    for (; i < w.k; ++i) to[i] = to_bf16(to_float(x[i]));
    for (; i < row_bytes(w) / 2; ++i) to[i] = bf16{0};
  }

  static void tile(float* c, const uint8_t* a, int, const float*, const int32_t*, const Weights& w, int64_t panel) {
    constexpr int64_t kPairBytes = 4 * kPanel;  // of a panel, two inputs
    const int64_t pairs = cdiv<int64_t>(w.k, 2), whole = pairs / 16 * 16;
    const bf16* columns = (const bf16*)w.panel(panel);
    TileRegisters registers;
    registers.clear();
    for (int64_t p = 0; p < whole; p += 16)
      registers.multiply((const bf16*)a + 2 * p, row_bytes(w), columns + p * 2 * kPanel, kPairBytes);
    if (whole < pairs) {  // what lies behind a panel is not to be read
      alignas(64) bf16 last[16 * 2 * kPanel] = {};
      std::memcpy(last, columns + whole * 2 * kPanel, (pairs - whole) * kPairBytes);
      registers.multiply((const bf16*)a + 2 * whole, row_bytes(w), last, kPairBytes);
    }
    registers.store(c);
  }
};

}  // namespace anychip
