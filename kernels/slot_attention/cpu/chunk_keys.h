// The list of the keys that a chunk's queries see.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "slot_attention/cpu/kernels.h"

namespace mnemos::slot_attention {

// Made anew for each chunk that a thread works at; keeps its memory.
class ChunkKeys {
 public:
  const Keys& of(const Step& p, int64_t row, int64_t head, int64_t chunk);

  // Aligned to 64 bytes.
  float* scratch(int dim, int elements, bool backward);

 private:
  void band(const Step& p);
  void behind(const Step& p);
  void append(int64_t source, float bias, float shifted);

  Keys keys_{};
  std::vector<int> runs_, first_, last_;
  std::vector<float> bias_, shifted_;
  std::vector<int64_t> sources_;
  std::unique_ptr<float[]> memory_;  // as large as any chunk has needed, with what the last one left there
  size_t size_ = 0;
};

}  // namespace mnemos::slot_attention
