// Arguments of the ops on a device: checks that keep every access in bounds, and memory from torch's allocator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <tuple>
#include <vector>

#include "program.cuh"

namespace mnemos::miras_scan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What lies between the kernels is kept within this; a longer sequence is done in spans.
constexpr int64_t kWorkspace = int64_t{1} << 30;

inline std::string shape_text(const int64_t* begin, const int64_t* end) {
  std::ostringstream text;
  text << '[';
  for (const int64_t* p = begin; p != end; ++p) text << (p == begin ? "" : ", ") << *p;
  text << ']';
  return text.str();
}

inline void check(const Tensor& x, const char* name, ScalarType dtype, const char* dtype_name,
                  const std::vector<int64_t>& shape, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), "miras_scan: ", name,
                  " is not on the device of q, cuda:", like.get_device_index());
  STD_TORCH_CHECK(x.scalar_type() == dtype, "miras_scan: ", name, " is not ", dtype_name);
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "miras_scan: ", name,
                  " has shape ", shape_text(sizes.begin(), sizes.end()), "; expected ",
                  shape_text(shape.data(), shape.data() + shape.size()));
  STD_TORCH_CHECK(x.is_contiguous(), "miras_scan: ", name, " is not contiguous");
}

// Copies of 16 bytes start at multiples of 16. What torch allocates does; a view into the middle of something may not.
inline Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x);
}

class Arguments {
 public:
  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& eta,
            const Tensor& theta, const std::optional<Tensor>& resets, int64_t interval)
      : like_(q), dtype_(q.scalar_type()) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "miras_scan: q and v have ", q.dim(), " and ", v.dim(),
                    " dimensions; expected 4");
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16,
                    "miras_scan: q is neither float32 nor bfloat16");
    batch_ = q.size(0);
    tokens_ = q.size(1);
    heads_ = q.size(2);
    key_dim_ = q.size(3);
    value_dim_ = v.size(3);
    STD_TORCH_CHECK(key_dim_ == 32 || key_dim_ == 64 || key_dim_ == 128, "miras_scan: the key dim is ", key_dim_,
                    "; expected 32, 64 or 128");
    STD_TORCH_CHECK(value_dim_ > 0 && value_dim_ % kSlice == 0, "miras_scan: the value dim is ", value_dim_,
                    "; expected a multiple of ", kSlice);
    STD_TORCH_CHECK(tokens_ > 0 && tokens_ < (int64_t{1} << 30), "miras_scan: ", tokens_, " tokens");
    STD_TORCH_CHECK(batch_ * heads_ <= 65535, "miras_scan: batch x heads is ", batch_ * heads_,
                    "; at most 65535 in one call");
    STD_TORCH_CHECK(interval > 0 && interval % kChunk == 0, "miras_scan: the interval is ", interval,
                    "; expected a multiple of ", kChunk, " on CUDA");
    interval_ = static_cast<int>(std::min(interval, (tokens_ + kChunk - 1) / kChunk * kChunk));
    check_input(q, "q", key_dim_);
    check_input(k, "k", key_dim_);
    check_input(v, "v", value_dim_);
    check_gate(alpha, "alpha");
    check_gate(eta, "eta");
    check_gate(theta, "theta");
    if (resets.has_value()) check(*resets, "resets", ScalarType::Bool, "bool", {batch_, tokens_}, like_);
    gates_ = {floats(alpha), floats(eta), floats(theta),
              resets.has_value() ? static_cast<const unsigned char*>(resets->const_data_ptr()) : nullptr};
  }

  void check_input(const Tensor& x, const char* name, int64_t dim) const {
    check(x, name, dtype_, "of q's dtype", {batch_, tokens_, heads_, dim}, like_);
  }
  void check_gate(const Tensor& x, const char* name) const {
    check(x, name, ScalarType::Float, "float32", {batch_, tokens_, heads_}, like_);
  }
  void check_state(const Tensor& x, const char* name) const { check(x, name, ScalarType::Float, "float32", state(), like_); }
  void check_floats(const Tensor& x, const char* name, const std::vector<int64_t>& shape) const {
    check(x, name, ScalarType::Float, "float32", shape, like_);
  }

  bool empty() const { return batch_ * heads_ == 0; }
  bool bf16() const { return dtype_ == ScalarType::BFloat16; }
  int interval() const { return interval_; }
  const Gates& gates() const { return gates_; }
  Shape shape() const {
    return {static_cast<int>(batch_), static_cast<int>(tokens_), static_cast<int>(heads_), static_cast<int>(key_dim_),
            static_cast<int>(value_dim_)};
  }
  std::vector<int64_t> state() const { return {batch_, heads_, key_dim_, value_dim_}; }
  std::vector<int64_t> residuals() const { return {batch_, heads_, tokens_, value_dim_}; }
  std::vector<int64_t> states() const {
    return {batch_, heads_, (tokens_ + interval_ - 1) / interval_, 2, key_dim_, value_dim_};
  }

  Tensor make(const std::vector<int64_t>& sizes) const {
    return torch::stable::new_empty(like_, sizes, ScalarType::Float);
  }
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like_.get_device_index(), &stream));
    return static_cast<Stream>(stream);
  }

  static const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
  static float* mutable_floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

 private:
  const Tensor& like_;
  ScalarType dtype_;
  int64_t batch_, tokens_, heads_, key_dim_, value_dim_;
  int interval_;
  Gates gates_;
};

// Scratch memory, given back to torch's allocator when the launches are made: it hands it out again in stream order.
class Scratch {
 public:
  explicit Scratch(const Arguments& arguments) : arguments_(arguments) {}
  float* operator()(int64_t count) {
    held_.push_back(arguments_.make({count}));
    return Arguments::mutable_floats(held_.back());
  }

 private:
  const Arguments& arguments_;
  std::vector<Tensor> held_;
};

}  // namespace mnemos::miras_scan
