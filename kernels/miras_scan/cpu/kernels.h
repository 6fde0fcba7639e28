// The table of kernels of one instruction set: key dims and dtypes to the functions made for them.
#pragma once

#include "miras_scan/cpu/backward.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

int64_t forward_scratch(const Problem& p, int64_t columns) {
  Arena arena(nullptr);
  ForwardScratch(arena, (int)p.key_dim, (int)columns);
  return arena.used();
}

int64_t backward_scratch(const Problem& p, int64_t columns) {
  Arena arena(nullptr);
  BackwardScratch(arena, p, (int)p.key_dim, (int)columns);
  return arena.used();
}

template <int Dk>
void forward_of_dim(const Forward& p, const Item& item, float* scratch) {
  p.bfloat16 ? forward_item<Dk, Bfloat16>(p, item, scratch) : forward_item<Dk, float>(p, item, scratch);
}

void forward(const Forward& p, const Item& item, float* scratch) {
  p.key_dim == 32   ? forward_of_dim<32>(p, item, scratch)
  : p.key_dim == 64 ? forward_of_dim<64>(p, item, scratch)
                    : forward_of_dim<128>(p, item, scratch);
}

template <int Dk>
void backward_of_dim(const Backward& p, const Shared& out, const Item& item, float* scratch) {
  p.bfloat16 ? backward_item<Dk, Bfloat16>(p, out, item, scratch) : backward_item<Dk, float>(p, out, item, scratch);
}

void backward(const Backward& p, const Shared& out, const Item& item, float* scratch) {
  p.key_dim == 32   ? backward_of_dim<32>(p, out, item, scratch)
  : p.key_dim == 64 ? backward_of_dim<64>(p, out, item, scratch)
                    : backward_of_dim<128>(p, out, item, scratch);
}

Kernels kernels() { return {forward_scratch, backward_scratch, forward, backward}; }

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
