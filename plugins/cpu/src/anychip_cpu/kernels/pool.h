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

// Pieces of work that a thread takes at a time of `count` alike: few, so that nobody waits long for the last.
inline int64_t fair_grain(int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(8, count / (16 * num_threads())));
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

}  // namespace anychip
