// A thread of the pool beside the caller's: what it has done, whether it sleeps, and whether others want its core.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <thread>

namespace anychip {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto kWindow = microseconds(100000);    // over which the time is counted that threads wait for a core
constexpr auto kAsideLeast = 2 * kWindow;         // of a helper whose core others want
constexpr auto kAsideMost = microseconds(1600000);

// The time that the calling thread has been ready to run and did not run, as Linux counts it.
class RunDelay {
 public:
  RunDelay() : file_(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)) { since_last(); }
  ~RunDelay() {
    if (file_ >= 0) close(file_);
  }
  RunDelay(const RunDelay&) = delete;

  // Nanoseconds since the last call, whichever thread asks; 0 where the system does not count.
  int64_t since_last() {
    char text[96];
    const ssize_t size = file_ < 0 ? -1 : pread(file_, text, sizeof text - 1, 0);
    if (size <= 0) return 0;
    text[size] = 0;
    long long ran = 0, waited = 0;
    if (std::sscanf(text, "%lld %lld", &ran, &waited) != 2) return 0;
    const int64_t before = last_;
    return (last_ = waited) - before;
  }

 private:
  const int file_;
  int64_t last_ = 0;
};

struct alignas(64) Helper {
  std::atomic<uint64_t> done{0};  // pieces, ever: the helper writes it
  alignas(64) std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable woken;
  // The caller writes these.
  alignas(64) std::atomic<bool> aside{false};  // takes no part in short regions
  std::atomic<int> share{0};                   // its own, or -1
  Clock::time_point aside_until{};
  Clock::duration penalty{};
  std::atomic<RunDelay*> delay{nullptr};  // of the helper's thread
  int64_t waited = 0;                     // in the last window, nanoseconds
  std::thread thread;

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

  // Left out of short regions for a while, twice as long as the last time where that is not long ago.
  void set_aside(Clock::time_point now) {
    const bool again = now < aside_until + 4 * kWindow;
    penalty = again ? std::min<Clock::duration>(std::max<Clock::duration>(2 * penalty, kAsideLeast), kAsideMost) : kAsideLeast;
    aside_until = now + penalty;
    aside.store(true, std::memory_order_seq_cst);
  }
};

}  // namespace anychip
