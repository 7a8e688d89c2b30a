// Every kernel, for this library's vector type.
#pragma once

#include "attention_types.h"
#include "elementwise.h"
#include "low_rank_types.h"
#include "latent_types.h"
#include "moe_types.h"
#include "state_types.h"
#include "weights.h"

namespace anychip {

void gemm(const Gemm& g);
void rows(const Gemm& g);  // weights as a checkpoint has them
float read(const float* data, int64_t count);
void norm(const Norm& a);
void gate(const Gate& a);
void attention(const AttentionCall& call);
void latent_attention(const LatentCall& call);
void moe(const Moe& a);
void low_rank(const LowRank& a);
void matrix_state(const MatrixCall& call);
void convolution(const ConvolutionCall& call);
void scan(const ScanCall& call);

}  // namespace anychip
