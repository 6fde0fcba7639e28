// Products of small tiles on tensor cores.
//
// A product is done 16 deep. Of those 16 places along the summed dimension a lane holds four, its slots, in every operand: which
// ones is free, as long as both operands agree. Here slots 0 to 3 of lane l are the places 2 (l % 4) + {0, 1, 8, 9}, which is what
// the 16-deep bfloat16 instruction, ldmatrix and two neighbouring accumulator tiles all have. So an accumulator of 16 x 16 is,
// without any exchange, the left operand of the next product.
//
// How an operand is represented decides the rounding:
//   Exact    bfloat16 that was bfloat16 before: no rounding
//   Split    the sum of two bfloat16, 16 bits of mantissa; against Exact, two instructions
//   Rounded  tf32, 11 bits; against Rounded, two 8-deep instructions: the same cost
//   Double   the sum of two tf32, 22 bits; three times the cost of Rounded
#pragma once

#include "platform.cuh"

namespace mnemos::miras_scan {

struct bfloat16 {
  uint16_t bits;
};

MNEMOS_DEVICE float to_float(float x) { return x; }
MNEMOS_DEVICE float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Two neighbours, the first at an even place.
MNEMOS_DEVICE void load_pair(float (&x)[2], const float* p) {
  const Words2 pair = load_vector<Words2>(p);
  x[0] = as_float(pair.x[0]);
  x[1] = as_float(pair.x[1]);
}
MNEMOS_DEVICE void load_pair(float (&x)[2], const bfloat16* p) {
  const uint32_t pair = load_vector<uint32_t>(p);
  x[0] = as_float(pair << 16);
  x[1] = as_float(pair & 0xffff0000u);
}

MNEMOS_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
MNEMOS_DEVICE int lane_row() { return lane_index() >> 2; }     // of an accumulator tile; also row + 8
MNEMOS_DEVICE int lane_column() { return 2 * (lane_index() & 3); }  // of an accumulator tile; also column + 1

// An accumulator tile of 16 x 8: [0], [1] in lane_row(), [2], [3] eight rows below.
using Accumulator = float[4];

// Raw operands of 16 x 16 (left: rows lane_row() and + 8, four slots each) and of 16 x 8 (right: column lane_row()).
struct LeftWords {
  uint32_t w[8];
};
struct RightWords {
  uint32_t w[4];
};

struct ExactLeft {
  uint32_t r[4];
};
struct ExactRight {
  uint32_t r[2];
};
struct SplitLeft {
  ExactLeft high, low;
};
struct SplitRight {
  ExactRight high, low;
};
struct RoundedLeft {
  uint32_t r[8];
};
struct RoundedRight {
  uint32_t r[4];
};
struct DoubleLeft {
  RoundedLeft high, low;
};
struct DoubleRight {
  RoundedRight high, low;
};

MNEMOS_DEVICE void multiply(Accumulator& d, const ExactLeft& a, const ExactRight& b) { mma_bfloat16(d, a.r, b.r); }
MNEMOS_DEVICE void multiply(Accumulator& d, const SplitLeft& a, const ExactRight& b) {
  multiply(d, a.low, b);
  multiply(d, a.high, b);
}
MNEMOS_DEVICE void multiply(Accumulator& d, const ExactLeft& a, const SplitRight& b) {
  multiply(d, a, b.low);
  multiply(d, a, b.high);
}
MNEMOS_DEVICE void multiply(Accumulator& d, const RoundedLeft& a, const RoundedRight& b) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t left[4] = {a.r[i], a.r[4 + i], a.r[i + 1], a.r[5 + i]};
    const uint32_t right[2] = {b.r[i], b.r[i + 1]};
    mma_tf32(d, left, right);
  }
}
MNEMOS_DEVICE void multiply(Accumulator& d, const DoubleLeft& a, const DoubleRight& b) {
  multiply(d, a.low, b.high);
  multiply(d, a.high, b.low);
  multiply(d, a.high, b.high);
}

MNEMOS_DEVICE LeftWords left_words(const Accumulator& first, const Accumulator& second) {
  return {{as_bits(first[0]), as_bits(first[1]), as_bits(second[0]), as_bits(second[1]), as_bits(first[2]),
           as_bits(first[3]), as_bits(second[2]), as_bits(second[3])}};
}

// Operands from tiles of 4-byte words whose rows are ``stride`` words apart: the summed dimension along the rows ...
MNEMOS_DEVICE LeftWords left_from_rows(const void* tile, int stride, int row, int depth) {
  const uint32_t* p = static_cast<const uint32_t*>(tile) + (row + lane_row()) * stride + depth + lane_column();
  LeftWords result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Words2 pair = load_vector<Words2>(p + (i >> 1) * 8 * stride + (i & 1) * 8);
    result.w[2 * i] = pair.x[0];
    result.w[2 * i + 1] = pair.x[1];
  }
  return result;
}
MNEMOS_DEVICE RightWords right_from_rows(const void* tile, int64_t stride, int row, int depth) {
  const uint32_t* p = static_cast<const uint32_t*>(tile) + (row + lane_row()) * stride + depth + lane_column();
  RightWords result;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Words2 pair = load_vector<Words2>(p + i * 8);
    result.w[2 * i] = pair.x[0];
    result.w[2 * i + 1] = pair.x[1];
  }
  return result;
}
// ... or down the columns.
MNEMOS_DEVICE LeftWords left_from_columns(const void* tile, int stride, int depth, int column) {
  const uint32_t* p = static_cast<const uint32_t*>(tile) + (depth + lane_column()) * stride + column + lane_row();
  LeftWords result;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int slot = i & 3;
    result.w[i] = p[((slot & 1) + 8 * (slot >> 1)) * stride + 8 * (i >> 2)];
  }
  return result;
}
MNEMOS_DEVICE RightWords right_from_columns(const void* tile, int stride, int depth, int column) {
  const uint32_t* p = static_cast<const uint32_t*>(tile) + (depth + lane_column()) * stride + column + lane_row();
  RightWords result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.w[i] = p[((i & 1) + 8 * (i >> 1)) * stride];
  return result;
}

MNEMOS_DEVICE RoundedLeft round_words(const LeftWords& x) {
  RoundedLeft result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.r[i] = round_tf32(as_float(x.w[i]));
  return result;
}
MNEMOS_DEVICE RoundedRight round_words(const RightWords& x) {
  RoundedRight result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.r[i] = round_tf32(as_float(x.w[i]));
  return result;
}

template <class Result, class Words>
MNEMOS_DEVICE Result double_words(const Words& x) {
  Words rest;
  Result result;
  result.high = round_words(x);
#pragma unroll
  for (unsigned i = 0; i < sizeof(x.w) / 4; ++i) rest.w[i] = as_bits(as_float(x.w[i]) - as_float(result.high.r[i]));
  result.low = round_words(rest);
  return result;
}

// Two values as two pairs of bfloat16, high parts and what they leave.
MNEMOS_DEVICE void split_pair(uint32_t& high, uint32_t& low, uint32_t first, uint32_t second) {
  const float x = as_float(first), y = as_float(second);
  high = pack_bfloat16(x, y);
  low = pack_bfloat16(x - as_float(high << 16), y - as_float(high & 0xffff0000u));
}
MNEMOS_DEVICE SplitLeft split_words(const LeftWords& x) {
  SplitLeft result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = 4 * (i & 1) + 2 * (i >> 1);
    split_pair(result.high.r[i], result.low.r[i], x.w[from], x.w[from + 1]);
  }
  return result;
}
MNEMOS_DEVICE SplitRight split_words(const RightWords& x) {
  SplitRight result;
#pragma unroll
  for (int i = 0; i < 2; ++i) split_pair(result.high.r[i], result.low.r[i], x.w[2 * i], x.w[2 * i + 1]);
  return result;
}

// A tile that several warps read is rounded once, by its writer. A split value in one word: high part above low part.
MNEMOS_DEVICE uint32_t split_to_word(float x) {
  const float high = as_float(pack_bfloat16(0.0f, x) & 0xffff0000u);
  return pack_bfloat16(x - high, x);
}
MNEMOS_DEVICE SplitLeft split_from_words(const LeftWords& x) {
  SplitLeft result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = 4 * (i & 1) + 2 * (i >> 1);
    result.high.r[i] = permute_bytes(x.w[from], x.w[from + 1], 0x7632);
    result.low.r[i] = permute_bytes(x.w[from], x.w[from + 1], 0x5410);
  }
  return result;
}

// The arithmetic of a call. An ``input`` is q, k, v or the gradient of y; a ``value`` is anything computed, in float32.
template <class In>
struct Arithmetic;

template <>
struct Arithmetic<bfloat16> {
  // Values that meet inputs, from words in float32 or written by ``word_for_input``.
  static MNEMOS_DEVICE SplitLeft against_input(const LeftWords& x) { return split_words(x); }
  static MNEMOS_DEVICE SplitRight against_input(const RightWords& x) { return split_words(x); }
  static MNEMOS_DEVICE uint32_t word_for_input(float x) { return split_to_word(x); }
  static MNEMOS_DEVICE SplitLeft written_for_input(const LeftWords& x) { return split_from_words(x); }
  // Values that meet values.
  static MNEMOS_DEVICE RoundedLeft against_value(const LeftWords& x) { return round_words(x); }
  static MNEMOS_DEVICE RoundedRight against_value(const RightWords& x) { return round_words(x); }
  static MNEMOS_DEVICE uint32_t word_for_value(float x) { return round_tf32(x); }
  static MNEMOS_DEVICE RoundedLeft written_for_value(const LeftWords& x) {
    RoundedLeft result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.r[i] = x.w[i];
    return result;
  }
  static MNEMOS_DEVICE RoundedRight written_for_value(const RightWords& x) {
    return {{x.w[0], x.w[1], x.w[2], x.w[3]}};
  }

  using InputLeft = ExactLeft;
  using InputRight = ExactRight;

  // Inputs from shared memory, rows ``stride`` elements apart. The right operands come in pairs: columns 0-7 and 8-15.
  static MNEMOS_DEVICE ExactLeft left_rows(const bfloat16* tile, int stride, int row, int depth) {
    const int i = lane_index() >> 3, r = lane_index() & 7;
    ExactLeft result;
    load_matrices<false>(result.r, tile + (row + r + (i & 1) * 8) * stride + depth + (i >> 1) * 8);
    return result;
  }
  static MNEMOS_DEVICE void right_rows(ExactRight (&result)[2], const bfloat16* tile, int stride, int row, int depth) {
    const int i = lane_index() >> 3, r = lane_index() & 7;
    uint32_t x[4];
    load_matrices<false>(x, tile + (row + r + (i >> 1) * 8) * stride + depth + (i & 1) * 8);
    result[0] = {{x[0], x[1]}};
    result[1] = {{x[2], x[3]}};
  }
  static MNEMOS_DEVICE void right_columns(ExactRight (&result)[2], const bfloat16* tile, int stride, int depth,
                                          int column) {
    const int i = lane_index() >> 3, r = lane_index() & 7;
    uint32_t x[4];
    load_matrices<true>(x, tile + (depth + r + (i & 1) * 8) * stride + column + (i >> 1) * 8);
    result[0] = {{x[0], x[1]}};
    result[1] = {{x[2], x[3]}};
  }

  static MNEMOS_DEVICE void store2(bfloat16* p, float x, float y) { store_vector<uint32_t>(p, pack_bfloat16(x, y)); }
  static MNEMOS_DEVICE void store4(bfloat16* p, float x, float y, float z, float w) {
    store_vector<Words2>(p, Words2{{pack_bfloat16(x, y), pack_bfloat16(z, w)}});
  }
};

template <>
struct Arithmetic<float> {
  static MNEMOS_DEVICE DoubleLeft against_input(const LeftWords& x) { return double_words<DoubleLeft>(x); }
  static MNEMOS_DEVICE DoubleRight against_input(const RightWords& x) { return double_words<DoubleRight>(x); }
  static MNEMOS_DEVICE uint32_t word_for_input(float x) { return as_bits(x); }
  static MNEMOS_DEVICE DoubleLeft written_for_input(const LeftWords& x) { return double_words<DoubleLeft>(x); }
  static MNEMOS_DEVICE DoubleLeft against_value(const LeftWords& x) { return double_words<DoubleLeft>(x); }
  static MNEMOS_DEVICE DoubleRight against_value(const RightWords& x) { return double_words<DoubleRight>(x); }
  static MNEMOS_DEVICE uint32_t word_for_value(float x) { return as_bits(x); }
  static MNEMOS_DEVICE DoubleLeft written_for_value(const LeftWords& x) { return double_words<DoubleLeft>(x); }
  static MNEMOS_DEVICE DoubleRight written_for_value(const RightWords& x) { return double_words<DoubleRight>(x); }

  using InputLeft = DoubleLeft;
  using InputRight = DoubleRight;

  static MNEMOS_DEVICE DoubleLeft left_rows(const float* tile, int stride, int row, int depth) {
    return double_words<DoubleLeft>(left_from_rows(tile, stride, row, depth));
  }
  static MNEMOS_DEVICE void right_rows(DoubleRight (&result)[2], const float* tile, int stride, int row, int depth) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      result[i] = double_words<DoubleRight>(right_from_rows(tile, stride, row + 8 * i, depth));
    }
  }
  static MNEMOS_DEVICE void right_columns(DoubleRight (&result)[2], const float* tile, int stride, int depth,
                                          int column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      result[i] = double_words<DoubleRight>(right_from_columns(tile, stride, depth, column + 8 * i));
    }
  }

  static MNEMOS_DEVICE void store2(float* p, float x, float y) {
    store_vector<Words2>(p, Words2{{as_bits(x), as_bits(y)}});
  }
  static MNEMOS_DEVICE void store4(float* p, float x, float y, float z, float w) {
    store_vector<Words4>(p, Words4{{as_bits(x), as_bits(y), as_bits(z), as_bits(w)}});
  }
};

}  // namespace mnemos::miras_scan
