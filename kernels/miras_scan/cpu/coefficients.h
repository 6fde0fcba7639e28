// What the gates alone decide within a chunk. Notation: README.md. Only products and sums of gates: any may be zero.
#pragma once

#include "miras_scan/cpu/layout.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

struct alignas(64) Gates {
  float a[C], e[C], theta[C], keep[C];            // a = (1 - alpha) keep, e = eta keep; keep = 0 where a segment starts
  float beta[C], f[C], m[C];                      // weight of M and of S in M_t, of S in S_t
  float beta_before[C], f_before[C];              // the same in the memory that token t finds
  float memory_end[C], momentum_end[C];           // G and E of the last token: of update j in the state after the chunk
  float beta_end, f_end, m_end;
};

// Gates of n tokens from t0 on. From n on all are zero, which makes those tokens' rows of everything zero.
void load_gates(const Problem& p, const Item& item, int64_t t0, int n, Gates& g) {
  memset(&g, 0, sizeof(g));
  // In double precision: one rounding per chunk and not per token. Over many chunks those of 1 - alpha would add up.
  double beta = 1, f = 0, m = 1, retain[C];
  for (int t = 0; t < n; ++t) {
    const int64_t token = item.batch * p.sequence + t0 + t, at = token * p.heads + item.head;
    const double keep = p.resets != nullptr && p.resets[token] ? 0 : 1;
    g.keep[t] = (float)keep;
    retain[t] = (1 - (double)p.alpha[at]) * keep;
    g.a[t] = (float)retain[t];
    g.e[t] = p.eta[at] * g.keep[t];
    g.theta[t] = p.theta[at];
    g.beta_before[t] = (float)(keep * beta);
    g.f_before[t] = (float)(keep * f);
    beta *= retain[t];
    m *= g.e[t];
    f = retain[t] * f + m;
    g.beta[t] = (float)beta;
    g.m[t] = (float)m;
    g.f[t] = (float)f;
  }
  g.beta_end = (float)beta;
  g.f_end = (float)f;
  g.m_end = (float)m;
  double forget = 1, momentum = 1, both = 1;
  for (int j = n - 1; j >= 0; --j) {
    g.memory_end[j] = (float)(g.theta[j] * both);
    g.momentum_end[j] = (float)(g.theta[j] * momentum);
    forget *= retain[j];
    momentum *= g.e[j];
    both = forget + g.e[j] * both;
  }
}

// Rows of the transposed decay keep a vector of zeros before lane 0: the row of token -1.
constexpr int kDecayStride = C + 16;

// decay[j][16 + t] = G[t][j], zero for t < j. Along j: G[t][j] = theta_j y_j[t] with l_j = a_{j+1} l_{j+1},
// y_j = l_j + e_{j+1} y_{j+1}, both 1 at j = t.
void decay_transposed(const Gates& g, float* decay) {
  for (int t = 0; t < C; t += VL) {
    const ivec token = lanes(t);
    vec l = {}, y = {};
    for (int j = C - 1; j >= 0; --j) {
      const float a = j + 1 < C ? g.a[j + 1] : 0, e = j + 1 < C ? g.e[j + 1] : 0;
      const ivec here = token == j;
      l = l * a;
      l = here ? splat(1) : l;
      y = l + y * e;
      store(decay + j * kDecayStride + 16 + t, y * g.theta[j]);
    }
  }
  for (int j = 0; j < C; ++j)
    for (int t = 0; t < 16; t += VL) store(decay + j * kDecayStride + t, vec{});
}

// memory[t][j] = G[t][j] and momentum[t][j] = E[t][j], zero for j > t.
void decay_rows(const Gates& g, float* memory, float* momentum) {
  for (int j = 0; j < C; j += VL) {
    const ivec update = lanes(j);
    vec G = {}, E = {};
    for (int t = 0; t < C; ++t) {
      const ivec here = update == t;
      E = E * g.e[t];
      E = here ? splat(g.theta[t]) : E;
      G = G * g.a[t] + E;
      store(memory + t * C + j, G);
      store(momentum + t * C + j, E);
    }
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
