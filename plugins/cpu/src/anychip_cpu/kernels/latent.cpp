#include "latent.h"

#include "kernels.h"
#include "vector.h"

namespace anychip {

void latent_attention(const LatentCall& call) { latent_attention<Vector>(call); }

}  // namespace anychip
