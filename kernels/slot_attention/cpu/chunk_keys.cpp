#include "slot_attention/cpu/chunk_keys.h"

#include <algorithm>
#include <cmath>

namespace mnemos::slot_attention {

const Keys& ChunkKeys::of(const Step& p, int64_t row, int64_t head, int64_t chunk) {
  keys_.row = row;
  keys_.head = head;
  keys_.chunk = chunk;
  band(p);
  behind(p);
  keys_.count = static_cast<int>(first_.size());
  keys_.rows = (keys_.count + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  // What is padding is seen by no query.
  first_.resize(keys_.rows, 0);
  last_.resize(keys_.rows, 0);
  bias_.resize(keys_.rows, 0.0f);
  shifted_.resize(keys_.rows, 0.0f);
  keys_.runs = runs_.data();
  keys_.first = first_.data();
  keys_.last = last_.data();
  keys_.bias = bias_.data();
  keys_.shifted = shifted_.data();
  keys_.sources = sources_.data();
  return keys_;
}

void ChunkKeys::band(const Step& p) {
  const int64_t start = keys_.chunk * p.chunk, first_key = p.key_count - p.tokens + start - p.window;
  keys_.queries = static_cast<int>(std::min(p.chunk, p.tokens - start));
  keys_.from = std::max<int64_t>(first_key, 0);
  keys_.before = static_cast<int>(p.window + std::min<int64_t>(first_key, 0));
  // What comes before the first query's document is seen by none.
  const int64_t* own = p.documents + keys_.row * p.key_count + keys_.from + keys_.before;
  int reach = 0;
  while (reach < keys_.before && own[-reach - 1] == *own) ++reach;
  keys_.from += keys_.before - reach;
  keys_.before = reach;
  const int before = keys_.before, band = keys_.band = before + keys_.queries;
  const int64_t* documents = p.documents + keys_.row * p.key_count + keys_.from;
  runs_.resize(band);
  first_.resize(band);
  last_.resize(band);
  for (int j = 0; j < band; ++j) runs_[j] = j > 0 && documents[j] == documents[j - 1] ? runs_[j - 1] : j;
  int end = band;
  for (int j = band - 1; j >= 0; --j) {
    if (j + 1 < band && runs_[j + 1] == j + 1) end = j + 1;
    // A key is seen by its own query and those after it, in its document.
    first_[j] = std::max(j - before, 0);
    last_[j] = std::max(end - before, first_[j]);
  }
  keys_.own = last_[before];
  bias_.assign(band, 0.0f);
  shifted_.assign(band, 0.0f);
}

void ChunkKeys::behind(const Step& p) {
  sources_.clear();
  // Pairs of keys begin at even places.
  keys_.slots_begin = keys_.band + keys_.band % 2;
  first_.resize(keys_.slots_begin, 0);
  last_.resize(keys_.slots_begin, 0);
  bias_.resize(keys_.slots_begin, 0.0f);
  shifted_.resize(keys_.slots_begin, 0.0f);
  const int64_t place = keys_.row * p.chunks + keys_.chunk;
  const float* counts = p.counts + (place * p.kv_heads + keys_.head) * p.slots;
  for (int64_t s = 0; s < p.slots; ++s)
    if (counts[s] > 0) append(s, std::log2(counts[s]), 1.0f);
  keys_.slots_end = static_cast<int>(first_.size());
  if (keys_.slots_end % 2 != 0) append(0, 0.0f, 0.0f), last_.back() = 0;
  keys_.sinks_begin = static_cast<int>(first_.size());
  for (int64_t s = 0; s < p.sinks; ++s)
    if (p.sinks_seen[place * p.sinks + s]) append(s, 0.0f, 0.0f);
}

void ChunkKeys::append(int64_t source, float bias, float shifted) {
  sources_.push_back(source);
  first_.push_back(0);
  last_.push_back(keys_.own);
  bias_.push_back(bias);
  shifted_.push_back(shifted);
}

float* ChunkKeys::scratch(int dim, int elements, bool backward) {
  const size_t size = scratch_size(keys_, dim, elements, backward) + 16;
  if (size_ < size) {
    memory_.reset();
    memory_.reset(new float[size]);
    size_ = size;
  }
  const auto at = reinterpret_cast<uintptr_t>(memory_.get());
  return memory_.get() + (64 - at % 64) % 64 / sizeof(float);
}

}  // namespace mnemos::slot_attention
