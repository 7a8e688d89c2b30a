// Kernel calls that are listed with their arguments instead of being made, and made together later.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace anychip {

// A step's calls, listed for `tokens` of them. Made again, they are for as many tokens as that step has: a call whose
// rows follow the tokens takes so many rows, and the rest of its storage is left as it is.
class Recording {
 public:
  explicit Recording(int64_t tokens) : tokens_(tokens) {}

  int64_t size() const { return int64_t(calls_.size()); }

  template <class Call, class Fn>
  void add(const Call& call, int64_t Call::*rows, Fn fn) {
    const int64_t listed = call.*rows;
    const int64_t each = listed % tokens_ ? 0 : listed / tokens_;  // rows of a token; 0: they do not follow the tokens
    calls_.emplace_back([=](int64_t tokens) {
      if (!each) return fn(call);
      Call now = call;
      now.*rows = each * tokens;
      fn(now);
    });
  }

  template <class Call, class Fn>
  void add(const Call& call, Fn fn) {
    calls_.emplace_back([=](int64_t) { fn(call); });
  }

  void replay(int64_t first, int64_t last, int64_t tokens) const {
    for (int64_t i = first; i < last; ++i) calls_[i](tokens);
  }

 private:
  const int64_t tokens_;
  std::vector<std::function<void(int64_t)>> calls_;
};

// What this thread's calls are listed in; null: they are made at once.
inline thread_local Recording* current_recording = nullptr;

}  // namespace anychip
