// Every kernel on random numbers under the sanitizers: what is out of bounds or undefined ends the program.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "miras_scan/cuda/program.cuh"

extern "C" void emulated_forward(bool bf16, const int* shape, int interval, bool save, int64_t workspace, void** p);
extern "C" void emulated_backward(bool bf16, const int* shape, int interval, int64_t workspace, void** p);

namespace {

std::mt19937 generator(1);

struct Tensor {
  std::vector<unsigned char> bytes;
  bool bf16;

  Tensor(int64_t count, bool bf16, float low, float high) : bytes(static_cast<size_t>(count) * (bf16 ? 2 : 4)), bf16(bf16) {
    std::uniform_real_distribution<float> uniform(low, high);
    for (int64_t i = 0; i < count; ++i) {
      const float x = uniform(generator);
      const uint32_t word = mnemos::miras_scan::as_bits(x);
      const auto half = static_cast<uint16_t>(word >> 16);
      std::memcpy(bytes.data() + i * (bf16 ? 2 : 4), bf16 ? static_cast<const void*>(&half) : &word, bf16 ? 2 : 4);
    }
  }
  bool finite() const {
    for (size_t i = 0; i < bytes.size(); i += bf16 ? 2 : 4) {
      uint32_t word = 0;
      std::memcpy(reinterpret_cast<unsigned char*>(&word) + (bf16 ? 2 : 0), bytes.data() + i, bf16 ? 2 : 4);
      if (!std::isfinite(mnemos::miras_scan::as_float(word))) return false;
    }
    return true;
  }
  void* data() { return bytes.data(); }
};

bool run(bool bf16, int tokens, int key_dim, int value_dim, int interval, bool segmented) {
  const int shape[5] = {1, tokens, 2, key_dim, value_dim};
  const int64_t rows = 2 * tokens, state = 2 * key_dim * value_dim, states = (tokens + interval - 1) / interval * 2 * state;
  const float scale = 1.0f / std::sqrt(static_cast<float>(key_dim));
  Tensor q(rows * key_dim, bf16, -scale, scale), k(rows * key_dim, bf16, -scale, scale), v(rows * value_dim, bf16, -1, 1);
  Tensor alpha(rows, false, 0.0f, 0.1f), eta(rows, false, 0.0f, 0.9f), theta(rows, false, 0.0f, 0.1f);
  Tensor memory(state, false, -1, 1), momentum(state, false, -1, 1);
  std::vector<unsigned char> resets(static_cast<size_t>(tokens));
  for (int t = 1; t < tokens; ++t) resets[static_cast<size_t>(t)] = t % 37 == 0 || t == 64;
  void* starts = segmented ? resets.data() : nullptr;

  Tensor y = v, memory_after = memory, momentum_after = memory, residuals(rows * value_dim, false, 0, 1), kept(states, false, 0, 1);
  void* forward[] = {q.data(), k.data(), v.data(), alpha.data(), eta.data(), theta.data(), starts, memory.data(),
                     momentum.data(), y.data(), memory_after.data(), momentum_after.data(), residuals.data(), kept.data()};
  emulated_forward(bf16, shape, interval, true, 1, forward);

  Tensor dq = q, dk = k, dv = v, dalpha = alpha, deta = eta, dtheta = theta, dmemory = memory, dmomentum = momentum;
  void* backward[] = {v.data(), memory.data(), momentum.data(), q.data(), k.data(), alpha.data(), eta.data(),
                      theta.data(), starts, residuals.data(), kept.data(), dq.data(), dk.data(), dv.data(),
                      dalpha.data(), deta.data(), dtheta.data(), dmemory.data(), dmomentum.data()};
  emulated_backward(bf16, shape, interval, 1, backward);
  for (const Tensor* x : {&y, &memory_after, &momentum_after, &residuals, &kept, &dq, &dk, &dv, &dalpha, &deta, &dtheta,
                          &dmemory, &dmomentum}) {
    if (!x->finite()) return false;
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (bool bf16 : {false, true}) {
    good = run(bf16, 1, 32, 16, 64, false) && good;
    good = run(bf16, 65, 32, 96, 64, true) && good;
    good = run(bf16, 70, 64, 48, 64, true) && good;
    good = run(bf16, 130, 128, 80, 128, true) && good;
  }
  if (!good) std::puts("a result is not finite");
  return good ? 0 : 1;
}
