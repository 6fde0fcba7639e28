// Schemas of slot_attention, registered once for every backend. Shapes and meaning: README.md.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) {
  m.def(
      "slot_attention(Tensor q, Tensor k, Tensor v, Tensor documents, Tensor slot_k, Tensor slot_v, Tensor counts,"
      " Tensor ages, Tensor? key_map, Tensor? value_map, Tensor? shift_query, Tensor shift, Tensor sink_k, Tensor sink_v,"
      " Tensor sinks_seen, Tensor turns, Tensor places, Tensor back, int window, int chunk, float scale)"
      " -> (Tensor out, Tensor slot_out, Tensor lse)");
  m.def(
      "slot_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor documents,"
      " Tensor slot_k, Tensor slot_v, Tensor counts, Tensor ages, Tensor? key_map, Tensor? value_map,"
      " Tensor? shift_query, Tensor shift, Tensor sink_k, Tensor sink_v, Tensor sinks_seen, Tensor turns, Tensor places,"
      " Tensor back, Tensor out, Tensor slot_out, Tensor lse, int window, int chunk, float scale) -> (Tensor grad_q,"
      " Tensor grad_k, Tensor grad_v, Tensor grad_key_map, Tensor grad_value_map, Tensor grad_shift_query,"
      " Tensor grad_shift, Tensor grad_sink_k, Tensor grad_sink_v)");
}
