// Token log-probabilities: rows spread over ATen's threads, each row in parts of fixed length.
//
// A row's parts are joined in their order, whichever thread had them, so that the number of threads is not seen in the
// result. Names: b sequences, t positions, row = b * T + t, v vocabulary.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../check.h"
#include "instruction_set.h"
#include "ops.h"

namespace conspo {
namespace {

constexpr int64_t PART = 32768;   // elements of a row that are one piece of work
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

Element element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return FLOAT;
    case at::kDouble: return DOUBLE;
    case at::kBFloat16: return BFLOAT16;
    case at::kHalf: return HALF;
    default: TORCH_INTERNAL_ASSERT(false, "logits must be fp16, bf16, fp32 or fp64, are ", dtype);
  }
}

at::ScalarType accumulated(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// The rows of [B, T, V], wherever they lie.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : base_(static_cast<char*>(tensor.data_ptr())), positions_(tensor.size(1)), vocab_size_(tensor.size(2)),
        bytes_(tensor.element_size()), stride_b_(tensor.stride(0) * bytes_), stride_t_(tensor.stride(1) * bytes_) {}

  char* operator[](int64_t row) const {
    return base_ + (row / positions_) * stride_b_ + (row % positions_) * stride_t_;
  }
  int64_t vocab_size() const { return vocab_size_; }
  int64_t parts() const { return (vocab_size_ + PART - 1) / PART; }
  void zero(int64_t row, int64_t begin, int64_t end) const {
    std::memset((*this)[row] + begin * bytes_, 0, (end - begin) * bytes_);
  }

 private:
  char* base_;
  int64_t positions_, vocab_size_, bytes_, stride_b_, stride_t_;
};

struct Extent {
  int64_t begin, end;
};

Extent extent(int64_t part, int64_t vocab_size) { return {part * PART, std::min((part + 1) * PART, vocab_size)}; }

// Two parts' statistics as one's; scale turns differences of u into those of exponents.
Statistics joined(Statistics a, Statistics b, double scale) {
  const double m = a.max >= b.max ? a.max : b.max;
  const auto moved = [&](const Statistics& part) {
    const double shift = part.max == m ? 0.0 : (part.max - m) * scale;
    const double factor = std::exp(shift);
    const double moment = factor == 0 ? 0.0 : factor * (part.moment + (part.sum == 0 ? 0.0 : shift * part.sum));
    return Statistics{m, part.sum == 0 ? 0.0 : factor * part.sum, moment};
  };
  const Statistics x = moved(a), y = moved(b);
  return {m, x.sum + y.sum, x.moment + y.moment};
}

void for_each(int64_t count, int64_t elements, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements)), body);
}

// What a row's results are computed from and written to.
template <typename T>
struct Forward {
  const RowKernels& kernels;
  Rows rows;
  Transform transform;
  const int64_t* labels;
  T *logprobs, *entropy, *row_max, *log_sum;

  Statistics part(int64_t row, int64_t index) const {
    Statistics found;
    const auto [begin, end] = extent(index, rows.vocab_size());
    kernels.statistics(rows[row], begin, end, transform, entropy != nullptr, &found);
    return found;
  }

  Statistics whole(int64_t row) const {
    Statistics found = part(row, 0);
    for (int64_t i = 1; i < rows.parts(); ++i) found = joined(found, part(row, i), transform.scale);
    return found;
  }

  bool ignored(int64_t row) const { return labels[row] == IGNORED; }

  void ignore(int64_t row) const {
    logprobs[row] = row_max[row] = log_sum[row] = 0;
    if (entropy) entropy[row] = 0;
  }

  void finish(int64_t row, const Statistics& found) const {
    const int64_t label = labels[row];
    double log_prob = std::numeric_limits<double>::quiet_NaN();
    const double log_sum_here = std::log(found.sum);
    if (0 <= label && label < rows.vocab_size()) {
      Statistics at_label;  // its max is u of one element, with the very rounding that the row's maximum has
      kernels.statistics(rows[row], label, label + 1, transform, false, &at_label);
      const double d = std::min(0.0, (at_label.max - found.max) * transform.scale);
      log_prob = std::isnan(at_label.sum) ? at_label.sum : d - log_sum_here;
      if (found.max == -std::numeric_limits<double>::infinity()) log_prob = std::numeric_limits<double>::quiet_NaN();
    }
    logprobs[row] = T(log_prob);
    row_max[row] = T(found.max);
    log_sum[row] = T(log_sum_here);
    if (entropy) entropy[row] = T(log_sum_here - found.moment / found.sum);
  }
};

template <typename T>
void run_forward(const Forward<T>& forward, int64_t num_rows) {
  const int64_t parts = forward.rows.parts();
  if (num_rows >= at::get_num_threads() || parts == 1) {
    for_each(num_rows, forward.rows.vocab_size(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        forward.ignored(row) ? forward.ignore(row) : forward.finish(row, forward.whole(row));
    });
    return;
  }
  std::vector<Statistics> found(num_rows * parts);
  for_each(num_rows * parts, PART, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!forward.ignored(i / parts)) found[i] = forward.part(i / parts, i % parts);
  });
  for (int64_t row = 0; row < num_rows; ++row) {
    if (forward.ignored(row)) {
      forward.ignore(row);
      continue;
    }
    Statistics whole = found[row * parts];
    for (int64_t i = 1; i < parts; ++i) whole = joined(whole, found[row * parts + i], forward.transform.scale);
    forward.finish(row, whole);
  }
}

using NarrowGradient = decltype(RowKernels::gradient_in_half);

// The kernel for a gradient narrower than the logits, or none. It takes whole rows: where a row's gradient lies over its
// logits, these have one reader.
NarrowGradient narrow_gradient(const RowKernels& kernels, const Tensor& grad_logits, const Tensor& logits) {
  if (grad_logits.scalar_type() == logits.scalar_type()) return nullptr;
  TORCH_INTERNAL_ASSERT(logits.scalar_type() == at::kFloat, "only of fp32 logits a gradient may be narrower");
  switch (grad_logits.scalar_type()) {
    case at::kBFloat16: return kernels.gradient_in_bfloat16;
    case at::kHalf: return kernels.gradient_in_half;
    default: TORCH_INTERNAL_ASSERT(false, "a gradient of fp32 logits may be fp32, bf16 or fp16");
  }
}

template <typename T>
struct Backward {
  const RowKernels& kernels;
  NarrowGradient narrow;
  Rows to, rows;
  Transform transform;
  const int64_t* labels;
  const T *row_max, *log_sum, *entropy, *grad_logprobs, *grad_entropy;

  void part(int64_t row, int64_t begin, int64_t end) const {
    const bool active = labels[row] != IGNORED;
    const T c = active ? grad_logprobs[row] : T(0), h = active && grad_entropy ? grad_entropy[row] : T(0);
    if (c == 0 && h == 0) {
      to.zero(row, begin, end);
      return;
    }
    const RowGradient given{row_max[row], log_sum[row], c, h, grad_entropy ? entropy[row] : T(0), labels[row]};
    narrow ? narrow(to[row], rows[row], end, transform, given)
           : kernels.gradient(to[row], rows[row], begin, end, transform, given);
  }
};

template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor ? tensor->data_ptr<T>() : nullptr;
}

}  // namespace

std::tuple<Tensor, OptionalTensor, Tensor, Tensor> token_logprob_forward(
    const Tensor& logits, const Tensor& labels, double inner, double scale, bool capped, bool with_entropy) {
  const int64_t num_rows = labels.numel();
  check_rows(logits, "logits", {labels.size(0), labels.size(1), logits.size(2)});
  check_contiguous(labels, "labels", at::kLong, num_rows);
  const auto options = logits.options().dtype(accumulated(logits.scalar_type()));
  const auto empty = [&] { return logits.new_empty(labels.sizes(), options); };
  Tensor logprobs = empty(), row_max = empty(), log_sum = empty();
  OptionalTensor entropy;
  if (with_entropy) entropy = empty();
  if (num_rows == 0) return {logprobs, entropy, row_max, log_sum};
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), "token_logprob_forward", [&] {
    run_forward<scalar_t>(
        {row_kernels(element_of(logits.scalar_type())), Rows(logits), {inner, scale, capped},
         labels.const_data_ptr<int64_t>(), logprobs.data_ptr<scalar_t>(), data<scalar_t>(entropy),
         row_max.data_ptr<scalar_t>(), log_sum.data_ptr<scalar_t>()},
        num_rows);
  });
  return {logprobs, entropy, row_max, log_sum};
}

void token_logprob_backward(
    const Tensor& grad_logits, const Tensor& logits, const Tensor& labels, const Tensor& row_max,
    const Tensor& log_sum, const OptionalTensor& entropy, const Tensor& grad_logprobs,
    const OptionalTensor& grad_entropy, double inner, double scale, bool capped) {
  const int64_t num_rows = labels.numel();
  const auto dtype = accumulated(logits.scalar_type());
  check_rows(logits, "logits", {labels.size(0), labels.size(1), logits.size(2)});
  check_rows(grad_logits, "grad_logits", logits.sizes());
  check_contiguous(labels, "labels", at::kLong, num_rows);
  check_contiguous(row_max, "row_max", dtype, num_rows);
  check_contiguous(log_sum, "log_sum", dtype, num_rows);
  check_contiguous(grad_logprobs, "grad_logprobs", dtype, num_rows);
  if (grad_entropy) {
    check_contiguous(*grad_entropy, "grad_entropy", dtype, num_rows);
    check_contiguous(entropy.value(), "entropy", dtype, num_rows);
  }
  if (num_rows == 0) return;
  AT_DISPATCH_FLOATING_TYPES(dtype, "token_logprob_backward", [&] {
    const RowKernels& kernels = row_kernels(element_of(logits.scalar_type()));
    const Backward<scalar_t> backward{
        kernels, narrow_gradient(kernels, grad_logits, logits), Rows(grad_logits), Rows(logits),
        {inner, scale, capped}, labels.const_data_ptr<int64_t>(), row_max.const_data_ptr<scalar_t>(),
        log_sum.const_data_ptr<scalar_t>(), data<scalar_t>(entropy), grad_logprobs.const_data_ptr<scalar_t>(),
        data<scalar_t>(grad_entropy)};
    const int64_t parts = backward.rows.parts(), vocab_size = backward.rows.vocab_size();
    if (backward.narrow) {
      for_each(num_rows, vocab_size, [&](int64_t begin, int64_t end) {
        for (int64_t row = end - 1; row >= begin; --row) backward.part(row, 0, vocab_size);
      });
      return;
    }
    for_each(num_rows * parts, std::min(PART, vocab_size), [&](int64_t begin, int64_t end) {
      // From the end: what forward read last is what the caches still hold.
      for (int64_t i = end - 1; i >= begin; --i) {
        const Extent at = extent(i % parts, vocab_size);
        backward.part(i / parts, at.begin, at.end);
      }
    });
  });
}

Tensor token_logprob_forward_backward(
    const Tensor& grad_logits, const Tensor& logits, const Tensor& labels, const Tensor& coefficients, double inner,
    double scale, bool capped) {
  const int64_t num_rows = labels.numel();
  const auto dtype = accumulated(logits.scalar_type());
  if (num_rows < at::get_num_threads()) {  // a row is shared between threads: its statistics come first
    const auto [logprobs, entropy, row_max, log_sum] =
        token_logprob_forward(logits, labels, inner, scale, capped, false);
    token_logprob_backward(
        grad_logits, logits, labels, row_max, log_sum, {}, coefficients, {}, inner, scale, capped);
    return logprobs;
  }
  check_rows(logits, "logits", {labels.size(0), labels.size(1), logits.size(2)});
  check_rows(grad_logits, "grad_logits", logits.sizes());
  check_contiguous(labels, "labels", at::kLong, num_rows);
  check_contiguous(coefficients, "coefficients", dtype, num_rows);
  const auto empty = [&] { return logits.new_empty(labels.sizes(), logits.options().dtype(dtype)); };
  Tensor logprobs = empty(), row_max = empty(), log_sum = empty();
  if (num_rows == 0) return logprobs;
  AT_DISPATCH_FLOATING_TYPES(dtype, "token_logprob_forward_backward", [&] {
    const RowKernels& kernels = row_kernels(element_of(logits.scalar_type()));
    const Transform transform{inner, scale, capped};
    const int64_t* tokens = labels.const_data_ptr<int64_t>();
    scalar_t *m = row_max.data_ptr<scalar_t>(), *ls = log_sum.data_ptr<scalar_t>();
    const Forward<scalar_t> forward{
        kernels, Rows(logits), transform, tokens, logprobs.data_ptr<scalar_t>(), nullptr, m, ls};
    const Backward<scalar_t> backward{
        kernels, narrow_gradient(kernels, grad_logits, logits), Rows(grad_logits), Rows(logits), transform, tokens, m,
        ls, nullptr,
        coefficients.const_data_ptr<scalar_t>(), nullptr};
    const int64_t vocab_size = forward.rows.vocab_size();
    for_each(num_rows, vocab_size, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        forward.ignored(row) ? forward.ignore(row) : forward.finish(row, forward.whole(row));
        backward.part(row, 0, vocab_size);  // a second look at what the caches still hold
      }
    });
  });
  return logprobs;
}

Tensor exp(const Tensor& x, bool negative) {
  check_contiguous(x, "x", x.scalar_type(), x.numel());
  const RowKernels& kernels = row_kernels(element_of(x.scalar_type()));
  TORCH_INTERNAL_ASSERT(kernels.exp != nullptr, "exp takes fp32 or fp64, got ", x.scalar_type());
  Tensor out = x.new_empty(x.sizes());
  kernels.exp(out.data_ptr(), x.data_ptr(), x.numel(), negative);
  return out;
}

}  // namespace conspo
