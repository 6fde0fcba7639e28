// store_slots for CPU tensors: checks, and what torch's threads do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <vector>

#include "common/cpu/isa.h"
#include "store_slots/cpu/kernels.h"

namespace mnemos::store_slots {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Step {
  int64_t batch, chunks, tokens, heads, slots;
  int dim;
  const bool *taken, *goes_on;
  const int64_t* order;
  const float* token_weights;
  float *keys, *values, *counts, *ages, *weights;
  float *found_counts, *found_ages;
};

float as_float(float x) { return x; }
float as_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What is in a slot, or a token that may come into one.
struct Candidate {
  const float *key, *value;
  float count, age, weight;
};

// The slots of one stream and head: those in use come first.
struct Stored {
  std::vector<float> keys, values, counts, ages, weights;
  Stored(int64_t slots, int dim)
      : keys(slots * dim), values(slots * dim), counts(slots), ages(slots), weights(slots) {}
};

class HalfOf {
 public:
  HalfOf(int64_t most, int dim)
      : keys_(most), weights_(padded(most), 1.0f), roots_(padded(most), 1.0f),
        packed_(static_cast<size_t>(padded(most)) * dim), squares_(padded(most)) {}

  // Every second of the candidates, from `first` on.
  Half of(const std::vector<Candidate>& candidates, size_t first) {
    int count = 0;
    for (size_t i = first; i < candidates.size(); i += 2, ++count) {
      keys_[count] = candidates[i].key;
      weights_[count] = 1 / candidates[i].weight;
      roots_[count] = 1 / std::sqrt(candidates[i].age + 1);
    }
    return {count, keys_.data(), weights_.data(), roots_.data(), packed_.data(), squares_.data()};
  }

 private:
  std::vector<const float*> keys_;
  std::vector<float> weights_, roots_, packed_, squares_;
};

// One stream's head: all chunks of the step, one after the other.
template <class T>
class Store {
 public:
  Store(const Step& p, const void* k, const void* v, void* found_keys, void* found_values, Kernels kernels)
      : p_(p), k_(static_cast<const T*>(k)), v_(static_cast<const T*>(v)), found_keys_(static_cast<T*>(found_keys)),
        found_values_(static_cast<T*>(found_values)), kernels_(kernels), now_(p.slots, p.dim), next_(p.slots, p.dim),
        token_keys_(p.tokens * p.dim), token_values_(p.tokens * p.dim), most_((p.slots + p.tokens + 1) / 2),
        first_half_(most_, p.dim), second_half_(most_, p.dim), cost_(most_), partner_(most_),
        by_place_(p.slots + p.tokens) {
    for (int64_t i = 0; i < p.slots + p.tokens; ++i) by_place_[p.order[i]] = i;
  }

  void begin(int64_t row, int64_t head) {
    row_ = row, head_ = head;
    const int64_t at = (row * p_.heads + head) * p_.slots;
    copy(p_.keys + at * p_.dim, now_.keys);
    copy(p_.values + at * p_.dim, now_.values);
    copy(p_.counts + at, now_.counts);
    copy(p_.ages + at, now_.ages);
    copy(p_.weights + at, now_.weights);
  }

  // All candidates of a chunk, ready to be compared.
  void prepare(int64_t chunk) {
    index_ = row_ * p_.chunks + chunk;
    const int64_t at = (index_ * p_.heads + head_) * p_.slots;
    std::copy(now_.counts.begin(), now_.counts.end(), p_.found_counts + at);
    std::copy(now_.ages.begin(), now_.ages.end(), p_.found_ages + at);
    if (!p_.goes_on[index_]) std::fill(now_.counts.begin(), now_.counts.end(), 0.0f);
    gather();
    if (!too_many()) return;
    first_ = first_half_.of(candidates_, 0);
    second_ = second_half_.of(candidates_, 1);
    kernels_.pack(first_, p_.dim);
    kernels_.pack(second_, p_.dim);
  }

  // A share of what takes time, independent of the others: the keys and values that the chunk finds, and the costs.
  void share(int64_t number, int64_t of) {
    const auto border = [&](int64_t all, int64_t shares) { return all * shares / of; };
    const int64_t slot = border(p_.slots, number), size = (border(p_.slots, number + 1) - slot) * p_.dim;
    const int64_t to = ((index_ * p_.heads + head_) * p_.slots + slot) * p_.dim;
    give(&now_.keys[slot * p_.dim], size, found_keys_ + to);
    give(&now_.values[slot * p_.dim], size, found_values_ + to);
    if (!too_many()) return;
    const int begin = static_cast<int>(border(first_.count, number));
    const int end = static_cast<int>(border(first_.count, number + 1));
    kernels_.nearest(first_, second_, p_.dim, begin, end, cost_.data(), partner_.data());
  }

  void finish() {
    gone_.clear();
    if (too_many()) choose();
    move();
    std::swap(now_, next_);
  }

  void end() const {
    const int64_t at = (row_ * p_.heads + head_) * p_.slots;
    std::copy(now_.keys.begin(), now_.keys.end(), p_.keys + at * p_.dim);
    std::copy(now_.values.begin(), now_.values.end(), p_.values + at * p_.dim);
    std::copy(now_.counts.begin(), now_.counts.end(), p_.counts + at);
    std::copy(now_.ages.begin(), now_.ages.end(), p_.ages + at);
    std::copy(now_.weights.begin(), now_.weights.end(), p_.weights + at);
  }

 private:
  static void copy(const float* from, std::vector<float>& to) { std::copy(from, from + to.size(), to.begin()); }

  void give(const float* from, int64_t count, float* to) const { std::copy(from, from + count, to); }
  void give(const float* from, int64_t count, uint16_t* to) const { kernels_.narrow(from, to, count); }

  bool too_many() const { return static_cast<int64_t>(candidates_.size()) > p_.slots; }

  // All that is there, in the order in which it is halved.
  void gather() {
    for (int64_t t = 0; t < p_.tokens; ++t) {
      const int64_t from = ((index_ * p_.tokens + t) * p_.heads + head_) * p_.dim;
      for (int i = 0; i < p_.dim; ++i) token_keys_[t * p_.dim + i] = as_float(k_[from + i]);
      for (int i = 0; i < p_.dim; ++i) token_values_[t * p_.dim + i] = as_float(v_[from + i]);
    }
    candidates_.clear();
    const bool* taken = p_.taken + index_ * p_.tokens;
    for (int64_t i : by_place_) {
      const int64_t token = i - p_.slots;
      if (token >= 0) {
        if (!taken[token]) continue;
        const float age = static_cast<float>(p_.tokens - token);
        const float weight = p_.token_weights[(index_ * p_.tokens + token) * p_.heads + head_];
        candidates_.push_back({&token_keys_[token * p_.dim], &token_values_[token * p_.dim], 1.0f, age, weight});
      } else if (now_.counts[i] > 0) {
        const float age = now_.ages[i] + static_cast<float>(p_.tokens);
        candidates_.push_back(
            {&now_.keys[i * p_.dim], &now_.values[i * p_.dim], now_.counts[i], age, now_.weights[i]});
      }
    }
  }

  // The cheapest merges, as many as there are candidates too many: pairs of what goes and where to.
  void choose() {
    const size_t over = candidates_.size() - p_.slots;
    chosen_.resize(first_.count);
    for (int i = 0; i < first_.count; ++i) chosen_[i] = i;
    const auto cheaper = [&](int i, int j) { return cost_[i] != cost_[j] ? cost_[i] < cost_[j] : i < j; };
    std::nth_element(chosen_.begin(), chosen_.begin() + over - 1, chosen_.end(), cheaper);
    std::sort(chosen_.begin(), chosen_.begin() + over);
    for (size_t i = 0; i < over; ++i) gone_.push_back({2 * chosen_[i], 2 * partner_[chosen_[i]] + 1});
  }

  // What is left goes into the slots, in its order.
  void move() {
    const int dim = p_.dim;
    place_.assign(candidates_.size(), 0);
    for (const Merge& merge : gone_) place_[merge.what] = kGone;
    int64_t slot = 0;
    for (size_t i = 0; i < candidates_.size(); ++i) {
      if (place_[i] == kGone) continue;
      const Candidate& x = candidates_[i];
      std::copy(x.key, x.key + dim, &next_.keys[slot * dim]);
      std::copy(x.value, x.value + dim, &next_.values[slot * dim]);
      next_.counts[slot] = x.count;
      next_.ages[slot] = x.age;
      next_.weights[slot] = x.weight;
      place_[i] = slot++;
    }
    std::fill(next_.keys.begin() + slot * dim, next_.keys.end(), 0.0f);
    std::fill(next_.values.begin() + slot * dim, next_.values.end(), 0.0f);
    std::fill(next_.counts.begin() + slot, next_.counts.end(), 0.0f);
    std::fill(next_.ages.begin() + slot, next_.ages.end(), 0.0f);
    std::fill(next_.weights.begin() + slot, next_.weights.end(), 0.0f);
    // Sums in place of means, until all that goes into a slot is there.
    for (const Merge& merge : gone_) {
      const int64_t to = place_[merge.into];
      const Candidate &x = candidates_[merge.what], &y = candidates_[merge.into];
      const bool begins = next_.counts[to] == y.count;
      add(x.key, x.weight, begins ? y.weight : 1, &next_.keys[to * dim]);
      add(x.value, x.weight, begins ? y.weight : 1, &next_.values[to * dim]);
      next_.counts[to] += x.count;
      next_.weights[to] += x.weight;
      next_.ages[to] = std::min(next_.ages[to], x.age);
    }
    for (const Merge& merge : gone_) {
      const int64_t to = place_[merge.into];
      if (to == kGone) continue;
      for (int i = 0; i < dim; ++i) next_.keys[to * dim + i] /= next_.weights[to];
      for (int i = 0; i < dim; ++i) next_.values[to * dim + i] /= next_.weights[to];
      // Once each.
      place_[merge.into] = kGone;
    }
  }

  void add(const float* x, float weight, float scale, float* to) const {
    for (int i = 0; i < p_.dim; ++i) to[i] = to[i] * scale + x[i] * weight;
  }

  struct Merge {
    int what, into;
  };
  static constexpr int64_t kGone = -1;

  const Step& p_;
  int64_t row_ = 0, head_ = 0, index_ = 0;
  const T *k_, *v_;
  T *found_keys_, *found_values_;
  Kernels kernels_;
  Stored now_, next_;
  std::vector<float> token_keys_, token_values_;
  int64_t most_;  // candidates of a half
  HalfOf first_half_, second_half_;
  Half first_ = {}, second_ = {};  // with more candidates than slots
  std::vector<float> cost_;
  std::vector<int32_t> partner_;
  std::vector<int64_t> by_place_, place_;
  std::vector<Candidate> candidates_;
  std::vector<int> chosen_;
  std::vector<Merge> gone_;
};

Kernels kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512:
      return kernels_avx512();
    case Isa::avx2:
      return kernels_avx2();
#endif
    default:
      return kernels_generic();
  }
}

// Every thread has equally many heads of streams to itself. Those that are left over are cut in shares, chunk by chunk, of
// which every thread has equally many too.
template <class T>
void run(const Step& p, const void* k, const void* v, void* found_keys, void* found_values) {
  const Kernels own = kernels();
  const auto store = [&] { return Store<T>(p, k, v, found_keys, found_values, own); };
  const int64_t units = p.batch * p.heads, threads = torch::stable::get_num_threads();
  const int64_t shared = units % threads, whole = units - shared;
  torch::stable::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Store<T> one = store();
    for (int64_t unit = begin; unit < end; ++unit) {
      one.begin(unit / p.heads, unit % p.heads);
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        one.prepare(chunk);
        one.share(0, 1);
        one.finish();
      }
      one.end();
    }
  });
  if (shared == 0) return;
  std::vector<Store<T>> stores;
  stores.reserve(shared);
  for (int64_t i = 0; i < shared; ++i) stores.push_back(store());
  const int64_t shares = threads / std::gcd(shared, threads);
  for (int64_t chunk = 0; chunk <= p.chunks; ++chunk) {
    torch::stable::parallel_for(0, shared, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t i = begin; i < end; ++i) {
        if (chunk == 0) stores[i].begin((whole + i) / p.heads, (whole + i) % p.heads);
        if (chunk > 0) stores[i].finish();
        chunk < p.chunks ? stores[i].prepare(chunk) : stores[i].end();
      }
    });
    if (chunk == p.chunks) break;
    torch::stable::parallel_for(0, shared * shares, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t i = begin; i < end; ++i) stores[i / shares].share(i % shares, shares);
    });
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "store_slots: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "store_slots: ", name, " is not contiguous");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "store_slots: ", name,
      " has an unexpected shape");
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

void store_slots(
    const Tensor& k,
    const Tensor& v,
    const Tensor& weights,
    const Tensor& taken,
    const Tensor& goes_on,
    const Tensor& order,
    const Tensor& keys,
    const Tensor& values,
    const Tensor& counts,
    const Tensor& ages,
    const Tensor& slot_weights,
    const Tensor& found_keys,
    const Tensor& found_values,
    const Tensor& found_counts,
    const Tensor& found_ages) {
  const ScalarType dtype = k.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "store_slots: k must be float32 or bfloat16");
  STD_TORCH_CHECK(k.dim() == 5, "store_slots: k must be [batch, chunks, tokens, heads, dim]");
  STD_TORCH_CHECK(keys.dim() == 4, "store_slots: keys must be [batch, heads, slots, dim]");
  const int64_t batch = k.size(0), chunks = k.size(1), tokens = k.size(2), heads = k.size(3), dim = k.size(4);
  const int64_t slots = keys.size(2);
  STD_TORCH_CHECK(dim > 0 && dim % kDimMultiple == 0, "store_slots: dim must be a multiple of 16");
  STD_TORCH_CHECK(0 < tokens && tokens <= slots, "store_slots: a chunk has more tokens than there are slots");
  check(k, "k", dtype, {batch, chunks, tokens, heads, dim});
  check(v, "v", dtype, {batch, chunks, tokens, heads, dim});
  check(weights, "weights", ScalarType::Float, {batch, chunks, tokens, heads});
  check(taken, "taken", ScalarType::Bool, {batch, chunks, tokens});
  check(goes_on, "goes_on", ScalarType::Bool, {batch, chunks});
  check(order, "order", ScalarType::Long, {slots + tokens});
  check(keys, "keys", ScalarType::Float, {batch, heads, slots, dim});
  check(values, "values", ScalarType::Float, {batch, heads, slots, dim});
  check(counts, "counts", ScalarType::Float, {batch, heads, slots});
  check(ages, "ages", ScalarType::Float, {batch, heads, slots});
  check(slot_weights, "slot_weights", ScalarType::Float, {batch, heads, slots});
  check(found_keys, "found_keys", dtype, {batch, chunks, heads, slots, dim});
  check(found_values, "found_values", dtype, {batch, chunks, heads, slots, dim});
  check(found_counts, "found_counts", ScalarType::Float, {batch, chunks, heads, slots});
  check(found_ages, "found_ages", ScalarType::Float, {batch, chunks, heads, slots});
  const auto* places = static_cast<const int64_t*>(order.const_data_ptr());
  std::vector<bool> seen(slots + tokens);
  for (int64_t i = 0; i < slots + tokens; ++i) {
    const bool fits = places[i] >= 0 && places[i] < slots + tokens && !seen[places[i]];
    STD_TORCH_CHECK(fits, "store_slots: order is no permutation");
    seen[places[i]] = true;
  }
  const Step p{
      batch, chunks, tokens, heads, slots, static_cast<int>(dim), static_cast<const bool*>(taken.const_data_ptr()),
      static_cast<const bool*>(goes_on.const_data_ptr()), places, static_cast<const float*>(weights.const_data_ptr()),
      floats(keys), floats(values), floats(counts), floats(ages), floats(slot_weights), floats(found_counts),
      floats(found_ages)};
  void *to_k = found_keys.mutable_data_ptr(), *to_v = found_values.mutable_data_ptr();
  if (dtype == ScalarType::BFloat16)
    run<uint16_t>(p, k.const_data_ptr(), v.const_data_ptr(), to_k, to_v);
  else
    run<float>(p, k.const_data_ptr(), v.const_data_ptr(), to_k, to_v);
}

}  // namespace
}  // namespace mnemos::store_slots

STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) { m.impl("store_slots", TORCH_BOX(&mnemos::store_slots::store_slots)); }
