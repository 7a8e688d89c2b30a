#include "choice.h"

#include "vector.h"

namespace anychip {

void choose(const ChoiceCall& call) { choose<Vector>(call); }

}  // namespace anychip
