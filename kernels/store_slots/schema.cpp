// The schema of store_slots, registered once for every backend. Shapes and meaning: README.md in this folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) {
  m.def(
      "store_slots(Tensor k, Tensor v, Tensor weights, Tensor taken, Tensor goes_on, Tensor order, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor(c!) counts, Tensor(d!) ages, Tensor(e!) slot_weights, Tensor(f!) found_keys, "
      "Tensor(g!) found_values, Tensor(h!) found_counts, Tensor(i!) found_ages) -> ()");
}
