// The schema of memory_step, registered once for every backend. Shapes and meaning: README.md in this folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) {
  m.def(
      "memory_step(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor? eta, Tensor theta, Tensor(a!) memory, "
      "Tensor(b!) momentum, Tensor(c!) out) -> ()");
}
