#include "routing.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "pool.h"

namespace anychip {
namespace {

template <class T>
void route_token(const Route& a, int64_t token, float* scores, float* picking) {
  const T* logits = (const T*)a.logits + token * a.ld;
  float most = to_float(logits[0]), total = 0;
  for (int64_t e = 1; e < a.experts; ++e) most = std::max(most, to_float(logits[e]));
  for (int64_t e = 0; e < a.experts; ++e) {
    const float x = to_float(logits[e]);
    scores[e] = a.sigmoid ? 1.0f / (1.0f + std::exp(-x)) : std::exp(x - most);
    total += scores[e];
  }
  for (int64_t e = 0; e < a.experts; ++e) {
    if (!a.sigmoid) scores[e] /= total;
    const float pick = a.bias ? scores[e] + a.bias[e] : scores[e];
    // Above what was picked, also where it is NaN, which no comparison finds: a row's experts differ.
    picking[e] = pick > -FLT_MAX ? pick : -FLT_MAX;
  }
  float sum = 0;
  for (int64_t k = 0; k < a.top_k; ++k) {
    const int64_t best = std::max_element(picking, picking + a.experts) - picking;
    picking[best] = -HUGE_VALF;
    a.ids[token * a.top_k + k] = best;
    a.weights[token * a.top_k + k] = scores[best];
    sum += scores[best];
  }
  const float factor = a.renormalize ? a.scale / sum : a.scale;
  for (int64_t k = 0; k < a.top_k; ++k) a.weights[token * a.top_k + k] *= factor;
}

}  // namespace

void route(const Route& a) {
  parallel_for(a.tokens, std::max<int64_t>(64, a.tokens / (4 * num_threads())), [&](int64_t token, int64_t end) {
    static thread_local Scratch store;
    float* scores = store.get<float>(2 * a.experts);
    for (; token < end; ++token) {
      if (a.type == DType::bf16) route_token<bf16>(a, token, scores, scores + a.experts);
      else route_token<float>(a, token, scores, scores + a.experts);
    }
  });
}

}  // namespace anychip
