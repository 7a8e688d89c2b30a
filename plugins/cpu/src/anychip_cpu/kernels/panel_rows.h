// Rows of packed weights, of the inputs' own width: an embedding whose head has its storage.
#pragma once

#include "codes.h"
#include "pool.h"

namespace anychip {

struct PanelRows {
  Weights w;
  const int64_t* ids;  // [count]; rows of one that is none are zero
  int64_t count;
  void* out;  // [count, k] of `type`
  DType type;
};

inline float grouped_at(const Weights& w, const void* values, const f16* upper, int64_t panel, int64_t group, int lane) {
  const int64_t at = (panel * w.groups + group) * kPanel + lane;
  switch (w.scale_type) {
    case DType::f16: return to_float(((const f16*)values)[at]);
    case DType::e8: return std::ldexp(1.0f, int(((const uint8_t*)values)[at]) - 128);
    case DType::i8:
      return ((const int8_t*)values)[at] * to_float(upper[(panel * w.super_groups() + (group >> w.super_shift)) * kPanel + lane]);
    default: return ((const float*)values)[at];
  }
}

template <class T>
void panel_row(T* out, const Weights& w, int64_t id) {
  const int64_t panel = id / kPanel;
  const int lane = int(id % kPanel);
  const uint32_t* words = (const uint32_t*)w.panel(panel);
  for (int64_t group = 0; group < w.groups; ++group) {
    const float scale = grouped_at(w, w.scales, w.super_scales, panel, group, lane);
    const float zero = w.zeros ? grouped_at(w, w.zeros, w.super_zeros, panel, group, lane) : 0;
    const int64_t end = std::min(w.k, (group + 1) * w.group_size);
    for (int64_t i = group * w.group_size; i < end; ++i) from_float(number_at(w, words, lane, i) * scale - zero, out + i);
  }
}

template <class T>
void panel_rows(const PanelRows& a) {
  parallel_for(a.count, 8, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      T* out = (T*)a.out + i * a.w.k;
      if (a.ids[i] >= 0 && a.ids[i] < a.w.n) panel_row(out, a.w, a.ids[i]);
      else std::memset((void*)out, 0, sizeof(T) * a.w.k);
    }
  });
}

inline void panel_rows(const PanelRows& a) {
  if (a.type == DType::bf16) panel_rows<bf16>(a);
  else panel_rows<float>(a);
}

}  // namespace anychip
