// Puts the kernels' pool under stress; test_pool.py compiles it with pool.cpp, plain and with sanitizers, and runs it.
// Usage: pool_stress SEED REGIONS. Prints the first thing that is wrong, and ends with 1 then.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>
#include <set>
#include <vector>

#include "pool.h"

using anychip::parallel_for;
using anychip::stream_for;

namespace {

std::mt19937 draw;

int64_t between(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(draw); }

void check(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

std::atomic<uint64_t> sink{0};

void work(int64_t rounds) {
  uint64_t x = 1;
  for (int64_t i = 0; i < rounds; ++i) x = x * 6364136223846793005u + 1442695040888963407u;
  sink.store(x, std::memory_order_relaxed);
}

// One region: every item once, in pieces that lie at multiples of the grain.
template <class Fn>
void region(int64_t n, int64_t grain, bool streamed, const Fn& each_piece) {
  std::vector<int> times(n, 0);  // not atomic: a sanitizer sees two threads on one
  std::atomic<bool> straight{true};
  const auto fn = [&](int64_t begin, int64_t end) {
    if (begin % grain || (end - begin != grain && end != n)) straight = false;
    each_piece();
    for (; begin < end; ++begin) ++times[begin];
  };
  if (streamed) stream_for(n, grain, fn); else parallel_for(n, grain, fn);
  check(straight, "a piece's bounds");
  for (int count : times) check(count == 1, "an item was done never or twice");
}

void random_regions(int64_t regions) {
  for (int64_t i = 0; i < regions; ++i) {
    if (i % 97 == 0) anychip::set_threads(int(between(1, 9)));
    const int64_t length = between(0, 99) ? between(0, 2000) : 200000;
    const bool dawdles = between(0, 63) == 0, streamed = between(0, 1);
    region(between(0, 300), between(1, 9), streamed, [&] {
      work(length);
      if (dawdles) usleep(400);  // as if its core were taken away
    });
    if (between(0, 15) == 0) usleep(useconds_t(between(0, 400)));  // helpers fall asleep
  }
}

std::atomic<int> held{0};
std::atomic<bool> released{false};

void hold(int) {
  ++held;
  while (!released) usleep(200);
  --held;
}

// Helpers that the system does not let run are not waited for: all of them are held, and work goes on.
void held_helpers(int threads) {
  anychip::set_threads(threads);
  struct sigaction action = {};
  action.sa_handler = hold;
  sigaction(SIGUSR1, &action, nullptr);
  const pthread_t caller = pthread_self();
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  std::set<pthread_t> helpers;
  const auto meet = [&] {
    region(64, 1, true, [&] {
      usleep(200);
      pthread_mutex_lock(&mutex);
      if (!pthread_equal(pthread_self(), caller)) helpers.insert(pthread_self());
      pthread_mutex_unlock(&mutex);
    });
  };
  for (int i = 0; i < 2000 && int(helpers.size()) < threads - 1; ++i) meet();
  check(int(helpers.size()) == threads - 1, "helpers do not come");
  usleep(20000);  // none is inside a piece
  for (pthread_t helper : helpers) pthread_kill(helper, SIGUSR1);
  while (held < threads - 1) usleep(200);
  for (int i = 0; i < 500; ++i) region(between(1, 300), between(1, 9), between(0, 1), [] { work(100); });
  check(held == threads - 1, "helpers went on too soon");
  released = true;
  while (held) usleep(200);
  helpers.clear();
  for (int i = 0; i < 2000 && helpers.empty(); ++i) meet();
  check(!helpers.empty(), "helpers do not come back");
}

void failing_pieces() {
  anychip::set_threads(4);
  for (int i = 0; i < 50; ++i) {
    bool caught = false;
    try {
      parallel_for(40, 1, [&](int64_t begin, int64_t) {
        work(500);
        if (begin == i % 40) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    check(caught, "memory ran out in a piece, and nobody heard");
    region(40, 1, true, [] {});
  }
}

void forked_child() {
#if !defined(__SANITIZE_THREAD__)  // its runtime and forks do not go together
  anychip::set_threads(3);
  region(50, 1, true, [] { work(100); });
  const pid_t child = fork();
  if (!child) {
    for (int i = 0; i < 50; ++i) region(50, 1, true, [] { work(100); });
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child's regions");
  region(50, 1, true, [] { work(100); });
#endif
}

}  // namespace

int main(int, char** arguments) {
  draw.seed(std::strtoul(arguments[1], nullptr, 10));
  const int64_t regions = std::strtol(arguments[2], nullptr, 10);
  random_regions(regions);
  held_helpers(4);
  failing_pieces();
  forked_child();
  cpu_set_t one;  // many threads, one core
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof one, &one);
  random_regions(regions / 4);
  std::puts("right");
}
