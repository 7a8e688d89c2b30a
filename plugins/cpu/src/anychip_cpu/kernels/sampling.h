// Greedy and random draws of tokens, as docs/reference/randomness.md specifies them, without sorting a vocabulary.
#pragma once

#include <cstdint>

namespace anychip {

struct Sample {
  const float* logits;  // [rows, vocab], rows ld apart
  int64_t rows, vocab, ld;
  const float* temperature;  // these [rows]; null, all of them: every row is greedy
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int32_t *seed_low, *seed_high, *sample_index, *position;
  int32_t* ids;
};

void sample(const Sample& a);

struct Masks {
  const float* logits;   // [rows, vocab], rows ld apart
  const int32_t* masks;  // [rows, words]: bit i of word w allows token 32 * w + i
  float* out;            // [rows, vocab]: minus infinity where it is not allowed
  int64_t rows, vocab, ld, words;
};

void apply_masks(const Masks& m);

}  // namespace anychip
