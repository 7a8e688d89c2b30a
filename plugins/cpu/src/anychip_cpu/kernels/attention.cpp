#include "attention.h"

#include "kernels.h"
#include "vector.h"

namespace anychip {

void attention(const AttentionCall& call) { attention<Vector>(call); }
void norm(const Norm& a) { norm<Vector>(a); }
void gate(const Gate& a) { gate<Vector>(a); }

}  // namespace anychip
