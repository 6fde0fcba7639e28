// What the gates decide in a chunk, by recurrences over its tokens without a division, and their gradients.
//
// With a = 1 - alpha, and both a and eta zero at a token that starts a segment (keep = 0):
//   E_t = eta_t E_{t-1} + theta_t e_t     weight of -k_j^T r_j in S_t, one row per token (e_t: the t-th unit row)
//   G_t = a_t G_{t-1} + E_t               and in M_t
//   beta_t = a_t beta_{t-1}               weight of M in M_t
//   m_t = eta_t m_{t-1}                   weight of S in S_t
//   f_t = a_t f_{t-1} + m_t               and in M_t
// "Before" is the row of t - 1 times keep_t: the memory that token t finds, empty where a segment starts.
#pragma once

#include "tiles.cuh"

namespace mnemos::miras_scan {

enum Gate { kRetain, kEta, kTheta, kKeep, kGates };
constexpr int kGateFloats = kGates * kChunk;

// By 64 threads. Tokens past the end neither decay into infinity nor change anything.
MNEMOS_DEVICE void load_gates(float* gates, const Gates& source, const Span& s, int row, int chunk) {
  const int t = threadIdx.x;
  if (t >= kChunk) return;
  const int token = chunk * kChunk + t;
  float retain = 1.0f, eta = 0.0f, theta = 0.0f, keep = 1.0f;
  if (token < s.tokens) {
    const int64_t at = token_row(s, row, token);
    if (source.resets != nullptr) {
      keep = source.resets[static_cast<int64_t>(row / s.heads) * s.tokens + token] ? 0.0f : 1.0f;
    }
    retain = (1.0f - source.alpha[at]) * keep;
    eta = source.eta[at] * keep;
    theta = source.theta[at];
  }
  gates[kRetain * kChunk + t] = retain;
  gates[kEta * kChunk + t] = eta;
  gates[kTheta * kChunk + t] = theta;
  gates[kKeep * kChunk + t] = keep;
}

// Columns of G and, where asked for, of E: thread j < 64 does column j. Zeros above the diagonal.
template <bool WithMomentum>
MNEMOS_DEVICE void update_columns(float* update, float* momentum_update, float* coefficients, const float* gates,
                                  int last) {
  const int j = threadIdx.x;
  if (j >= kChunk) return;
  float g = 0.0f, e = 0.0f;
  const float theta = gates[kTheta * kChunk + j];
#pragma unroll 8
  for (int t = 0; t < kChunk; ++t) {
    e = t == j ? theta : gates[kEta * kChunk + t] * e;
    g = gates[kRetain * kChunk + t] * g + e;
    update[t * kDown + j] = g;
    if constexpr (WithMomentum) momentum_update[t * kDown + j] = e;
    if (t == last) {
      coefficients[kUpdateMemory * kChunk + j] = g;
      coefficients[kUpdateMomentum * kChunk + j] = e;
    }
  }
}

// The weights of the states, by one thread.
MNEMOS_DEVICE void state_weights(float* coefficients, const float* gates, int last) {
  float beta = 1.0f, f = 0.0f, m = 1.0f;
#pragma unroll 8
  for (int t = 0; t < kChunk; ++t) {
    const float keep = gates[kKeep * kChunk + t];
    coefficients[kBetaBefore * kChunk + t] = keep * beta;
    coefficients[kMomentumInMemoryBefore * kChunk + t] = keep * f;
    m *= gates[kEta * kChunk + t];
    beta *= gates[kRetain * kChunk + t];
    f = gates[kRetain * kChunk + t] * f + m;
    coefficients[kBeta * kChunk + t] = beta;
    coefficients[kMomentumInMemory * kChunk + t] = f;
    coefficients[kMomentum * kChunk + t] = m;
    if (t == last) {
      coefficients[kEnd * kChunk + 0] = beta;
      coefficients[kEnd * kChunk + 1] = f;
      coefficients[kEnd * kChunk + 2] = m;
    }
    // The rest of the row, which is copied with it.
    if (t >= 3) coefficients[kEnd * kChunk + t] = 0.0f;
  }
}

// Backward, thread j < 64 on column j. ``update`` is G and ``momentum_update`` E; ``grad_update`` holds dG and gets each
// token's gradient of a from this column, momentum_update that of eta. The two ``end`` values are the gradients of
// G and E in the row of the last token. Returns the gradient of theta_j.
MNEMOS_DEVICE float update_columns_backward(const float* update, float* momentum_update, float* grad_update,
                                            const float* gates, int last, float grad_end, float grad_momentum_end) {
  const int j = threadIdx.x;
  float dg = 0.0f, de = 0.0f, grad_theta = 0.0f;
#pragma unroll 4
  for (int t = kChunk - 1; t >= 0; --t) {
    if (t == last) {
      dg += grad_end;
      de += grad_momentum_end;
    }
    // What is above the diagonal was never written.
    if (t >= j) dg += grad_update[t * kDown + j];
    de += dg;
    const float g = t > j ? update[(t - 1) * kDown + j] : 0.0f;
    const float e = t > j ? momentum_update[(t - 1) * kDown + j] : 0.0f;
    grad_update[t * kDown + j] = dg * g;
    momentum_update[t * kDown + j] = de * e;
    if (t == j) grad_theta = de;
    dg *= gates[kRetain * kChunk + t];
    de *= gates[kEta * kChunk + t];
  }
  return grad_theta;
}

// Gradients of beta, f and m turned into those of a and eta, by one thread. Given those of the weights and of the weights
// before, per token, and of the end.
MNEMOS_DEVICE void state_weights_backward(float* grad_retain, float* grad_eta, const float* grad_beta,
                                          const float* grad_f, const float* grad_beta_before,
                                          const float* grad_f_before, const float* grad_end, const float* coefficients,
                                          const float* gates, int last) {
  float db = 0.0f, df = 0.0f, dm = 0.0f;
#pragma unroll 4
  for (int t = kChunk - 1; t >= 0; --t) {
    db += grad_beta[t];
    df += grad_f[t];
    if (t + 1 < kChunk) {
      const float keep = gates[kKeep * kChunk + t + 1];
      db += keep * grad_beta_before[t + 1];
      df += keep * grad_f_before[t + 1];
    }
    if (t == last) {
      db += grad_end[0];
      df += grad_end[1];
      dm += grad_end[2];
    }
    dm += df;
    const float beta = t > 0 ? coefficients[kBeta * kChunk + t - 1] : 1.0f;
    const float f = t > 0 ? coefficients[kMomentumInMemory * kChunk + t - 1] : 0.0f;
    const float m = t > 0 ? coefficients[kMomentum * kChunk + t - 1] : 1.0f;
    grad_retain[t] = db * beta + df * f;
    grad_eta[t] = dm * m;
    db *= gates[kRetain * kChunk + t];
    df *= gates[kRetain * kChunk + t];
    dm *= gates[kEta * kChunk + t];
  }
}

}  // namespace mnemos::miras_scan
