#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"

namespace anychip {
namespace {

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
double uniform(uint32_t seed_low, uint32_t seed_high, uint32_t index, uint32_t position) {
  uint32_t c0 = position, c1 = index, c2 = 0, c3 = 0, k0 = seed_low, k1 = seed_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(second >> 32) ^ c1 ^ k0, c1 = uint32_t(second);
    c2 = uint32_t(first >> 32) ^ c3 ^ k1, c3 = uint32_t(first);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return (double(c0 >> 5) * 67108864.0 + double(c1 >> 6)) * 0x1p-53;
}

// NaN is never the greatest; of a row that has nothing greater than -inf it is the first.
int32_t greatest(const float* row, int64_t vocab) {
  constexpr int64_t kPiece = 4096;
  int64_t best = 0;
  float found = -INFINITY;
  for (int64_t begin = 0; begin < vocab; begin += kPiece) {
    const int64_t end = std::min(vocab, begin + kPiece);
    float most = -INFINITY;
    for (int64_t i = begin; i < end; ++i) most = row[i] > most ? row[i] : most;
    if (most > found) found = most, best = std::find(row + begin, row + end, most) - row;
  }
  return int32_t(best);
}

struct Ranked {
  double weight;
  int32_t id;
  bool operator<(const Ranked& other) const { return weight != other.weight ? weight > other.weight : id < other.id; }
};

// The shortest run, by rank, that reaches `wanted`: halves are told apart, never sorted, until a few are left.
void keep_mass(std::vector<Ranked>& items, double wanted) {
  constexpr int64_t kFew = 64;
  auto low = items.begin(), high = items.end();
  double before = 0;
  while (high - low > kFew) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high);
    double sum = 0;
    for (auto i = low; i != middle; ++i) sum += i->weight;
    if (before + sum >= wanted) high = middle;
    else before += sum, low = middle;
  }
  std::sort(low, high);
  for (auto i = low; i != high; ++i) {
    if (before >= wanted && i != items.begin()) return items.erase(i, items.end()), void();
    before += i->weight;
  }
  items.erase(high, items.end());
}

// `alone`: no other row is drawn beside this one, so its vocabulary is shared among the threads.
int32_t draw(const Sample& a, int64_t row, bool alone) {
  const float* logits = a.logits + row * a.ld;
  const int32_t best = greatest(logits, a.vocab);
  const double temperature = a.temperature[row];
  if (temperature == 0) return best;
  const double most = double(logits[best]) / temperature;
  std::vector<Ranked> items(a.vocab);
  const auto weigh = [&](int64_t i, int64_t end) {
    // Masked tokens, often nearly all, need no exponential. What is no number weighs nothing: ranks need an order.
    for (; i < end; ++i) {
      const double weight = logits[i] > -INFINITY ? std::exp(double(logits[i]) / temperature - most) : 0;
      items[i] = {weight > 0 ? weight : 0, int32_t(i)};
    }
  };
  if (alone) parallel_for(a.vocab, 8192, weigh);
  else weigh(0, a.vocab);
  const bool cut_k = a.top_k[row] > 0 && a.top_k[row] < a.vocab, cut_p = a.top_p[row] < 1, cut_min = a.min_p[row] > 0;
  if (cut_k) {
    std::nth_element(items.begin(), items.begin() + a.top_k[row], items.end());
    items.resize(a.top_k[row]);
  }
  if (cut_p) {
    double total = 0;
    for (const Ranked& item : items) total += item.weight;
    keep_mass(items, double(a.top_p[row]) * total);
  }
  if (cut_min) {
    const double least = double(a.min_p[row]);  // the best one weighs 1
    items.erase(std::remove_if(items.begin(), items.end(), [&](const Ranked& i) { return i.weight < least; }), items.end());
  }
  if (cut_k || cut_p) std::sort(items.begin(), items.end(), [](const Ranked& x, const Ranked& y) { return x.id < y.id; });
  double total = 0;
  for (const Ranked& item : items) total += item.weight;
  const double target = total * uniform(uint32_t(a.seed_low[row]), uint32_t(a.seed_high[row]),
                                        uint32_t(a.sample_index[row]), uint32_t(a.position[row]));
  double sum = 0;
  int32_t last = best;
  for (const Ranked& item : items) {
    if (item.weight <= 0) continue;
    sum += item.weight, last = item.id;
    if (sum > target) break;
  }
  return last;
}

}  // namespace

void sample(const Sample& a) {
  if (a.temperature && a.rows < num_threads()) {
    for (int64_t row = 0; row < a.rows; ++row) a.ids[row] = draw(a, row, true);
    return;
  }
  if (a.temperature) {
    parallel_for(a.rows, 1, [&](int64_t row, int64_t end) {
      for (; row < end; ++row) a.ids[row] = draw(a, row, false);
    });
    return;
  }
  parallel_for(a.rows, 1, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) a.ids[row] = greatest(a.logits + row * a.ld, a.vocab);
  });
}

void edit_logits(const Edits& e) {
  parallel_for(e.rows, std::max<int64_t>(1, 65536 / e.vocab), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int64_t slot = e.slots[row];
      const float* logits = e.logits + row * e.ld;
      const int32_t* counts = e.counts + slot * e.vocab;
      const float factor = e.repetition[row], once = e.presence[row], each = e.frequency[row];
      float* out = e.out + row * e.vocab;
      for (int64_t i = 0; i < e.vocab; ++i) {
        const float x = logits[i], repeated = x > 0 ? x / factor : x * factor;
        const int32_t drawn = counts[i] / 2;
        const float taken = each * float(drawn) + (drawn > 0 ? once : 0.0f);
        out[i] = (counts[i] > 0 ? repeated : x) - taken;
      }
      const int32_t* ids = e.bias_ids + slot * e.width;
      const float* biases = e.biases + slot * e.width;
      for (int64_t i = 0; i < e.num_biases[row]; ++i) out[ids[i]] += biases[i];
    }
  });
}

void apply_masks(const Masks& m) {
  parallel_for(m.rows, std::max<int64_t>(1, 65536 / m.vocab), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const float* logits = m.logits + row * m.ld;
      const int32_t* words = m.masks + row * m.words;
      float* out = m.out + row * m.vocab;
      for (int64_t begin = 0; begin < m.vocab; begin += 32) {
        const uint32_t word = uint32_t(words[begin / 32]);
        const int64_t count = std::min<int64_t>(32, m.vocab - begin);
        for (int64_t i = 0; i < count; ++i) out[begin + i] = word >> i & 1 ? logits[begin + i] : -INFINITY;
      }
    }
  });
}

}  // namespace anychip
