// Sums over the processes of one host, through memory that they share.
#pragma once

#include "types.h"

namespace anychip {

// A region begins with a counter for each rank, a cache line each, then two slots for each rank: a rank writes one
// while others may still read the other.
struct SharedReduce {
  char* region;
  int64_t rank, ranks, slot_bytes;
  char* data;  // summed in place
  int64_t elements;
  DType type;  // f32 or bf16
  double timeout_s;
};

constexpr int64_t kLine = 64;

// False where some rank did not come within the timeout. All ranks get the same bits: each adds in order of rank.
bool all_reduce(const SharedReduce& r);

}  // namespace anychip
