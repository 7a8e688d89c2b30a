#include "channel_state.h"
#include "kernels.h"
#include "matrix_state.h"
#include "vector.h"

namespace anychip {

void matrix_state(const MatrixCall& call) { matrix_state<Vector>(call); }
void convolution(const ConvolutionCall& call) { convolution<Vector>(call); }
void scan(const ScanCall& call) { scan<Vector>(call); }

}  // namespace anychip
