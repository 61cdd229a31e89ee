"""GRPO, DAPO and CISPO on the kernels of ConSPO: any loss of log-probabilities is one coefficient per token.

python examples/policy_gradient.py
"""

from collections.abc import Callable

import torch
from torch import Tensor

from conspo_kernels import linear_token_logprobs, linear_weighted_logprob_loss


def grpo(ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -((torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask).sum(1) / mask.sum(1)).mean()


def dapo(ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return -(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages) * mask).sum() / mask.sum()


def cispo(ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:  # the ratio is a weight without a gradient
    return -(ratio.clamp(max=1.3).detach() * ratio.log() * advantages * mask).sum() / mask.sum()


def step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor,
    old_logprobs: Tensor, advantages: Tensor,
) -> float:  # fmt: skip
    """The loss; its gradient is in hidden.grad and weight.grad. No logits, no graph over the vocabulary."""
    with torch.no_grad():
        logprobs = linear_token_logprobs(hidden, weight, labels, response_mask=mask)
    logprobs.requires_grad_()
    # Under the mask ours are 0 and an inference engine's are not: an exponential of those could overflow, and be NaN.
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()
    value = loss(ratio, advantages[:, None], mask.float())
    (coefficients,) = torch.autograd.grad(value, logprobs)
    linear_weighted_logprob_loss(hidden, weight, labels, coefficients, response_mask=mask).backward()
    return value.item()


if __name__ == "__main__":
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 32, 64, requires_grad=True), torch.randn(1000, 64).div(8).requires_grad_()
    labels, mask = torch.randint(1000, (8, 32)), torch.arange(32).expand(8, 32) < torch.randint(1, 32, (8, 1))
    with torch.no_grad():
        old_logprobs = linear_token_logprobs(hidden, weight, labels, response_mask=mask) + 0.2 * torch.randn(8, 32)
    for loss in (grpo, dapo, cispo):
        value = step(loss, hidden, weight, labels, mask, old_logprobs, advantages=torch.randn(8))
        print(f"{loss.__name__:6} loss {value:+.4f}")
