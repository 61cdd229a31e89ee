// The ops on CPU tensors, bare: no schema, no autograd. Shapes as in backends/contract.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace conspo {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t IGNORED = -1;  // the label of no response token, as in conspo_kernels/values.py

// logprobs, entropy (undefined unless asked for), row_max, log_sum: [B, T] each.
std::tuple<Tensor, OptionalTensor, Tensor, Tensor> token_logprob_forward(
    const Tensor& logits, const Tensor& labels, double inner, double scale, bool capped, bool with_entropy);

void token_logprob_backward(
    const Tensor& grad_logits, const Tensor& logits, const Tensor& labels, const Tensor& row_max,
    const Tensor& log_sum, const OptionalTensor& entropy, const Tensor& grad_logprobs,
    const OptionalTensor& grad_entropy, double inner, double scale, bool capped);

// logprobs, with the gradient for coefficients [B, T] known beforehand written on the way.
Tensor token_logprob_forward_backward(
    const Tensor& grad_logits, const Tensor& logits, const Tensor& labels, const Tensor& coefficients, double inner,
    double scale, bool capped);

// scores [S], counts [S] int32.
std::tuple<Tensor, Tensor> sequence_score_forward(
    const Tensor& logprobs, const Tensor& labels, const OptionalTensor& offsets);

Tensor sequence_score_backward(
    const Tensor& grad_scores, const Tensor& counts, const Tensor& labels, const OptionalTensor& offsets);

enum Reduction : int64_t { MEAN, SUM, NONE };

// loss ([] or, for NONE, one per slot), weights [S].
std::tuple<Tensor, Tensor> group_infonce_forward(
    const Tensor& scores, const Tensor& rewards, const Tensor& counts, const OptionalTensor& order,
    const OptionalTensor& offsets, int64_t group_size, double margin, std::optional<double> num_groups, double tau,
    double reward_threshold, int64_t reduction);

// The kernels' exponential; negative: the one for x <= 0.
Tensor exp(const Tensor& x, bool negative);

}  // namespace conspo
