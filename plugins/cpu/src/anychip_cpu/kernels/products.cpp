#include "gemm.h"
#include "kernels.h"
#include "low_rank.h"
#include "moe.h"
#include "rows.h"
#include "vector.h"

namespace anychip {

void gemm(const Gemm& g) { gemm<Vector>(g); }
void rows(const Gemm& g) { rows<Vector>(g); }
float read(const float* data, int64_t count) { return read<Vector>(data, count); }
void moe(const Moe& a) { moe<Vector>(a); }
void low_rank(const LowRank& a) { low_rank<Vector>(a); }

}  // namespace anychip
