// Invariants of the callers in backends/native.py. Users' mistakes were found before: these say that ours is at fault.

#pragma once

// Tensors are made by methods of tensors: a header of <ATen/ops/...> costs 3 s of the compiler for each source.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace conspo {

inline void check_cpu(const at::Tensor& tensor, const char* name) {
  TORCH_INTERNAL_ASSERT(tensor.device().is_cpu(), name, " must be on the CPU, is on ", tensor.device());
}

inline void check_contiguous(const at::Tensor& tensor, const char* name, at::ScalarType dtype, int64_t count) {
  check_cpu(tensor, name);
  TORCH_INTERNAL_ASSERT(tensor.is_contiguous(), name, " must be contiguous, has strides ", tensor.strides());
  TORCH_INTERNAL_ASSERT(tensor.scalar_type() == dtype, name, " must be ", dtype, ", is ", tensor.scalar_type());
  TORCH_INTERNAL_ASSERT(tensor.numel() == count, name, " must have ", count, " elements, has ", tensor.numel());
}

// [B, T, V] with a last stride of 1.
inline void check_rows(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  check_cpu(tensor, name);
  TORCH_INTERNAL_ASSERT(tensor.sizes() == sizes, name, " must be ", sizes, ", is ", tensor.sizes());
  TORCH_INTERNAL_ASSERT(
      tensor.dim() == 3 && (tensor.size(2) == 1 || tensor.stride(2) == 1 || tensor.numel() == 0),
      name, " must be [B, T, V] with a last stride of 1, has strides ", tensor.strides());
}

}  // namespace conspo
