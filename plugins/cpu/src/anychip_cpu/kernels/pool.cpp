#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace anychip {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kAwake = std::chrono::milliseconds(2);  // longer than the gap between two steps

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      ending_ = true;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  void run(Body body, void* context) {
    body_ = body, context_ = context;
    working_.store(threads_ - 1, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    body(context, 0, threads_);
    for (int spins = 0; working_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 1 << 14) pause();
      else sched_yield();  // others want this core
    }
  }

 private:
  void serve(int index) {
    uint64_t seen = 0;
    while (true) {
      seen = next_round(seen);
      if (ending_) return;
      body_(context_, index, threads_);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t next_round(uint64_t seen) {
    const auto until = Clock::now() + kAwake;
    for (int spins = 1;; ++spins) {
      const uint64_t round = round_.load(std::memory_order_acquire);
      if (round != seen) return round;
      pause();
      if (spins % 256 == 0 && Clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
    asleep_.fetch_sub(1, std::memory_order_relaxed);
    return round_.load(std::memory_order_acquire);
  }

  const int threads_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> round_{0};
  alignas(64) std::atomic<int> working_{0};
  std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  bool ending_ = false;
  std::vector<std::thread> workers_;
};

int wanted_threads = 1;
Pool* pool = nullptr;
pid_t owner = 0;

// A forked child has none of its parent's threads: it leaves their pool where it is and starts its own.
Pool& current() {
  if (!pool || owner != getpid() || pool->threads() != wanted_threads) {
    if (owner == getpid()) delete pool;
    pool = new Pool(wanted_threads);
    owner = getpid();
  }
  return *pool;
}

}  // namespace

void set_threads(int threads) { wanted_threads = threads < 1 ? 1 : threads; }

int num_threads() { return wanted_threads; }

void run(Body body, void* context) {
  if (wanted_threads == 1) body(context, 0, 1);
  else current().run(body, context);
}

}  // namespace anychip
