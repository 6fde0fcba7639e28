// Fetches memory that is needed soon, a few cache lines at a time, while the arithmetic units are busy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

// Rows of tokens that lie `stride` apart are a pattern that the hardware does not foresee beyond one row.
class Prefetcher {
 public:
  // `steps`: how many times step() will be called before the memory is needed.
  explicit Prefetcher(int steps) : steps_(steps) {}

  void add(const void* start, ptrdiff_t stride, int rows, int bytes) {
    const int lines = (bytes + 63) / 64;
    streams_[count_++] = {static_cast<const char*>(start), stride, rows, lines};
    total_ += rows * lines;
    per_step_ = (total_ + steps_ - 1) / steps_;
  }

  inline __attribute__((always_inline)) void step() {
    for (int left = per_step_; left > 0 && current_ < count_;) {
      Stream& s = streams_[current_];
      if (s.rows == 0) {
        ++current_;
        continue;
      }
      for (int i = 0; i < s.lines; ++i) __builtin_prefetch(s.start + i * 64, 0, 2);
      s.start += s.stride;
      --s.rows;
      left -= s.lines;
    }
  }


 private:
  static constexpr int kStreams = 12;
  struct Stream {
    const char* start;
    ptrdiff_t stride;
    int rows, lines;
  };
  Stream streams_[kStreams];
  int count_ = 0, current_ = 0, total_ = 0, per_step_ = 0, steps_;
};

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
