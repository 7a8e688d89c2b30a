// A thread of the pool beside the caller's: what it has done, whether it sleeps, and whether it has lost its core.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <time.h>
#endif

namespace anychip {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto kLost = microseconds(150);          // waited for a helper that did not run: it has lost its core
constexpr auto kAsideLeast = microseconds(4000);   // about what the system gives a neighbour at a time
constexpr auto kAsideMost = microseconds(64000);

struct alignas(64) Helper {
  // The helper writes these, the caller reads them.
  std::atomic<uint64_t> begun{0}, done{0};  // pieces, ever
  // Both write these.
  alignas(64) std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable woken;
  // The caller writes these.
  alignas(64) std::atomic<bool> aside{false};  // takes no part in short regions
  std::atomic<int> share{0};                   // its own, or -1
  Clock::time_point aside_until{}, lost_at{};
  Clock::duration penalty = kAsideLeast;
  std::thread thread;

  bool inside_piece() const { return begun.load(std::memory_order_relaxed) != done.load(std::memory_order_relaxed); }

  // Until wake() is called, unless go() is true once others can see that it sleeps.
  template <class Go>
  void sleep(const Go& go) {
    asleep.store(true, std::memory_order_seq_cst);
    std::unique_lock<std::mutex> lock(mutex);
    if (go()) asleep.store(false, std::memory_order_relaxed);
    woken.wait(lock, [&] { return !asleep.load(std::memory_order_relaxed); });
  }

  // Whether it slept.
  bool wake() {
    if (!asleep.load(std::memory_order_seq_cst)) return false;
    std::lock_guard<std::mutex> lock(mutex);
    if (!asleep.exchange(false, std::memory_order_relaxed)) return false;
    woken.notify_one();
    return true;
  }

  // Processor time that it has had, in nanoseconds; -1 where the system does not say.
  int64_t processor_time() {
#if defined(__linux__)
    clockid_t clock;
    timespec time;
    if (!pthread_getcpuclockid(thread.native_handle(), &clock) && !clock_gettime(clock, &time))
      return time.tv_sec * int64_t(1000000000) + time.tv_nsec;
#endif
    return -1;
  }

  // Left out of short regions for a while, twice as long where that happens again soon.
  void set_aside(Clock::time_point now) {
    penalty = now - lost_at < 2 * penalty ? std::min<Clock::duration>(2 * penalty, kAsideMost) : kAsideLeast;
    lost_at = now, aside_until = now + penalty;
    aside.store(true, std::memory_order_seq_cst);
  }
};

}  // namespace anychip
