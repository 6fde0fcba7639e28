// Sizes, the arguments that all kernels share, and copies of rows into shared memory.
#pragma once

#include "fragments.cuh"

namespace mnemos::miras_scan {

constexpr int kChunk = 64;   // tokens solved together
constexpr int kSlice = 16;   // columns of v that one block of a recurrence carries
constexpr int kSquare = kChunk * kChunk;

// Rows of a [64, 64] tile in shared memory. 68: reads down the columns meet no bank twice; 72: reads along the rows.
constexpr int kDown = kChunk + 4;
constexpr int kAlong = kChunk + 8;

// Of an input tile with ``columns`` columns: rows start 16 bytes apart in the banks, so ldmatrix meets no bank twice.
constexpr int input_stride(int columns) { return columns + 8; }

// The blocks of 16 x 16 on and below the diagonal of a [64, 64] matrix.
constexpr int kLowerBlocks = 10;
MNEMOS_DEVICE int lower_row(int block) { return (block >= 1) + (block >= 3) + (block >= 6); }
MNEMOS_DEVICE int lower_column(int block) { return block - lower_row(block) * (lower_row(block) + 1) / 2; }

// What a chunk's gates decide, [8, 64] floats (see coefficients.cuh).
enum Coefficient {
  kBeta,
  kMomentumInMemory,
  kBetaBefore,
  kMomentumInMemoryBefore,
  kUpdateMemory,
  kUpdateMomentum,
  kMomentum,
  kEnd,
  kCoefficients
};
constexpr int kCoefficientFloats = kCoefficients * kChunk;

// The sequence, and the part of it (a span of chunks) that a launch works on.
struct Span {
  int heads;
  int tokens;
  int value_dim;
  int first;   // chunk
  int chunks;  // in the span
};

struct Gates {
  const float* alpha;  // [batch, tokens, heads], as eta and theta
  const float* eta;
  const float* theta;
  const unsigned char* resets;  // [batch, tokens] or null
};

MNEMOS_DEVICE int64_t token_row(const Span& s, int row, int token) {
  return (static_cast<int64_t>(row / s.heads) * s.tokens + token) * s.heads + row % s.heads;
}
MNEMOS_DEVICE int chunk_rows(const Span& s, int chunk) {
  const int left = s.tokens - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}
// Of what is kept per chunk of the span.
MNEMOS_DEVICE int64_t chunk_slot(const Span& s, int row, int chunk) {
  return static_cast<int64_t>(row) * s.chunks + (chunk - s.first);
}

// Starts the copy of 64 rows of ``Columns`` elements, zeros from row ``rows`` and column ``columns`` on.
template <int Columns, int Threads, class T>
MNEMOS_DEVICE void copy_rows(T* tile, int tile_stride, const T* source, int64_t stride, int rows, int columns) {
  constexpr int each = 16 / sizeof(T), across = Columns / each;
  static_assert(Columns % each == 0);
  for (int i = forget(threadIdx.x); i < kChunk * across; i += Threads) {
    const int row = i / across, column = i % across * each;
    const bool valid = row < rows && column < columns;
    copy_async(tile + row * tile_stride + column, valid ? source + row * stride + column : source, valid);
  }
}

// Starts the copy of the blocks on and below the diagonal of a [64, 64] matrix.
template <int Threads>
MNEMOS_DEVICE void copy_lower_blocks(float* tile, int tile_stride, const float* source) {
  constexpr int across = 16 / 4, each = 16 * across;  // copies per row of a block, and per block
  for (int i = forget(threadIdx.x); i < kLowerBlocks * each; i += Threads) {
    const int block = i / each;
    const int row = 16 * lower_row(block) + i % each / across, column = 16 * lower_column(block) + i % across * 4;
    copy_async(tile + row * tile_stride + column, source + row * kChunk + column, true);
  }
}

template <int Count, int Threads>
MNEMOS_DEVICE void copy_floats(float* shared, const float* source) {
  static_assert(Count % 4 == 0);
  for (int i = threadIdx.x; i < Count / 4; i += Threads) copy_async(shared + 4 * i, source + 4 * i, true);
}

// Hands out shared memory from its start.
struct Arena {
  unsigned char* next;
  template <class T>
  MNEMOS_DEVICE T* take(int count) {
    T* result = reinterpret_cast<T*>(next);
    next += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return result;
  }
};
template <class T>
constexpr int arena_bytes(int count) {
  return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

}  // namespace mnemos::miras_scan
