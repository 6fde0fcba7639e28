// The order of launches, the same on a device and in the emulator, and the buffers between them.
#pragma once

#include "adjoint.cuh"
#include "gradients.cuh"
#include "outputs.cuh"
#include "prepare.cuh"
#include "replay.cuh"
#include "states.cuh"

namespace mnemos::miras_scan {

struct Shape {
  int batch, tokens, heads, key_dim, value_dim;

  int rows() const { return batch * heads; }
  int chunks() const { return (tokens + kChunk - 1) / kChunk; }
  int64_t state() const { return static_cast<int64_t>(key_dim) * value_dim; }
};

template <class In>
struct ForwardCall {
  Shape shape;
  const In *q, *k, *v;
  Gates gates;
  const float *memory, *momentum;
  int interval;  // tokens between kept states, a multiple of 64
  bool save;
  In* y;
  float *memory_after, *momentum_after;
  float *residuals, *states;  // where save
};

template <class In>
struct BackwardCall {
  Shape shape;
  const In* grad_y;
  const float *grad_memory, *grad_momentum;
  const In *q, *k;
  Gates gates;
  const float *residuals, *states;
  int interval;
  In *grad_q, *grad_k, *grad_v;
  float *grad_alpha, *grad_eta, *grad_theta, *grad_memory_before, *grad_momentum_before;
};

// Chunks worked on together: as many as keep what lies between the kernels within ``workspace`` bytes, in multiples of
// ``multiple``. The result does not depend on it.
inline int span_chunks(const Shape& shape, int64_t floats_per_chunk, int multiple, int64_t workspace) {
  int64_t count = workspace / (4 * floats_per_chunk * shape.rows()) / multiple * multiple;
  if (count < multiple) count = multiple;
  return count < shape.chunks() ? static_cast<int>(count) : shape.chunks();
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// All kernels of a pass, before the first of them starts: a device runs the whole pass or none of it.
template <class In, int KeyDim>
void admit_forward() {
  admit("prepare", prepare_kernel<In, KeyDim, false>, Prepare<In, KeyDim, false>::kShared);
  admit("states", states_kernel<In, KeyDim>, States<In, KeyDim>::kShared);
  admit("outputs", outputs_kernel<In, KeyDim>, Outputs<In, KeyDim>::kShared);
}
template <class In, int KeyDim>
void admit_backward() {
  admit("prepare", prepare_kernel<In, KeyDim, true>, Prepare<In, KeyDim, true>::kShared);
  admit("replay", replay_kernel<In, KeyDim>, Replay<In, KeyDim>::kShared);
  admit("adjoint", adjoint_kernel<In, KeyDim>, Adjoint<In, KeyDim>::kShared);
  admit("gradients", gradients_kernel<In, KeyDim>, Gradients<In, KeyDim>::kShared);
}

// ``allocate(count)`` gives float32 memory that lives until the launches are done.
template <class In, int KeyDim, class Allocate>
void run_forward(const ForwardCall<In>& call, int64_t workspace, Allocate&& allocate, Stream stream) {
  admit_forward<In, KeyDim>();
  const Shape& shape = call.shape;
  const int rows = shape.rows(), every = call.interval / kChunk;
  const int64_t state = shape.state();
  // With a state kept for every chunk, the kept ones serve as the states before each chunk.
  const bool direct = call.save && every == 1;
  const int64_t own = 2 * kSquare + kCoefficientFloats + (call.save ? 0 : kChunk * static_cast<int64_t>(shape.value_dim));
  const int span = span_chunks(shape, own + (direct ? 0 : 2 * state), 1, workspace);

  float* inverse = allocate(static_cast<int64_t>(rows) * span * kSquare);
  float* pairs = allocate(static_cast<int64_t>(rows) * span * kSquare);
  float* coefficients = allocate(static_cast<int64_t>(rows) * span * kCoefficientFloats);
  float* starts = direct ? call.states : allocate(static_cast<int64_t>(rows) * span * 2 * state);
  float* residuals = call.save ? call.residuals : allocate(static_cast<int64_t>(rows) * span * kChunk * shape.value_dim);

  for (int first = 0; first < shape.chunks(); first += span) {
    const int count = shape.chunks() - first < span ? shape.chunks() - first : span;
    const Span part{shape.heads, shape.tokens, shape.value_dim, first, count};
    const int residual_tokens = call.save ? shape.tokens : span * kChunk;
    const int residual_first = call.save ? 0 : first * kChunk;
    const int start_chunks = direct ? shape.chunks() : count, start_first = direct ? 0 : first;

    using P = Prepare<In, KeyDim, false>;
    PrepareArguments<In> prepare{part, call.gates, call.q, call.k, nullptr, inverse, pairs, nullptr, coefficients};
    launch("prepare", prepare_kernel<In, KeyDim, false>, dim3(count, rows), P::kThreads, P::kShared, stream, prepare);

    using S = States<In, KeyDim>;
    StatesArguments<In> states{part,
                               call.k,
                               call.v,
                               inverse,
                               coefficients,
                               first == 0 ? call.memory : call.memory_after,
                               first == 0 ? call.momentum : call.momentum_after,
                               call.memory_after,
                               call.momentum_after,
                               starts,
                               start_chunks,
                               start_first,
                               call.save && !direct ? call.states : nullptr,
                               every,
                               ceil_div(shape.chunks(), every),
                               residuals,
                               residual_tokens,
                               residual_first};
    launch("states", states_kernel<In, KeyDim>, dim3(shape.value_dim / kSlice, rows), S::kThreads, S::kShared, stream,
           states);

    using O = Outputs<In, KeyDim>;
    OutputsArguments<In> outputs{part,         call.q,      pairs,     coefficients,    starts,
                                 start_chunks, start_first, residuals, residual_tokens, residual_first,
                                 call.y};
    launch("outputs", outputs_kernel<In, KeyDim>, dim3(count, ceil_div(shape.value_dim, O::kColumns), rows),
           O::kThreads, O::kShared, stream, outputs);
  }
}

template <class In, int KeyDim, class Allocate>
void run_backward(const BackwardCall<In>& call, int64_t workspace, Allocate&& allocate, Stream stream) {
  admit_backward<In, KeyDim>();
  const Shape& shape = call.shape;
  const int rows = shape.rows(), every = call.interval / kChunk;
  const int64_t state = shape.state();
  const bool direct = every == 1;
  const int64_t own = kSquare + kCoefficientFloats + kChunk * static_cast<int64_t>(shape.value_dim);
  const int span = span_chunks(shape, own + (direct ? 2 : 4) * state, every, workspace);

  float* inverse = allocate(static_cast<int64_t>(rows) * span * kSquare);
  float* update = allocate(static_cast<int64_t>(rows) * span * kChunk * shape.value_dim);
  float* coefficients = allocate(static_cast<int64_t>(rows) * span * kCoefficientFloats);
  float* after = allocate(static_cast<int64_t>(rows) * span * 2 * state);
  float* replayed = direct ? nullptr : allocate(static_cast<int64_t>(rows) * span * 2 * state);

  const int spans = ceil_div(shape.chunks(), span);
  for (int i = spans - 1; i >= 0; --i) {
    const int first = i * span;
    const int count = shape.chunks() - first < span ? shape.chunks() - first : span;
    const Span part{shape.heads, shape.tokens, shape.value_dim, first, count};
    const bool last = i == spans - 1;

    using P = Prepare<In, KeyDim, true>;
    PrepareArguments<In> prepare{part, call.gates, call.q, call.k, call.grad_y, inverse, nullptr, update, coefficients};
    launch("prepare", prepare_kernel<In, KeyDim, true>, dim3(count, rows), P::kThreads, P::kShared, stream, prepare);

    if (!direct) {
      using R = Replay<In, KeyDim>;
      ReplayArguments<In> replay{part,  call.k, coefficients, call.residuals, call.states,
                                 every, ceil_div(shape.chunks(), every), replayed};
      launch("replay", replay_kernel<In, KeyDim>, dim3(shape.value_dim / kSlice, ceil_div(count, every), rows),
             R::kThreads, R::kShared, stream, replay);
    }

    using J = Adjoint<In, KeyDim>;
    AdjointArguments<In> adjoint{part,
                                 call.q,
                                 call.k,
                                 call.grad_y,
                                 inverse,
                                 coefficients,
                                 last ? call.grad_memory : call.grad_memory_before,
                                 last ? call.grad_momentum : call.grad_momentum_before,
                                 call.grad_memory_before,
                                 call.grad_momentum_before,
                                 update,
                                 after};
    launch("adjoint", adjoint_kernel<In, KeyDim>, dim3(shape.value_dim / kSlice, rows), J::kThreads, J::kShared, stream,
           adjoint);

    using D = Gradients<In, KeyDim>;
    GradientsArguments<In> gradients{part,
                                     call.gates,
                                     call.q,
                                     call.k,
                                     call.grad_y,
                                     direct ? call.states : replayed,
                                     direct ? shape.chunks() : count,
                                     direct ? 0 : first,
                                     after,
                                     call.residuals,
                                     update,
                                     call.grad_q,
                                     call.grad_k,
                                     call.grad_v,
                                     call.grad_alpha,
                                     call.grad_eta,
                                     call.grad_theta};
    launch("gradients", gradients_kernel<In, KeyDim>, dim3(count, rows), D::kThreads, D::kShared, stream, gradients);
  }
}

template <class In, class Allocate>
void run_forward(const ForwardCall<In>& call, int64_t workspace, Allocate&& allocate, Stream stream) {
  switch (call.shape.key_dim) {
    case 32: return run_forward<In, 32>(call, workspace, allocate, stream);
    case 64: return run_forward<In, 64>(call, workspace, allocate, stream);
    default: return run_forward<In, 128>(call, workspace, allocate, stream);
  }
}
template <class In, class Allocate>
void run_backward(const BackwardCall<In>& call, int64_t workspace, Allocate&& allocate, Stream stream) {
  switch (call.shape.key_dim) {
    case 32: return run_backward<In, 32>(call, workspace, allocate, stream);
    case 64: return run_backward<In, 64>(call, workspace, allocate, stream);
    default: return run_backward<In, 128>(call, workspace, allocate, stream);
  }
}

}  // namespace mnemos::miras_scan
