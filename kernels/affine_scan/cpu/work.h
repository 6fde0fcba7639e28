// What a thread is given to do: the loops over tokens, for pieces of time and blocks of features.

#pragma once

#include "affine_scan/arguments.h"

#include <algorithm>

namespace mnemos::affine_scan {

struct Cut {
  int64_t pieces, piece;  // of time, and tokens in each
  int64_t blocks, width;  // of features, and features in each
};

struct Job {
  Sizes n;
  Cut cut;
  const void *a, *b, *grad_h = nullptr;
  const uint8_t* resets;  // [batch, tokens] or null
  void *h = nullptr, *grad_a = nullptr, *grad_b = nullptr;
  float* last;                   // [batch, features]: the state after the last token, or the gradient of the first
  float* save = nullptr;         // [batch, states, features] or null
  const float* states = nullptr; // the same, read
  const float* starts;           // [batch, pieces, features]: what enters each piece
  double* products = nullptr;    // [batch, pieces, features]: each piece's map is x -> product x + end
  float* ends = nullptr;

  // Whether a segment starts within the piece, so that nothing runs through it.
  bool severed(int64_t row, int64_t p) const {
    if (!resets) return false;
    const int64_t stop = std::min(n.tokens, (p + 1) * cut.piece);
    const uint8_t* from = resets + row * n.tokens;
    return std::any_of(from + p * cut.piece, from + stop, [](uint8_t r) { return r != 0; });
  }
};

// Work on the units [begin, end) of batch x pieces x blocks.
using Work = void (*)(const Job&, int64_t begin, int64_t end);

struct Kernels {
  Work maps, scan, reverse_maps, reverse_scan;
};

// For the dtypes at hand and the widest instructions that this processor has.
Kernels kernels(bool a_bfloat16, bool b_bfloat16);

}  // namespace mnemos::affine_scan
