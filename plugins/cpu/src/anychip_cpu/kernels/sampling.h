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

struct Edits {
  const float* logits;  // [rows, vocab], rows ld apart
  float* out;           // [rows, vocab]
  int64_t rows, vocab, ld;
  const int32_t *slots, *counts;  // [rows]; [slots, vocab]: 1 for a token of the prompt, 2 for each time it was drawn
  const float *repetition, *presence, *frequency;  // [rows]
  const int32_t* bias_ids;                         // [slots, width]
  const float* biases;
  const int32_t* num_biases;  // [rows]
  int64_t width;
};

void edit_logits(const Edits& e);

struct Masks {
  const float* logits;   // [rows, vocab], rows ld apart
  const int32_t* masks;  // [rows, words]: bit i of word w allows token 32 * w + i
  float* out;            // [rows, vocab]: minus infinity where it is not allowed
  int64_t rows, vocab, ld, words;
};

void apply_masks(const Masks& m);

}  // namespace anychip
