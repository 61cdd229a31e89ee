// The row kernels for AVX2 and FMA.

#include "token_logprob.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define CONSPO_ISA avx2
#define CONSPO_KERNELS AVX2_KERNELS
#define CONSPO_VECTOR_BYTES 32
#define CONSPO_FUSED_MULTIPLY_ADD 1

#include "vector.h"
// after vector.h
#include "token_logprob_rows.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
