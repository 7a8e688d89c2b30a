// Threads of the kernels' own. They are awake while steps follow one another, and sleep when nothing comes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace anychip {

// The calling thread counts: n - 1 are started. Not while work runs.
void set_threads(int threads);
int num_threads();

using Body = void (*)(void* context, int thread, int threads);
void run(Body body, void* context);

// fn(thread, threads) on every thread of the pool; returns when all have.
template <class Fn>
void parallel(const Fn& fn) {
  run([](void* context, int thread, int threads) { (*(const Fn*)context)(thread, threads); }, (void*)&fn);
}

// fn(begin, end) over pieces of at most `grain` of 0 to n, which threads take as they become free.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
  if (n <= grain || num_threads() == 1) {
    if (n > 0) fn(int64_t(0), n);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel([&](int, int) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      fn(begin, begin + grain < n ? begin + grain : n);
  });
}

// Storage that grows and is kept for the next call. One for each use and thread: declare it static thread_local.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    const size_t wanted = count * sizeof(T);
    if (wanted > size_) {
      const size_t size = (wanted + wanted / 4 + 4095) / 4096 * 4096;
      void* grown = std::aligned_alloc(4096, size);
      if (!grown) throw std::bad_alloc();
      held_.reset(grown);
      size_ = size;
    }
    return (T*)held_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> held_;
  size_t size_ = 0;
};

// As parallel_for, for work that reads memory from one end to the other: a thread goes through a share of its own, in
// order, so that what is asked for ahead is what it comes to next, and then helps the others.
template <class Fn>
void stream_for(int64_t n, int64_t grain, const Fn& fn) {
  if (n <= grain || num_threads() == 1) {
    if (n > 0) fn(int64_t(0), n);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  static Scratch store;
  const int64_t threads = num_threads();
  Share* shares = store.get<Share>(threads);
  for (int64_t t = 0; t < threads; ++t) new (&shares[t]) Share{{n * t / threads}, n * (t + 1) / threads};
  parallel([&](int thread, int) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(thread + i) % threads];
      for (int64_t begin; (begin = share.next.fetch_add(grain, std::memory_order_relaxed)) < share.end;)
        fn(begin, std::min(begin + grain, share.end));
    }
  });
}

}  // namespace anychip
