// Queries and keys are normed and rotated, and keys and values take their place in the cache.
#pragma once

#include "attention_types.h"
#include "bytes.h"
#include "elementwise.h"
#include "rotation.h"

namespace anychip {

// A head's vector, in place: first the norm, then the rotation, each rounded to T as a model's own ops would.
template <class V, class T>
void norm_and_rotate(const Layer& layer, const T* from, T* to, const void* weight, int64_t position) {
  const int64_t dim = layer.dim;
  if (weight) {
    norm_row<V, T>(from, (const T*)weight, to, dim, float(layer.norm_eps), layer.norm_unit_offset != 0);
    from = to;
  } else if (from != to) {
    std::memcpy(to, from, sizeof(T) * dim);
  }
  rotate({layer.cos, layer.sin, layer.rotary_dim, layer.interleaved}, to, position);
}

inline void encode(float x, float, float* out) { *out = x; }
inline void encode(float x, float, bf16* out) { *out = to_bf16(x); }

inline void encode(float x, float scale, int8_t* out) {
  *out = int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, x / scale))));
}
inline void encode(float x, float scale, fp8* out) { *out = encode_fp8(x / scale); }

// Elements of B from the page's beginning to dimension d of a token.
template <class B>
int64_t key_place(const Layer& l, int64_t head, int64_t token, int64_t d) {
  if constexpr (sizeof(B) == 2) return ((head * l.padded_dim / 2 + d / 2) * l.block_size + token) * 2 + d % 2;
  else return (head * l.padded_dim + d) * l.block_size + token;
}

template <class B>
int64_t value_place(const Layer& l, int64_t head, int64_t token, int64_t d) {
  const int64_t keys = l.kv_heads * l.padded_dim * l.block_size;
  if constexpr (sizeof(B) == 2) return keys + ((head * l.block_size / 2 + token / 2) * l.padded_dim + d) * 2 + token % 2;
  else return keys + (head * l.block_size + token) * l.padded_dim + d;
}

template <class V, class T, class B>
void write_token(const AttentionCall& call, int64_t token, T* scratch) {
  const Layer& l = call.layer;
  const int64_t slot = call.batch.slots[token];
  if (slot < 0) return;
  const int64_t page = 2 * l.kv_heads * l.padded_dim * l.block_size * sizeof(B);
  B* const to = (B*)(call.cache + slot / l.block_size * page);
  const int64_t at = slot % l.block_size;
  for (int64_t head = 0; head < l.kv_heads; ++head) {
    const float k_scale = l.k_scale ? l.k_scale[l.scale_per_head ? head : 0] : 1.0f;
    const float v_scale = l.v_scale ? l.v_scale[l.scale_per_head ? head : 0] : 1.0f;
    norm_and_rotate<V, T>(l, (const T*)call.k + token * call.ldk + head * l.dim, scratch, l.k_norm,
                          call.batch.positions[token]);
    B* keys = to + key_place<B>(l, head, at, 0);
    const T* values = (const T*)call.v + token * call.ldv + head * l.dim;
    B* held = to + value_place<B>(l, head, at, 0);
    for (int64_t d = 0; d < l.dim; ++d) {
      const int64_t key_step = sizeof(B) == 2 ? d / 2 * l.block_size * 2 + d % 2 : d * l.block_size;
      encode(to_float(scratch[d]), k_scale, keys + key_step);
      encode(to_float(values[d]), v_scale, held + d * (sizeof(B) == 2 ? 2 : 1));
    }
    if (l.dim % 2) encode(0, 1, keys + (sizeof(B) == 2 ? l.dim / 2 * l.block_size * 2 + 1 : l.dim * l.block_size));
  }
}

// Writes what the call brings, and returns where its queries lie then, rows *ldq apart.
template <class V, class T, class B>
const T* prepare(const AttentionCall& call, int64_t* ldq) {
  const Layer& l = call.layer;
  static Scratch rotated;
  const bool changed = l.cos || l.q_norm;
  const int64_t width = l.heads * l.dim;
  T* queries = changed ? rotated.get<T>(call.batch.tokens * width) : nullptr;
  const int64_t grain = call.batch.tokens * width < kWorthThreads ? call.batch.tokens
                                                                 : cdiv<int64_t>(call.batch.tokens, 4 * num_threads());
  parallel_for(call.batch.tokens, grain, [&](int64_t token, int64_t end) {
    static thread_local Scratch scratch;
    T* one = scratch.get<T>(l.dim);
    for (; token < end; ++token) {
      if (changed)
        for (int64_t head = 0; head < l.heads; ++head)
          norm_and_rotate<V, T>(l, (const T*)call.q + token * call.ldq + head * l.dim,
                                queries + token * width + head * l.dim, l.q_norm, call.batch.positions[token]);
      if (call.k) write_token<V, T, B>(call, token, one);
    }
  });
  *ldq = changed ? width : call.ldq;
  return changed ? queries : (const T*)call.q;
}

}  // namespace anychip
