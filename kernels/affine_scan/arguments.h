// What the CPU and the CUDA implementation check and allocate alike.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace mnemos::affine_scan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [batch, tokens, features]; a state is saved before the tokens 0, interval, 2 interval, ...
struct Sizes {
  int64_t batch, tokens, features, interval;
  int64_t states() const { return (tokens + interval - 1) / interval; }
};

// token: may be bfloat16.
inline void check(
    const Tensor& x, const char* name, const std::vector<int64_t>& shape, bool token, const Tensor& like) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || (token && type == ScalarType::BFloat16),
      "affine_scan: ", name, token ? " must be float32 or bfloat16" : " must be float32");
  STD_TORCH_CHECK(x.is_contiguous(), "affine_scan: ", name, " must be contiguous");
  STD_TORCH_CHECK(x.device() == like.device(), "affine_scan: ", name, " must be on the device of b");
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "affine_scan: ", name, " has the wrong shape");
}

inline Sizes check_inputs(const Tensor& a, const Tensor& b, const std::optional<Tensor>& resets, int64_t interval) {
  STD_TORCH_CHECK(interval >= 1 && interval <= 4096, "affine_scan: interval must be from 1 to 4096");
  STD_TORCH_CHECK(b.dim() == 3 && b.size(1) >= 1, "affine_scan: b must be [batch, tokens, features] with a token");
  const Sizes n{b.size(0), b.size(1), b.size(2), interval};
  check(b, "b", {n.batch, n.tokens, n.features}, true, b);
  check(a, "a", {n.batch, n.tokens, n.features}, true, b);
  if (resets.has_value()) {
    STD_TORCH_CHECK(
        resets->scalar_type() == ScalarType::Bool && resets->dim() == 2 && resets->size(0) == n.batch &&
            resets->size(1) == n.tokens && resets->is_contiguous() && resets->device() == b.device(),
        "affine_scan: resets must be [batch, tokens], bool, contiguous and on the device of b");
  }
  return n;
}

inline void check_backward(
    const Sizes& n, const Tensor& grad_h, const Tensor& grad_after, const Tensor& b, const Tensor& states) {
  check(grad_h, "grad_h", {n.batch, n.tokens, n.features}, true, b);
  STD_TORCH_CHECK(grad_h.scalar_type() == b.scalar_type(), "affine_scan: grad_h must have the dtype of b");
  check(grad_after, "grad_after", {n.batch, n.features}, false, b);
  check(states, "states", {n.batch, n.states(), n.features}, false, b);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

inline const uint8_t* bytes(const std::optional<Tensor>& resets) {
  return resets.has_value() ? static_cast<const uint8_t*>(resets->const_data_ptr()) : nullptr;
}

}  // namespace mnemos::affine_scan
