#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <deque>
#include <memory>

#include "helper.h"
#include "shares.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace anychip {
namespace {

constexpr auto kAwake = microseconds(100);    // a helper between two regions: as long as a step's Python takes
constexpr auto kSpinning = microseconds(20);  // the caller for a piece that was begun
constexpr auto kLong = microseconds(500);     // of a region from which on helpers that were set aside are called too

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether done() came true before the time was over.
template <class Done>
bool spin(Clock::duration most, const Done& done) {
  if (done()) return true;
  const auto until = Clock::now() + most;
  for (int spins = 1; !done(); ++spins) {
    pause();
    if (spins % 32 == 0 && Clock::now() > until) return false;
  }
  return true;
}

class Pool {
 public:
  explicit Pool(int threads) : shares_(new Share[threads]) {
    for (int i = 1; i < threads; ++i) helpers_.emplace_back();
    for (Helper& helper : helpers_) helper.thread = std::thread([this, &helper] { serve(helper); });
  }

  ~Pool() {
    ending_ = true;
    region_.fetch_add(1, std::memory_order_seq_cst);
    for (Helper& helper : helpers_) helper.wake();
    for (Helper& helper : helpers_) helper.thread.join();
  }

  int threads() const { return int(helpers_.size()) + 1; }

  void run(const Work& work) {
    const int64_t grain = std::max(work.grain, (work.n + Share::kMost - 1) / Share::kMost);
    const int64_t pieces = (work.n + grain - 1) / grain;
    piece_.store(work.piece, std::memory_order_relaxed), context_.store(work.context, std::memory_order_relaxed);
    n_.store(work.n, std::memory_order_relaxed), grain_.store(grain, std::memory_order_relaxed);
    const Clock::time_point began = Clock::now();
    if (began - window_began_ > kWindow) watch(began);
    if (any_aside_) admit(began);
    const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
    share_out(region, pieces, work.streamed);
    region_.store(region, std::memory_order_seq_cst);
    call(pieces - 1);
    bool called_all = !any_aside_;
    const int64_t mine = take_part(region, 0, nullptr, [&] {
      if (called_all || Clock::now() - began < kLong) return;
      called_all = true;
      call_all(pieces);
    });
    join(uint64_t(pieces - mine));
    if (failed_.load(std::memory_order_relaxed)) {
      failed_.store(false, std::memory_order_relaxed);
      throw std::bad_alloc();
    }
  }

 private:
  // -- shares and pieces

  void share_out(uint32_t region, int64_t pieces, bool streamed) {
    int64_t present = 1;
    for (Helper& helper : helpers_) {
      const bool aside = helper.aside.load(std::memory_order_relaxed);
      helper.share.store(aside ? -1 : streamed ? int(present) : 0, std::memory_order_relaxed);
      present += !aside;
    }
    const int64_t shares = streamed ? present : 1;
    for (int64_t i = 0; i < shares; ++i) shares_[i].fill(region, pieces * i / shares, pieces * (i + 1) / shares);
    num_shares_.store(int(shares), std::memory_order_relaxed);
  }

  // Runs pieces of a region while some are left: its own share's first, then the last ones of others. `helper` is null for
  // the caller; between() is called before each piece. Returns how many it ran.
  //
  // What a region is, a late helper may read while the caller writes the next one; then it takes no piece. One that it
  // takes is of a region that is not over yet, so that what it had read before was that region's.
  template <class Between>
  int64_t take_part(uint32_t region, int own, Helper* helper, const Between& between) {
    const auto piece = piece_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    const int64_t n = n_.load(std::memory_order_relaxed), grain = grain_.load(std::memory_order_relaxed);
    const int shares = num_shares_.load(std::memory_order_relaxed);
    int64_t ran = 0;
    for (int i = 0; i < shares; ++i) {
      const int share = (std::max(own, 0) + i) % shares;
      while (true) {
        between();
        const int64_t index = shares_[share].take(region, share == own);
        if (index < 0) break;
        try {
          piece(context, index * grain, std::min(n, (index + 1) * grain));
        } catch (const std::bad_alloc&) {
          failed_.store(true, std::memory_order_relaxed);
        }
        ++ran;
        if (helper) finish_piece(*helper);
      }
    }
    return ran;
  }

  bool any_left(uint32_t region) const {
    const int shares = num_shares_.load(std::memory_order_relaxed);
    for (int i = 0; i < shares; ++i)
      if (shares_[i].any_left(region)) return true;
    return false;
  }

  // -- the helpers' side

  void serve(Helper& helper) {
    RunDelay delay;
    helper.delay = &delay;
    uint32_t seen = 0;
    const auto aside = [&] { return helper.aside.load(std::memory_order_seq_cst); };
    const auto called = [&] { return region_.load(std::memory_order_seq_cst) != seen && !aside(); };
    while (!ending_) {
      // One that was set aside leaves its core to whoever wants it.
      if (!spin(kAwake, [&] { return called() || aside(); }) || aside()) {
        helper.sleep([&] { return called() || ending_; });
        if (any_left(region_.load(std::memory_order_acquire))) call(2);  // where many sleep, one wakes others
      }
      seen = region_.load(std::memory_order_acquire);
      take_part(seen, helper.share.load(std::memory_order_relaxed), &helper, [] {});
    }
  }

  void finish_piece(Helper& helper) {
    helper.done.store(helper.done.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
    if (!waiting_.load(std::memory_order_seq_cst)) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }

  // -- the caller's side

  // Wakes some of those who sleep; they wake others.
  void call(int64_t most) {
    most = std::min<int64_t>(most, 2);
    for (auto helper = helpers_.begin(); most > 0 && helper != helpers_.end(); ++helper)
      if (!helper->aside.load(std::memory_order_relaxed)) most -= helper->wake();
  }

  // Those who are aside too, for the region that runs.
  void call_all(int64_t pieces) {
    for (Helper& helper : helpers_) helper.aside.store(false, std::memory_order_seq_cst);
    call(pieces);
  }

  // Those whose time is over are aside no more.
  void admit(Clock::time_point now) {
    any_aside_ = false;
    bool back = false;
    for (Helper& helper : helpers_) {
      const bool aside = now < helper.aside_until;
      back |= !aside && helper.aside.load(std::memory_order_relaxed);
      helper.aside.store(aside, std::memory_order_seq_cst);
      any_aside_ |= aside;
    }
    if (back) count_waits(now);  // how it is with them shows from here on
  }

  // Where our threads wait for cores, there are fewer cores than threads that want them: as many helpers are set aside as
  // wait on the average, those first who waited most. The others then run without being interrupted in a piece.
  void watch(Clock::time_point now) {
    const int64_t window = std::chrono::nanoseconds(now - window_began_).count();
    const int64_t waited = count_waits(now);
    for (int64_t left = waited; left > 3 * window / 5; left -= window) {
      Helper* most = nullptr;
      for (Helper& helper : helpers_)
        if (!helper.aside.load(std::memory_order_relaxed) && (!most || helper.waited > most->waited)) most = &helper;
      if (!most) return;
      most->set_aside(now);
      any_aside_ = true;
    }
  }

  // Nanoseconds that all threads have waited for a core in the window, which ends here and begins anew.
  int64_t count_waits(Clock::time_point now) {
    static thread_local RunDelay callers;
    window_began_ = now;
    int64_t waited = callers.since_last();
    for (Helper& helper : helpers_) {
      RunDelay* const delay = helper.delay;
      waited += helper.waited = delay ? delay->since_last() : 0;
    }
    return waited;
  }

  // Until helpers have run so many pieces of this region.
  void join(uint64_t theirs) {
    helped_ += theirs;
    const auto all_done = [&] {
      uint64_t done = 0;
      for (const Helper& helper : helpers_) done += helper.done.load(std::memory_order_seq_cst);
      return done == helped_;
    };
    if (!spin(kSpinning, all_done)) wait(all_done);
  }

  // Asleep, so that a helper that has lost its core may get this one.
  template <class Done>
  void wait(const Done& all_done) {
    waiting_.store(true, std::memory_order_seq_cst);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, all_done);
    }
    waiting_.store(false, std::memory_order_relaxed);
  }

  std::unique_ptr<Share[]> shares_;
  std::deque<Helper> helpers_;
  std::atomic<void (*)(void*, int64_t, int64_t)> piece_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> n_{0}, grain_{1};
  std::atomic<int> num_shares_{0};
  alignas(64) std::atomic<uint32_t> region_{0};
  alignas(64) std::atomic<bool> waiting_{false};
  std::atomic<bool> failed_{false}, ending_{false};
  std::mutex mutex_;
  std::condition_variable done_;
  uint64_t helped_ = 0;     // pieces that helpers ran or will have run, ever
  bool any_aside_ = false;  // or was, at the last region
  Clock::time_point window_began_{};
};

std::atomic<int> wanted_threads{1};
Pool* pool = nullptr;

Pool& current() {
  // A forked child has none of its parent's threads: it leaves their pool where it is and starts its own.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  (void)registered;
  const int threads = num_threads();
  if (pool && pool->threads() != threads) delete pool, pool = nullptr;
  if (!pool) pool = new Pool(threads);
  return *pool;
}

}  // namespace

void set_threads(int threads) { wanted_threads.store(threads < 1 ? 1 : threads, std::memory_order_relaxed); }

int num_threads() { return wanted_threads.load(std::memory_order_relaxed); }

void run(const Work& work) {
  if (num_threads() == 1) work.piece(work.context, 0, work.n);
  else current().run(work);
}

}  // namespace anychip
