// The schemas of miras_scan, registered once for every backend. Shapes and meaning: README.md in this folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) {
  m.def(
      "miras_scan(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor eta, Tensor theta, Tensor memory, "
      "Tensor momentum, Tensor? resets, int interval, bool save) -> (Tensor y, Tensor memory_after, "
      "Tensor momentum_after, Tensor residuals, Tensor states)");
  m.def(
      "miras_scan_backward(Tensor grad_y, Tensor grad_memory, Tensor grad_momentum, Tensor q, Tensor k, Tensor v, "
      "Tensor alpha, Tensor eta, Tensor theta, Tensor? resets, Tensor residuals, Tensor states, int interval) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha, Tensor grad_eta, Tensor grad_theta, "
      "Tensor grad_memory0, Tensor grad_momentum0)");
  m.def("cpu_isa() -> str");
}
