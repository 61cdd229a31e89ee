// Group InfoNCE on scores, loss and weights; the equations and the names are those of objective.py. In fp64 throughout:
// a batch is a few hundred rollouts.

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../check.h"
#include "ops.h"

namespace conspo {
namespace {

// Group k's rollouts: consecutive ones, or order[offsets[k]] to order[offsets[k + 1] - 1].
struct Groups {
  const int64_t *order, *offsets;
  int64_t size, group_count;

  int64_t begin(int64_t k) const { return offsets ? offsets[k] : k * size; }
  int64_t end(int64_t k) const { return offsets ? offsets[k + 1] : (k + 1) * size; }
  int64_t rollout(int64_t position) const { return order ? order[position] : position; }
};

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

double sigmoid(double x) {
  const double e = std::exp(-std::abs(x));
  return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

// Writes the weights of group k, not yet divided, and returns its loss; valid: whether it has one.
// sign: of a positive 1, of a negative -1, of an unscorable rollout 0.
template <typename T>
double group(
    const Groups& groups, int64_t k, const T* scores, double tau, double margin, const int8_t* sign, double* weights,
    bool& valid) {
  int64_t num_positive = 0, num_negative = 0;
  double peak = -INFINITY;
  const auto each = [&](const auto& visit) {
    for (int64_t i = groups.begin(k); i < groups.end(k); ++i) visit(groups.rollout(i));
  };
  each([&](int64_t s) {
    num_positive += sign[s] > 0;
    num_negative += sign[s] < 0;
    if (sign[s] < 0) peak = std::max(peak, double(scores[s]) / tau);
  });
  valid = num_positive > 0 && num_negative > 0;
  if (!valid) {
    each([&](int64_t s) { weights[s] = 0; });
    return 0;
  }
  if (peak == -INFINITY) peak = 0;
  double total = 0;
  each([&](int64_t s) {
    if (sign[s] < 0) total += weights[s] = std::exp(double(scores[s]) / tau - peak);
  });
  const double lse = peak + std::log(total);
  double sum_softplus = 0, pull = 0;
  each([&](int64_t s) {
    if (sign[s] <= 0) return;
    const double x = lse - (double(scores[s]) - margin) / tau;
    sum_softplus += softplus(x);
    const double q = sigmoid(x) / double(num_positive);
    weights[s] = -q;
    pull += q;
  });
  pull /= total > 0 || std::isnan(total) ? total : 1;
  each([&](int64_t s) {
    if (sign[s] < 0) weights[s] *= pull;
    if (sign[s] == 0) weights[s] = 0;
  });
  return tau * sum_softplus / double(num_positive);
}

}  // namespace

std::tuple<Tensor, Tensor> group_infonce_forward(
    const Tensor& scores, const Tensor& rewards, const Tensor& counts, const OptionalTensor& order,
    const OptionalTensor& offsets, int64_t group_size, double margin, std::optional<double> num_groups, double tau,
    double reward_threshold, int64_t reduction) {
  const int64_t num_rollouts = scores.numel();
  check_contiguous(scores, "scores", scores.scalar_type(), num_rollouts);
  check_contiguous(rewards, "rewards", rewards.scalar_type(), num_rollouts);
  check_contiguous(counts, "counts", at::kInt, num_rollouts);
  if (order) check_contiguous(*order, "order", at::kLong, num_rollouts);
  const int64_t group_count = offsets ? offsets->numel() - 1 : num_rollouts / group_size;
  if (offsets) check_contiguous(*offsets, "offsets", at::kLong, group_count + 1);

  Tensor losses = scores.new_zeros({group_count}), weights = scores.new_empty({num_rollouts});
  Tensor loss = scores.new_empty({});
  const Groups groups{
      order ? order->const_data_ptr<int64_t>() : nullptr, offsets ? offsets->const_data_ptr<int64_t>() : nullptr,
      group_size, group_count};
  // As PyTorch compares, in the dtype of the rewards.
  const Tensor above = rewards.gt(reward_threshold), unscorable = rewards.isnan();

  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "group_infonce_forward", [&] {
    const scalar_t* score = scores.const_data_ptr<scalar_t>();
    const bool *positive = above.const_data_ptr<bool>(), *nothing = unscorable.const_data_ptr<bool>();
    const int32_t* count = counts.const_data_ptr<int32_t>();
    std::vector<int8_t> sign(num_rollouts);
    for (int64_t s = 0; s < num_rollouts; ++s) {
      sign[s] = nothing[s] || count[s] <= 0 ? 0 : positive[s] ? 1 : -1;
    }

    std::vector<double> exact(num_rollouts);
    scalar_t* group_loss = losses.data_ptr<scalar_t>();
    int64_t num_valid = 0;
    double total = 0;
    for (int64_t k = 0; k < group_count; ++k) {
      bool valid = false;
      const double value = group(groups, k, score, tau, margin, sign.data(), exact.data(), valid);
      group_loss[k] = scalar_t(value);
      total += value;
      num_valid += valid;
    }
    const double denominator =
        reduction == MEAN ? num_groups.value_or(double(std::max<int64_t>(num_valid, 1))) : 1.0;
    scalar_t* weight = weights.data_ptr<scalar_t>();
    for (int64_t s = 0; s < num_rollouts; ++s) weight[s] = scalar_t(exact[s] / denominator);
    loss.fill_(total / denominator);
  });
  return {reduction == NONE ? losses : loss, weights};
}

}  // namespace conspo
