// Gradients of everything but the states, for every chunk by itself: one block per (row, chunk). With the states M, S
// before the chunk, dM, dS after it, and L from adjoint.cuh:
//
//   dV = -L
//   dA = -tril(dY R^T), dT = -stril(L R^T)                                          [64, 64]
//   dQ = beta dY M^T + f dY S^T + (dA o G) K
//   dK = beta^- L M^T + f^- L S^T - G_C R dM^T - E_C R dS^T + (dA o G)^T Q + (X + X^T) K,  X = dT o G^-
//   dG = dA o (Q K^T) + what row t + 1 gets from dT o (K K^T)
// and the gradients of the coefficients are sums over rows of these products, taken before they are weighted.
//
// A warp has 16 of the key dimensions, for 64 or 32 tokens, in what has key dimensions; and blocks of 16 x 16 on or below
// the diagonal in what is [64, 64].
#pragma once

#include "coefficients.cuh"
#include "key_tiles.cuh"

namespace mnemos::miras_scan {

template <class In>
struct GradientsArguments {
  Span span;
  Gates gates;
  const In* q;
  const In* k;
  const In* grad_y;
  const float* starts;     // M, S: [rows, start_chunks, 2, key dim, value_dim]
  int start_chunks;
  int start_first;         // chunk
  const float* after;      // dM, dS: [rows, chunks, 2, key dim, value_dim]
  const float* residuals;  // [rows, tokens, value_dim]
  const float* update;     // L: [rows, chunks, 64, value_dim]
  In* grad_q;
  In* grad_k;
  In* grad_v;
  float* grad_alpha;
  float* grad_eta;
  float* grad_theta;
};

template <class In, int KeyDim>
__global__ void __launch_bounds__(Gradients<In, KeyDim>::kThreads, Gradients<In, KeyDim>::kBlocksPerProcessor)
    gradients_kernel(const GradientsArguments<In> x) {
  using Sizes = Gradients<In, KeyDim>;
  using A = Arithmetic<In>;
  constexpr int kThreads = Sizes::kThreads, kWarps = Sizes::kWarps, kGroups = Sizes::kGroups;
  constexpr int kStride = Sizes::kStride;
  constexpr int kValues = Sizes::kValues, kInputStride = Sizes::kInputStride, kValueStride = Sizes::kValueStride;
  const Span& s = x.span;
  const int row = blockIdx.y, chunk = s.first + blockIdx.x;
  const int rows = chunk_rows(s, chunk), last = rows - 1;
  const int thread = threadIdx.x, warp = thread / 32;
  const int key_stride = s.heads * KeyDim, value_stride = s.heads * s.value_dim;
  const int state_size = KeyDim * s.value_dim;

  Arena arena{shared_memory()};
  float* update = arena.take<float>(kChunk * kDown);
  float* grad_update = arena.take<float>(kChunk * kDown);
  float* gates = arena.take<float>(kGateFloats);
  float* coefficients = arena.take<float>(kCoefficientFloats);
  float* sums = arena.take<float>(Sizes::kSums * kGroups * kChunk);
  float* token_grads = arena.take<float>(2 * kChunk);
  float* end_sums = arena.take<float>(3 * kWarps);
  // One after the other: tiles of 32 columns of v; a [64, 64] matrix; the columns of E.
  unsigned char* tiles = arena.next;
  In* grad_y = arena.take<In>(kChunk * kInputStride);
  float* solved = arena.take<float>(kChunk * kValueStride);
  float* residual = arena.take<float>(kChunk * kValueStride);
  uint32_t* square = reinterpret_cast<uint32_t*>(tiles);
  In* k = arena.take<In>(kChunk * kStride);
  In* q = arena.take<In>(kChunk * kStride);

  // Addresses are worked out where they are used: kept all along, they would take the registers of the products.
  const auto token = [&] { return token_row(s, forget(row), chunk * kChunk); };
  const auto grad_y_source = [&] { return x.grad_y + token() * s.value_dim; };
  const auto solved_source = [&] { return x.update + chunk_slot(s, forget(row), chunk) * kChunk * s.value_dim; };
  const auto residual_source = [&] {
    return x.residuals + (static_cast<int64_t>(forget(row)) * s.tokens + chunk * kChunk) * s.value_dim;
  };

  copy_rows<KeyDim, kThreads>(k, kStride, x.k + token() * KeyDim, key_stride, rows, KeyDim);
  copy_rows<KeyDim, kThreads>(q, kStride, x.q + token() * KeyDim, key_stride, rows, KeyDim);
  copy_commit();
  load_gates(gates, x.gates, s, row, chunk);
  __syncthreads();
  update_columns<false>(update, nullptr, coefficients, gates, last);
  // Read after the barriers of read_state.
  if (thread == kThreads - 1) state_weights(coefficients, gates, last);

  const auto starts = [&] {
    return x.starts + (static_cast<int64_t>(forget(row)) * x.start_chunks + chunk - x.start_first) * (2 * state_size);
  };
  const auto after = [&] { return x.after + chunk_slot(s, forget(row), chunk) * (2 * state_size); };
  constexpr int kSumSize = kGroups * kChunk;
  KeyTiles<In, KeyDim> product, grad;
  grad.clear();

  read_state<In, KeyDim>(product, tiles, grad_y_source(), value_stride, rows, starts(), s.value_dim);
  weigh<In, KeyDim>(grad, sums, product, q, coefficients + kBeta * kChunk, 1.0f);
  read_state<In, KeyDim>(product, tiles, grad_y_source(), value_stride, rows, starts() + state_size, s.value_dim);
  weigh<In, KeyDim>(grad, sums + kSumSize, product, q, coefficients + kMomentumInMemory * kChunk, 1.0f);

  // dA and dT, and dV on the way.
  constexpr int kBlocks = (kLowerBlocks + kWarps - 1) / kWarps;
  float grad_pairs[kBlocks][2][4], grad_lower[kBlocks][2][4];
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_pairs[u][n][e] = grad_lower[u][n][e] = 0.0f;
    }
  }
  for (int c = 0; c < s.value_dim; c += kValues) {
    const int columns = s.value_dim - c < kValues ? s.value_dim - c : kValues;
    copy_rows<kValues, kThreads>(grad_y, kInputStride, grad_y_source() + c, value_stride, rows, columns);
    copy_rows<kValues, kThreads>(solved, kValueStride, solved_source() + c, s.value_dim, kChunk, columns);
    copy_rows<kValues, kThreads>(residual, kValueStride, residual_source() + c, s.value_dim, rows, columns);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    for (int i = thread; i < kChunk * kValues / 4; i += kThreads) {
      const int t = i / (kValues / 4), column = i % (kValues / 4) * 4;
      if (t >= rows || column >= columns) continue;
      const float* from = solved + t * kValueStride + column;
      A::store4(x.grad_v + token() * s.value_dim + static_cast<int64_t>(t) * value_stride + c + column, -from[0], -from[1], -from[2], -from[3]);
    }
#pragma unroll
    for (int u = 0; u < kBlocks; ++u) {
      const int block = forget(warp) + u * kWarps;
      if (block >= kLowerBlocks) continue;
      const int top = 16 * lower_row(block), left = 16 * lower_column(block);
#pragma unroll 1
      for (int d = 0; d < columns; d += 16) {
        const auto from_y = A::left_rows(grad_y, kInputStride, top, d);
        const auto from_solved = A::against_value(left_from_rows(solved, kValueStride, top, d));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const RightWords right = right_from_rows(residual, kValueStride, left + 8 * n, d);
          multiply(grad_pairs[u][n], from_y, A::against_input(right));
          multiply(grad_lower[u][n], from_solved, A::against_value(right));
        }
      }
    }
    __syncthreads();
  }

  float shifted[kBlocks][2][4];
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const int block = forget(warp) + u * kWarps;
    if (block >= kLowerBlocks) continue;
    const int top = 16 * lower_row(block), left = 16 * lower_column(block);
    float keys[2][4] = {}, pairs[2][4] = {};
#pragma unroll 1
    for (int d = 0; d < KeyDim; d += 16) {
      typename A::InputRight right[2];
      A::right_rows(right, k, kStride, left, d);
      const auto from_k = A::left_rows(k, kStride, top, d);
      const auto from_q = A::left_rows(q, kStride, top, d);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply(keys[n], from_k, right[n]);
        multiply(pairs[n], from_q, right[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = top + lane_row() + 8 * (e >> 1), j = left + 8 * n + lane_column() + (e & 1);
        const float keep = gates[kKeep * kChunk + t];
        const float now = update[t * kDown + j], before = j < t ? keep * update[(t - 1) * kDown + j] : 0.0f;
        const float grad_pair = j <= t ? -grad_pairs[u][n][e] : 0.0f, grad_key = j < t ? -grad_lower[u][n][e] : 0.0f;
        grad_update[t * kDown + j] = grad_pair * pairs[n][e];
        square[t * kAlong + j] = A::word_for_input(grad_pair * now);
        grad_lower[u][n][e] = grad_key * before;
        shifted[u][n][e] = grad_key * keys[n][e] * keep;
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const int block = forget(warp) + u * kWarps;
    if (block >= kLowerBlocks) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = 16 * lower_row(block) + lane_row() + 8 * (e >> 1);
        const int j = 16 * lower_column(block) + 8 * n + lane_column() + (e & 1);
        if (j < t) grad_update[(t - 1) * kDown + j] += shifted[u][n][e];
      }
    }
  }

  add_square<Square::kLower>(grad, square, k);
  store_rows<In, KeyDim>(x.grad_q + token() * KeyDim, key_stride, grad, rows);
  grad.clear();
  add_square<Square::kLowerTransposed>(grad, square, q);
  __syncthreads();

  // X + X^T: X is strictly lower.
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const int block = forget(warp) + u * kWarps;
    if (block >= kLowerBlocks) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = 16 * lower_row(block) + lane_row() + 8 * (e >> 1);
        const int j = 16 * lower_column(block) + 8 * n + lane_column() + (e & 1);
        if (j > t) continue;
        const uint32_t word = A::word_for_input(grad_lower[u][n][e]);
        square[t * kAlong + j] = word;
        square[j * kAlong + t] = word;
      }
    }
  }
  __syncthreads();
  add_square<Square::kFull>(grad, square, k);
  __syncthreads();

  read_state<In, KeyDim>(product, tiles, solved_source(), s.value_dim, kChunk, starts(), s.value_dim);
  weigh<In, KeyDim>(grad, sums + 2 * kSumSize, product, k, coefficients + kBetaBefore * kChunk, 1.0f);
  read_state<In, KeyDim>(product, tiles, solved_source(), s.value_dim, kChunk, starts() + state_size, s.value_dim);
  weigh<In, KeyDim>(grad, sums + 3 * kSumSize, product, k, coefficients + kMomentumInMemoryBefore * kChunk, 1.0f);
  read_state<In, KeyDim>(product, tiles, residual_source(), s.value_dim, rows, after(), s.value_dim);
  weigh<In, KeyDim>(grad, sums + 4 * kSumSize, product, k, coefficients + kUpdateMemory * kChunk, -1.0f);
  read_state<In, KeyDim>(product, tiles, residual_source(), s.value_dim, rows, after() + state_size, s.value_dim);
  weigh<In, KeyDim>(grad, sums + 5 * kSumSize, product, k, coefficients + kUpdateMomentum * kChunk, -1.0f);
  store_rows<In, KeyDim>(x.grad_k + token() * KeyDim, key_stride, grad, rows);

  // <dM, M>, <dM, S>, <dS, S>: the gradients of what the end of the chunk makes of the states.
  float dots[3] = {0.0f, 0.0f, 0.0f};
  const float *memory = starts(), *momentum = memory + state_size;
  const float *after_memory = after(), *after_momentum = after_memory + state_size;
#pragma unroll 2
  for (int i = 4 * thread; i < state_size; i += 4 * kThreads) {
    const Words4 m = load_vector<Words4>(memory + i), dm = load_vector<Words4>(after_memory + i);
    const Words4 c = load_vector<Words4>(momentum + i), dc = load_vector<Words4>(after_momentum + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dots[0] += as_float(dm.x[e]) * as_float(m.x[e]);
      dots[1] += as_float(dm.x[e]) * as_float(c.x[e]);
      dots[2] += as_float(dc.x[e]) * as_float(c.x[e]);
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) dots[i] += shuffle_xor(dots[i], mask);
    if (lane_index() == 0) end_sums[i * kWarps + warp] = dots[i];
  }
  __syncthreads();

  // Over the first warp's part, as in states.cuh.
  for (int i = thread; i < Sizes::kSums * kChunk; i += kThreads) {
    float* p = sums + i / kChunk * kSumSize + i % kChunk;
    float sum = p[0];
#pragma unroll
    for (int w = 1; w < kGroups; ++w) sum += p[w * kChunk];
    p[0] = sum;
  }
  if (thread < 3) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += end_sums[thread * kWarps + w];
    end_sums[thread * kWarps] = sum;
  }
  float* momentum_update = reinterpret_cast<float*>(tiles);
  update_columns<true>(update, momentum_update, coefficients, gates, last);
  __syncthreads();
  if (thread < kChunk) {
    const float grad_theta = update_columns_backward(update, momentum_update, grad_update, gates, last,
                                                     sums[4 * kSumSize + thread], sums[5 * kSumSize + thread]);
    if (thread < rows) x.grad_theta[token() + static_cast<int64_t>(thread) * s.heads] = grad_theta;
  }
  if (thread == kThreads - 1) {
    const float end[3] = {end_sums[0], end_sums[kWarps], end_sums[2 * kWarps]};
    state_weights_backward(token_grads, token_grads + kChunk, sums, sums + kSumSize, sums + 2 * kSumSize,
                           sums + 3 * kSumSize, end, coefficients, gates, last);
  }
  __syncthreads();
  for (int t = warp; t < rows; t += kWarps) {
    const int j = lane_index();
    float retain = grad_update[t * kDown + j] + grad_update[t * kDown + j + 32];
    float eta = momentum_update[t * kDown + j] + momentum_update[t * kDown + j + 32];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      retain += shuffle_xor(retain, mask);
      eta += shuffle_xor(eta, mask);
    }
    if (j == 0) {
      const float keep = gates[kKeep * kChunk + t];
      x.grad_alpha[token() + static_cast<int64_t>(t) * s.heads] = -keep * (retain + token_grads[t]);
      x.grad_eta[token() + static_cast<int64_t>(t) * s.heads] = keep * (eta + token_grads[kChunk + t]);
    }
  }
}

}  // namespace mnemos::miras_scan
