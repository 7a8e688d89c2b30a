// Threads of the kernels' own. They take pieces of a kernel's work, and sleep when nothing comes.
//
// A piece has the same bounds whoever runs it, so results do not depend on which threads came, or on when. A helper takes
// a piece when it gets to it: one that the system has not let run yet is not waited for, and what it would have done is
// done by the others. Only pieces that were begun are waited for, so a piece should take some tens of microseconds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace anychip {

// The calling thread counts: n - 1 are started. Not while work runs.
void set_threads(int threads);
int num_threads();

// Items 0 to n, in pieces of `grain`, or of more where that would make more than 65,535 of them.
struct Work {
  void (*piece)(void* context, int64_t begin, int64_t end);
  void* context;
  int64_t n, grain;
  bool streamed;  // each thread has a share of its own, which it goes through from its front
};

// On every thread that comes; returns when all is done. Throws std::bad_alloc when a piece did.
void run(const Work& work);

template <class Fn>
void run_pieces(int64_t n, int64_t grain, bool streamed, const Fn& fn) {
  if (n <= 0) return;
  if (n <= grain || num_threads() == 1) return fn(int64_t(0), n);
  const auto piece = [](void* context, int64_t begin, int64_t end) { (*(const Fn*)context)(begin, end); };
  run({piece, (void*)&fn, n, grain, streamed});
}

// fn(begin, end) over pieces of about `grain` of 0 to n, in that order, which threads take as they become free.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
  run_pieces(n, grain, false, fn);
}

// As parallel_for, for work that reads memory from one end to the other: a thread goes through a share of its own, in
// order, so that what is asked for ahead is what it comes to next. Others take from the share's end when they have none.
template <class Fn>
void stream_for(int64_t n, int64_t grain, const Fn& fn) {
  run_pieces(n, grain, true, fn);
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
