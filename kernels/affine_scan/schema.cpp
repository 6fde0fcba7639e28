// Schemas of affine_scan, registered once for every backend. Shapes and meaning: README.md.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) {
  m.def(
      "affine_scan(Tensor a, Tensor b, Tensor state, Tensor? resets, int interval, bool save)"
      " -> (Tensor h, Tensor after, Tensor states)");
  m.def(
      "affine_scan_backward(Tensor grad_h, Tensor grad_after, Tensor a, Tensor b, Tensor? resets, Tensor states,"
      " int interval) -> (Tensor grad_a, Tensor grad_b, Tensor grad_state)");
}
