// The row kernels for SSE2 on x86-64, NEON on aarch64: what every CPU of its kind has.

#include "token_logprob.h"

#define CONSPO_ISA baseline
#define CONSPO_KERNELS BASELINE_KERNELS
#define CONSPO_VECTOR_BYTES 16
#if defined(__x86_64__)
#define CONSPO_FUSED_MULTIPLY_ADD 0
#else
#define CONSPO_FUSED_MULTIPLY_ADD 1
#endif

#include "vector.h"
// after vector.h
#include "token_logprob_rows.h"
