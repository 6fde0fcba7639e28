// From gradients of the coefficients to gradients of the gates: the recurrences of coefficients.h in reverse.
#pragma once

#include "miras_scan/cpu/coefficients.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

// Products of a chunk, [C][C] with rows t and columns j <= t. Above the diagonal they hold anything finite.
struct Squares {
  float *keys, *queries;           // K K^T, Q K^T
  float *decay, *momentum;         // G, E
  float *solve, *read;             // T = (K K^T) o G^-, A = (Q K^T) o G
  float *grad_solve, *grad_read;   // dT = -lambda R^T, dA = -dO R^T
  float *grad_queries;             // dP = dA o G
  float *grad_queries_transposed;
  float *grad_keys;                // X + X^T with X = dT o G^-
};

// Gradients of the members of Gates that bear the same names.
struct alignas(64) GateGradients {
  float beta[C], f[C], beta_before[C], f_before[C], memory_end[C], momentum_end[C];
  float beta_end, f_end, m_end;
};

// What M' = beta_C M + f_C S + ... and S' = m_C S + ... give to the weights of the states.
void end_gradients(const Panels& state, const Panels& grad_state, int key_dim, GateGradients& d) {
  const int64_t half = (int64_t)key_dim;
  vec beta = {}, f = {}, m = {};
  for (int column = 0; column < state.columns;) {
    const int width = state.width(column);
    const float *M = state.at(0, column), *S = M + half * width;
    const float *dM = grad_state.at(0, column), *dS = dM + half * width;
    for (int64_t i = 0; i < half * width; i += VL) {
      const vec grad_memory = load(dM + i), momentum = load(S + i);
      beta += grad_memory * load(M + i);
      f += grad_memory * momentum;
      m += load(dS + i) * momentum;
    }
    column += width;
  }
  d.beta_end = sum(beta);
  d.f_end = sum(f);
  d.m_end = sum(m);
}

void gate_gradients(const Squares& q, const Gates& g, const GateGradients& d, int n, const Shared& out, int64_t at,
                    int64_t stride) {
  // Sums over j of rows, VL partial ones per token; a transposition adds them up for VL tokens at once.
  alignas(64) float by_memory[C * VL], by_momentum[C * VL], grad_theta[C], grad_a[C], grad_e[C], row[C];
  constexpr int L = C / VL;
  vec G[L], E[L];
  for (int i = 0; i < L; ++i) G[i] = E[i] = vec{};
  memset(by_memory, 0, sizeof(by_memory));
  memset(by_momentum, 0, sizeof(by_momentum));
  float beta = 0, f = 0, m = 0;
  for (int t = n - 1; t >= 0; --t) {
    const bool last = t == n - 1;
    const float a = last ? 0 : g.a[t + 1], e = last ? 0 : g.e[t + 1], keep = last ? 0 : g.keep[t + 1];
    const int here = t * C, next = last ? here : here + C;  // the next row counts keep = 0 times where there is none
    vec total_memory = {}, total_momentum = {};
    MNEMOS_UNROLL
    for (int i = 0; i < L; ++i) {
      const int j = i * VL;
      vec direct = load(q.grad_read + here + j) * load(q.queries + here + j) +
                   load(q.grad_solve + next + j) * load(q.keys + next + j) * keep;
      if (last) direct += load(d.memory_end + j);
      G[i] = direct + G[i] * a;
      E[i] = G[i] + E[i] * e;
      if (last) E[i] += load(d.momentum_end + j);
      store(row + j, E[i]);
      if (t > 0) {
        total_memory += G[i] * load(q.decay + here - C + j);
        total_momentum += E[i] * load(q.momentum + here - C + j);
      }
    }
    store(by_memory + t * VL, total_memory);
    store(by_momentum + t * VL, total_momentum);
    grad_theta[t] = row[t];

    beta = d.beta[t] + (last ? d.beta_end : keep * d.beta_before[t + 1] + a * beta);
    f = d.f[t] + (last ? d.f_end : keep * d.f_before[t + 1] + a * f);
    m = f + (last ? d.m_end : e * m);
    // Before the chunk's first token the weights are 1 of M in M, 0 of S in M, 1 of S in S.
    grad_a[t] = beta * (t > 0 ? g.beta[t - 1] : 1) + (t > 0 ? f * g.f[t - 1] : 0);
    grad_e[t] = m * (t > 0 ? g.m[t - 1] : 1);
  }
  for (int t = 0; t < n; t += VL) {
    for (const bool memory : {true, false}) {
      const float* partial = (memory ? by_memory : by_momentum) + t * VL;
      float* target = (memory ? grad_a : grad_e) + t;
      vec x[VL];
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) x[i] = load(partial + i * VL);
      transpose(x);
      vec total = load(target);
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) total += x[i];
      store(target, total);
    }
  }
  for (int t = 0; t < n; ++t) {
    out.grad_alpha[at + t * stride] = -g.keep[t] * grad_a[t];
    out.grad_eta[at + t * stride] = g.keep[t] * grad_e[t];
    out.grad_theta[at + t * stride] = grad_theta[t];
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
