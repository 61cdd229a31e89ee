// The row kernels for AVX-512.

#include "token_logprob.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define CONSPO_ISA avx512
#define CONSPO_KERNELS AVX512_KERNELS
#define CONSPO_VECTOR_BYTES 64
#define CONSPO_FUSED_MULTIPLY_ADD 1

#include "vector.h"
// after vector.h
#include "token_logprob_rows.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
