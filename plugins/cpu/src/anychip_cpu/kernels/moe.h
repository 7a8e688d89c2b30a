// A mixture of experts: choices sorted by expert, gate and up in one product with their activation, down, and the
// weighted sum. A panel of gate and up holds kPanel / 2 columns of each.
#pragma once

#include <vector>

#include "elementwise.h"
#include "gemm.h"
#include "moe_types.h"

namespace anychip {

constexpr int64_t kHalf = kPanel / 2;
constexpr int64_t kMoeBytes = 32 << 20;  // of float32 results kept at a time
constexpr int64_t kExpertPanels = 16;    // of a piece, at most

inline Weights expert_weights(const PackedWeights& first, int64_t expert, int64_t stride, int64_t scale_stride, int64_t super_stride) {
  Weights w = first.weights();
  w.panels = (const char*)w.panels + expert * stride;
  if (w.scales) w.scales = (const char*)w.scales + expert * scale_stride;
  if (w.zeros) w.zeros = (const char*)w.zeros + expert * scale_stride;
  if (w.super_scales) w.super_scales += expert * super_stride;
  if (w.super_zeros) w.super_zeros += expert * super_stride;
  if (w.fixed_scale) w.fixed_scale += expert;
  return w;
}

// Some choices of one expert.
struct ExpertBlock {
  int64_t expert, begin, rows;
};

struct Sorted {
  std::vector<int64_t> choices;  // token * top_k + place, by expert
  std::vector<ExpertBlock> blocks;
};

inline Sorted sort_choices(const Moe& a, int64_t first_token, int64_t tokens, int64_t most) {
  Sorted s;
  std::vector<int64_t> starts(a.e.experts + 1, 0);
  const int64_t begin = first_token * a.top_k, end = (first_token + tokens) * a.top_k;
  for (int64_t i = begin; i < end; ++i)
    if (a.ids[i] >= 0) ++starts[a.ids[i] + 1];
  for (int64_t e = 0; e < a.e.experts; ++e) {
    for (int64_t done = 0; done < starts[e + 1]; done += most)
      s.blocks.push_back({e, starts[e] + done, std::min(most, starts[e + 1] - done)});
    starts[e + 1] += starts[e];
  }
  s.choices.resize(starts[a.e.experts]);
  for (int64_t i = begin; i < end; ++i)
    if (a.ids[i] >= 0) s.choices[starts[a.ids[i]]++] = i;
  return s;
}

// fn(block, panel, c): c [rows][kPanel] is the block's rows times the panel. Few blocks are shared by several threads.
template <class V, class B, class X, class WeightsOf, class RowOf, class Fn>
void each_product(const std::vector<ExpertBlock>& blocks, const X* x, int64_t ldx, const WeightsOf& weights_of,
                  const RowOf& row_of, const Fn& fn) {
  const int64_t panels = cdiv<int64_t>(weights_of(0).n, kPanel);
  // Each packs the block's rows anew, which costs little beside some panels; more panels would hold others up.
  const int64_t shares = std::min(panels, std::max<int64_t>(cdiv<int64_t>(32 * num_threads(), blocks.size()), cdiv(panels, kExpertPanels)));
  stream_for(blocks.size() * shares, 1, [&](int64_t item, int64_t end) {
    static thread_local Scratch store;
    alignas(64) float c[kBlockRows * kPanel];
    for (; item < end; ++item) {
      const ExpertBlock& block = blocks[item / shares];
      const Weights w = weights_of(block.expert);
      const int64_t share = item % shares;
      const auto panels_of_share = [&](const auto& product) {
        for (int64_t panel = panels * share / shares; panel < panels * (share + 1) / shares; ++panel) {
          product(panel);
          fn(block, panel, c);
        }
      };
      const auto place = [&](int64_t m) { return row_of(block.begin + m); };
      if constexpr (V::kTiles && std::is_same_v<B, bf16>) {
        if (TiledRows<V>::serves(w, block.rows)) {
          static thread_local Scratch stores[3];
          const WholeRows<TiledRows<V>> left(block.rows, w, stores);
          for (int64_t t = 0; t < left.tiles; ++t) left.pack(t, x, ldx, w, place);
          panels_of_share([&](int64_t panel) { left.times_panel(c, w, panel); });
          continue;
        }
      }
      const bool direct = direct_kind(w.kind) && block.rows <= kQuantizedRows * kDirectTiles;
      const LeftBlock<V, B> left(block.rows, w.k, store.get<Left<V, B>>(LeftBlock<V, B>::size(block.rows, w.k)),
                                 direct ? kQuantizedRows : V::MR);
      for (int64_t t = 0; t < left.tiles; ++t) pack_tile(left, t, w, x, ldx, 0, w.k, place);
      panels_of_share([&](int64_t panel) {
        std::memset(c, 0, sizeof(float) * block.rows * kPanel);
        panel_product<V, B>(c, left, w, panel, 0, direct);
      });
    }
  });
}

template <class V, class B, class T>
void moe_typed(const Moe& a) {
  using F = typename V::F;
  const Experts& e = a.e;
  const int64_t width = round_up<int64_t>(e.hidden, kPanel), middle = round_up<int64_t>(e.intermediate, kHalf);
  const int64_t at_once = std::max<int64_t>(1, kMoeBytes / int64_t(sizeof(float)) / (width * a.top_k));
  const int64_t most = std::max<int64_t>(V::MR, std::min<int64_t>(kBlockRows, kBlockRows * 2048 / e.hidden));
  static Scratch hidden_store, result_store;
  for (int64_t first = 0; first < a.tokens; first += at_once) {
    const int64_t tokens = std::min(at_once, a.tokens - first);
    const Sorted s = sort_choices(a, first, tokens, most);
    float* hidden = hidden_store.get<float>(s.choices.size() * middle);
    float* result = result_store.get<float>(tokens * a.top_k * width);
    if (!s.blocks.empty()) {
      each_product<V, B>(
          s.blocks, (const T*)a.x, a.ldx,
          [&](int64_t i) { return expert_weights(e.gate_up, i, e.gate_up_stride, e.gate_up_scale_stride, e.gate_up_super_stride); },
          [&](int64_t i) { return s.choices[i] / a.top_k; },
          [&](const ExpertBlock& block, int64_t panel, const float* c) {
            const float* bias = e.gate_up_bias ? e.gate_up_bias + block.expert * 2 * middle + panel * kPanel : nullptr;
            for (int64_t m = 0; m < block.rows; ++m)
              for (int64_t i = 0; i < kHalf; i += V::W) {
                F gate = V::load(c + m * kPanel + i), up = V::load(c + m * kPanel + kHalf + i);
                if (bias) gate = V::add(gate, V::load(bias + i)), up = V::add(up, V::load(bias + kHalf + i));
                V::store(hidden + (block.begin + m) * middle + panel * kHalf + i, gated<V>(Activation(e.activation), gate, up));
              }
          });
      each_product<V, B>(
          s.blocks, hidden, middle,
          [&](int64_t i) { return expert_weights(e.down, i, e.down_stride, e.down_scale_stride, e.down_super_stride); },
          [&](int64_t i) { return i; },
          [&](const ExpertBlock& block, int64_t panel, const float* c) {
            const float* bias = e.down_bias ? e.down_bias + block.expert * width + panel * kPanel : nullptr;
            for (int64_t m = 0; m < block.rows; ++m) {
              const int64_t choice = s.choices[block.begin + m];
              const F weight = V::set1(a.weights[choice]);
              float* to = result + (choice - first * a.top_k) * width + panel * kPanel;
              for (int64_t i = 0; i < kPanel; i += V::W) {
                F x = V::load(c + m * kPanel + i);
                if (bias) x = V::add(x, V::load(bias + i));
                V::store(to + i, V::mul(x, weight));
              }
            }
          });
    }
    parallel_for(tokens, row_grain(tokens, e.hidden * a.top_k), [&](int64_t token, int64_t end) {
      for (; token < end; ++token) {
        T* out = (T*)a.out + (first + token) * e.hidden;
        each_vector<V>(e.hidden, [&](int64_t i, auto n) {
          F sum = V::zero();
          for (int64_t k = 0; k < a.top_k; ++k)
            if (a.ids[(first + token) * a.top_k + k] >= 0) sum = V::add(sum, V::load(result + (token * a.top_k + k) * width + i));
          store<V>(out + i, sum, n);
        });
      }
    });
  }
}

template <class V>
void moe(const Moe& a) {
  const bool dense = DType(a.e.gate_up.kind) == DType::bf16;
  if (dense) return moe_typed<V, bf16, bf16>(a);
  if (a.type == DType::bf16) moe_typed<V, float, bf16>(a); else moe_typed<V, float, float>(a);
}

}  // namespace anychip
