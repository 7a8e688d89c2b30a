// The pieces of a region that nobody has begun, as ranges that threads take from.
#pragma once

#include <atomic>
#include <cstdint>

namespace anychip {

// Pieces `begin` to `end` of region `region`, in one word: whoever was late and comes with another region's number takes
// nothing. A number comes again after 2^32 regions, which is hours.
class alignas(64) Share {
 public:
  static constexpr int64_t kMost = 0xffff;  // pieces

  void fill(uint32_t region, int64_t begin, int64_t end) {
    word_.store(uint64_t(region) << 32 | uint64_t(begin) << 16 | uint64_t(end), std::memory_order_relaxed);
  }

  bool any_left(uint32_t region) const {
    const uint64_t word = word_.load(std::memory_order_relaxed);
    return uint32_t(word >> 32) == region && (word >> 16 & 0xffff) != (word & 0xffff);
  }

  // The front piece, or the last one; -1 when none is left of that region.
  int64_t take(uint32_t region, bool front) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t begin = word >> 16 & 0xffff, end = word & 0xffff;
      if (uint32_t(word >> 32) != region || begin == end) return -1;
      const uint64_t rest = front ? word + (1 << 16) : word - 1;
      if (word_.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_relaxed))
        return int64_t(front ? begin : end - 1);
    }
  }

 private:
  std::atomic<uint64_t> word_{0};
};

}  // namespace anychip
