// Packed weights and their layouts, as tables of kernels share them.
#pragma once

#include "types.h"

namespace anychip {

// y = x W^T: n outputs, k inputs, in panels of kPanel outputs. By kind a panel holds
//   f32, fp8  [k, padded to 2][kPanel]
//   bf16      [k / 2][kPanel][2]
//   i8        [k / 4][kPanel] words of four inputs, padded to a multiple of 32 inputs
//   i2 to i6, table  [k / 32][words][kPanel], see codes.h
// Rows past n and inputs past k are zero.
struct Weights {
  DType kind;
  int64_t n, k;
  const void* panels;
  int64_t panel_bytes;
  // [panels][groups][kPanel] of scale_type: w = number * scale - zero. A code's number is the code less half the range of
  // its bits, and `lift`; of `table` what that says. Null zeros: there are none.
  const void *scales, *zeros;
  // Of i8 scales, [panels][super-groups][kPanel]: what multiplies scales and zeros of 2^super_shift groups.
  const f16 *super_scales, *super_zeros;
  DType scale_type;
  int64_t super_shift;
  int64_t groups, group_size;
  float lift;
  const int8_t* table;  // [16]
  // [n padded]: 128 times the sum of an output's weights, where activations are bytes; null elsewhere
  const int32_t* sums;
  // Activations are rounded to `rounding` (i8 or fp8; f32: they are not) and back before the product, with a scale for
  // every `rounding_group` inputs of a row, or with the fixed one.
  DType rounding;
  int64_t rounding_group;
  const float* fixed_scale;  // [1] or null

  bool quantized() const { return kind != DType::f32 && kind != DType::bf16; }
  bool coded() const { return quantized() && kind != DType::fp8; }
  const char* panel(int64_t index) const { return (const char*)panels + index * panel_bytes; }
  int64_t super_groups() const { return ((groups - 1) >> super_shift) + 1; }
};

// As Python packs them: every field is eight bytes wide. Keep in step with anychip_cpu/packing.py.
struct PackedWeights {
  int64_t kind, n, k;
  const void* panels;
  int64_t panel_bytes;
  const void *scales, *zeros;
  const f16 *super_scales, *super_zeros;
  int64_t scale_type, super_shift, groups, group_size, lift;
  const int8_t* table;
  const int32_t* sums;
  int64_t rounding, rounding_group;
  const float* fixed_scale;

  Weights weights() const {
    return {DType(kind), n, k, panels, panel_bytes, scales, zeros, super_scales, super_zeros, DType(scale_type), super_shift,
            groups, group_size, float(lift), table, sums, DType(rounding), rounding_group, fixed_scale};
  }
};

struct Gemm {
  Weights w;
  const void* x;  // [m, k], rows ldx elements apart
  DType x_type;
  int64_t m, ldx;
  const void* bias;  // [n] of out_type, or null
  void* out;         // [m, n], rows ldo elements apart
  DType out_type;
  int64_t ldo;
};

}  // namespace anychip
