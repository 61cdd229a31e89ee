// What the row kernels of token log-probabilities take and give; plain numbers and pointers, as they are compiled once per
// instruction set, away from every common header.
//
// z logits, u = z or tanh(z * inner), y = u * scale: `LogitTransform` of conspo_kernels/values.py.

#pragma once

#include <cstdint>

namespace conspo {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct Transform {
  double inner, scale;
  bool capped;
};

// Of a part of a row: m = max u, sum of exp(y - m * scale), and moment, the sum of exp(y - m * scale) * (y - m * scale).
struct Statistics {
  double max, sum, moment;
};

// What the gradient of a row needs: dz = scale * du/dz * (c * (1[v = label] - p) - h * (p log p + p * entropy)).
struct RowGradient {
  double max, log_sum, c, h, entropy;
  int64_t label;
};

// One instruction set's kernels for one element type. Both take the part [begin, end) of a row.
struct RowKernels {
  void (*statistics)(const void* row, int64_t begin, int64_t end, const Transform&, bool entropy, Statistics*);
  void (*gradient)(void* to, const void* row, int64_t begin, int64_t end, const Transform&, const RowGradient&);
  // Of fp32 logits, in 16 bits; `to` may be the second half of the row's own bytes: what is overwritten has been read.
  void (*gradient_in_bfloat16)(void* to, const void* row, int64_t count, const Transform&, const RowGradient&);
  void (*gradient_in_half)(void* to, const void* row, int64_t count, const Transform&, const RowGradient&);
  void (*exp)(void* to, const void* from, int64_t count, bool negative);
};

enum Element { FLOAT, DOUBLE, BFLOAT16, HALF, ELEMENTS };

extern const RowKernels BASELINE_KERNELS[ELEMENTS];
#if defined(__x86_64__)
extern const RowKernels AVX2_KERNELS[ELEMENTS];
extern const RowKernels AVX512_KERNELS[ELEMENTS];
#endif

}  // namespace conspo
