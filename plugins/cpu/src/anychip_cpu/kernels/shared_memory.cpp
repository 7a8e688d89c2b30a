#include "shared_memory.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace anychip {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<uint64_t>& counter(const SharedReduce& r, int64_t rank) {
  return *(std::atomic<uint64_t>*)(r.region + rank * kLine);
}

char* slot(const SharedReduce& r, int64_t rank, uint64_t round) {
  return r.region + r.ranks * kLine + (rank * 2 + int64_t(round % 2)) * r.slot_bytes;
}

bool wait_for(const SharedReduce& r, uint64_t round) {
  const auto deadline = Clock::now() + std::chrono::duration<double>(r.timeout_s);
  for (int64_t rank = 0; rank < r.ranks; ++rank)
    for (int spins = 0; counter(r, rank).load(std::memory_order_acquire) < round; ++spins) {
      if (spins < 1000) continue;
      sched_yield();  // ranks may outnumber cores
      if (spins % 256 == 0 && Clock::now() > deadline) return false;
    }
  return true;
}

template <class T>
void add_slots(const SharedReduce& r, uint64_t round, char* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int64_t rank = 0; rank < r.ranks; ++rank) sum += to_float(((const T*)slot(r, rank, round))[i]);
    from_float(sum, (T*)to + i);
  }
}

}  // namespace

bool all_reduce(const SharedReduce& r) {
  const int64_t width = r.type == DType::bf16 ? 2 : 4, most = r.slot_bytes / width;
  for (int64_t begin = 0; begin < r.elements; begin += most) {
    const int64_t count = std::min(most, r.elements - begin);
    char* at = r.data + begin * width;
    // The slot was read two rounds ago, and every rank has announced the round since.
    const uint64_t round = counter(r, r.rank).load(std::memory_order_relaxed) + 1;
    std::memcpy(slot(r, r.rank, round), at, count * width);
    counter(r, r.rank).store(round, std::memory_order_release);
    if (!wait_for(r, round)) return false;
    if (r.type == DType::bf16) add_slots<bf16>(r, round, at, count); else add_slots<float>(r, round, at, count);
  }
  return true;
}

}  // namespace anychip
