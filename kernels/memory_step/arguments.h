// What the CPU and the CUDA implementation of memory_step check alike, and what they hand to their kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "memory_step/step.h"

namespace mnemos::memory_step {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(
    const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), "memory_step: ", name, " is not on the device of q");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "memory_step: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "memory_step: ", name, " is not contiguous");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "memory_step: ", name,
      " has an unexpected shape");
}

inline Step checked(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& alpha,
    const std::optional<Tensor>& eta,
    const Tensor& theta,
    const Tensor& memory,
    const Tensor& momentum,
    const Tensor& out) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "memory_step: q must be float32 or bfloat16");
  STD_TORCH_CHECK(q.dim() == 3 && v.dim() == 3, "memory_step: q and v must be [rows, heads, dim]");
  const int64_t rows = q.size(0), heads = q.size(1), key_dim = q.size(2), value_dim = v.size(2);
  STD_TORCH_CHECK(
      key_dim == 32 || key_dim == 64 || key_dim == 128, "memory_step: the key dim must be 32, 64 or 128");
  STD_TORCH_CHECK(value_dim % kValueMultiple == 0, "memory_step: the value dim must be a multiple of 16");
  check(q, "q", dtype, {rows, heads, key_dim}, q);
  check(k, "k", dtype, {rows, heads, key_dim}, q);
  check(v, "v", dtype, {rows, heads, value_dim}, q);
  check(alpha, "alpha", ScalarType::Float, {rows, heads}, q);
  if (eta.has_value()) check(*eta, "eta", ScalarType::Float, {rows, heads}, q);
  check(theta, "theta", ScalarType::Float, {rows, heads}, q);
  check(memory, "memory", ScalarType::Float, {rows, heads, key_dim, value_dim}, q);
  check(momentum, "momentum", ScalarType::Float, {rows, heads, key_dim, value_dim}, q);
  check(out, "out", dtype, {rows, heads, value_dim}, q);
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  return {
      rows * heads, static_cast<int>(key_dim), static_cast<int>(value_dim), dtype == ScalarType::BFloat16,
      q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
      floats(alpha), eta.has_value() ? floats(*eta) : nullptr, floats(theta),
      static_cast<float*>(memory.mutable_data_ptr()), static_cast<float*>(momentum.mutable_data_ptr()),
      out.mutable_data_ptr()};
}

}  // namespace mnemos::memory_step
