// Mean log-probability of each rollout's response tokens, summed one after another in fp64, and its gradient.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "../check.h"
#include "ops.h"

namespace conspo {
namespace {

constexpr int64_t GRAIN = 16384;  // tokens that are worth a thread

// Rollouts as ranges of the flattened tokens: rows of one length, or those between checked offsets.
class Rollouts {
 public:
  Rollouts(const Tensor& labels, const OptionalTensor& offsets)
      : offsets_(offsets ? offsets->const_data_ptr<int64_t>() : nullptr), length_(labels.size(1)),
        num_tokens_(labels.numel()), count_(offsets ? offsets->numel() - 1 : labels.size(0)) {
    if (offsets) check_contiguous(*offsets, "offsets", at::kLong, count_ + 1);
  }

  int64_t count() const { return count_; }
  int64_t begin(int64_t s) const { return at(s); }
  int64_t end(int64_t s) const { return at(s + 1); }
  int64_t grain() const { return std::max<int64_t>(1, GRAIN * count_ / std::max<int64_t>(1, num_tokens_)); }

 private:
  int64_t at(int64_t s) const {
    return offsets_ ? std::clamp<int64_t>(offsets_[s], 0, num_tokens_) : s * length_;
  }

  const int64_t* offsets_;
  int64_t length_, num_tokens_, count_;
};

}  // namespace

std::tuple<Tensor, Tensor> sequence_score_forward(
    const Tensor& logprobs, const Tensor& labels, const OptionalTensor& offsets) {
  check_contiguous(logprobs, "logprobs", logprobs.scalar_type(), labels.numel());
  check_contiguous(labels, "labels", at::kLong, labels.numel());
  const Rollouts rollouts(labels, offsets);
  Tensor scores = logprobs.new_empty({rollouts.count()});
  Tensor counts = logprobs.new_empty({rollouts.count()}, logprobs.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), "sequence_score_forward", [&] {
    const scalar_t* values = logprobs.const_data_ptr<scalar_t>();
    const int64_t* tokens = labels.const_data_ptr<int64_t>();
    scalar_t* score = scores.data_ptr<scalar_t>();
    int32_t* count = counts.data_ptr<int32_t>();
    at::parallel_for(0, rollouts.count(), rollouts.grain(), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        double sum = 0;
        int64_t n = 0;
        for (int64_t i = rollouts.begin(s); i < rollouts.end(s); ++i) {
          if (tokens[i] == IGNORED) continue;
          sum += double(values[i]);
          ++n;
        }
        score[s] = n ? scalar_t(sum / double(n)) : std::numeric_limits<scalar_t>::quiet_NaN();
        count[s] = int32_t(n);
      }
    });
  });
  return {scores, counts};
}

Tensor sequence_score_backward(
    const Tensor& grad_scores, const Tensor& counts, const Tensor& labels, const OptionalTensor& offsets) {
  check_contiguous(labels, "labels", at::kLong, labels.numel());
  const Rollouts rollouts(labels, offsets);
  check_contiguous(grad_scores, "grad_scores", grad_scores.scalar_type(), rollouts.count());
  check_contiguous(counts, "counts", at::kInt, rollouts.count());
  Tensor grad = grad_scores.new_zeros(labels.sizes());  // tokens outside of every rollout too
  AT_DISPATCH_FLOATING_TYPES(grad_scores.scalar_type(), "sequence_score_backward", [&] {
    const scalar_t* grad_score = grad_scores.const_data_ptr<scalar_t>();
    const int32_t* count = counts.const_data_ptr<int32_t>();
    const int64_t* tokens = labels.const_data_ptr<int64_t>();
    scalar_t* out = grad.data_ptr<scalar_t>();
    at::parallel_for(0, rollouts.count(), rollouts.grain(), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        if (count[s] <= 0) continue;
        const scalar_t per_token = grad_score[s] / scalar_t(count[s]);
        for (int64_t i = rollouts.begin(s); i < rollouts.end(s); ++i)
          if (tokens[i] != IGNORED) out[i] = per_token;
      }
    });
  });
  return grad;
}

}  // namespace conspo
