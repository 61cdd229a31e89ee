"""ConSPO, and every other loss of this library, on a causal LM of transformers: its logits are never whole in memory.

    loss = conspo_loss_of(model, batch, rewards, groups)

The base model runs and its head does not: weight, bias, logit scale and softcap go to `linear_conspo_loss`. For any
other function that takes hidden states, `head_inputs` gives its arguments:

    logprobs = linear_token_logprobs(**head_inputs(model, batch))

A batch is what transformers' collators make, padded or packed. The first call compares the model's own logits of a few
tokens with those of `head_inputs`, and raises where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, overload

from torch import Tensor, nn

from conspo_kernels import ConSPOOutput, linear_conspo_loss

from .transformers_batch import RolloutTokens, check_rewards, from_unpadded, packed, rollout_tokens
from .transformers_check import check_head, check_packing, check_terms, checked_head, checked_packing
from .transformers_head import CausalLMHead, as_weight, causal_lm_head, last_hidden_states

__all__ = [
    "CausalLMHead",
    "HeadInputs",
    "InForward",
    "causal_lm_head",
    "check_head",
    "check_packing",
    "conspo_loss_of",
    "from_unpadded",
    "head_inputs",
    "last_hidden_states",
    "packed",
]


class HeadInputs(TypedDict):
    """Arguments that all linear functions share."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    response_mask: Tensor | None
    cu_seqlens: Tensor | None
    shift: bool


def head_inputs(model: nn.Module, batch: Mapping[str, Any]) -> HeadInputs:
    """What the linear functions need of a model and a batch: `linear_conspo_scores(**head_inputs(model, batch))`.

    Args:
        model: a causal LM of transformers, or one in PEFT's wrapper; not in DDP's or FSDP's, for which see `InForward`.
        batch: `input_ids` [B, T] and `attention_mask`, or packed [1, N] with `cu_seq_lens_q` [S + 1] or with
            `position_ids` [1, N] that begin anew; `labels` (those of transformers, not shifted: -100 where there is no
            response token) or `response_mask` (0 there), or both. Padding is never a response token, nor is a rollout's
            first token, which nothing predicts. All but these two goes to the model.

    Returns:
        hidden [B, T, H] with a graph where gradients are enabled, and the arguments that belong to it.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError, ValueError: as `causal_lm_head`, `check_head` and `check_packing`, of which the last two run once per
            model, and again where its head, hooks or config have changed; a router's loss would be dropped; or the
            batch lacks what is needed, by name.

    Cost: the base model's forward. For `position_ids` on a GPU one synchronisation; none with `cu_seq_lens_q`.
    """
    head = checked_head(model)
    tokens = rollout_tokens(batch)
    check_terms(model, tokens.inputs)
    if tokens.cu_seqlens is not None:
        checked_packing(model, tokens.inputs)
    return linear_inputs(as_weight(last_hidden_states(model, tokens.inputs), head.weight), head, tokens)


def linear_inputs(hidden: Tensor, head: CausalLMHead, tokens: RolloutTokens) -> HeadInputs:
    """The arguments, of their parts."""
    return HeadInputs(
        hidden=hidden,
        weight=head.weight,
        labels=tokens.labels,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        response_mask=tokens.response_mask,
        cu_seqlens=tokens.cu_seqlens,
        shift=True,
    )


@overload
def conspo_loss_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def conspo_loss_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> ConSPOOutput: ...
def conspo_loss_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    rewards: Tensor,
    groups: int | Tensor,
    *,
    return_metrics: bool = False,
    **options: Any,
) -> Tensor | ConSPOOutput:
    """The ConSPO loss of a batch of whole groups.

    Args:
        model, batch: as `head_inputs`.
        rewards: [S] float, int or bool, one per rollout; NaN = unscorable. May lie on the CPU.
        groups: the size of a group, or [S] integer prompt ids. May lie on the CPU.
        return_metrics: return a `ConSPOOutput`.
        options: of `linear_conspo_loss`: tau, margin, temperature, num_groups, parallel, workspace_mib ...; not those
            that the model and the batch decide.

    Returns:
        As `linear_conspo_loss`.

    Raises:
        ImportError, TypeError, ValueError: as `head_inputs` and `linear_conspo_loss`.

    Cost: the base model's forward, and what `linear_conspo_loss` says: two GEMMs where the head is frozen (LoRA), else
        three or four. No [.., V] tensor beyond the workspace.

    Source: arXiv:2605.12969, v3.
    """
    inputs = head_inputs(model, batch)
    check_rewards(batch, inputs["cu_seqlens"], rewards)
    return linear_conspo_loss(rewards=rewards, groups=groups, return_metrics=return_metrics, **inputs, **options)


class InForward(nn.Module):
    """A module whose forward is a call with the model: what DDP and FSDP wrap.

        wrapped = DistributedDataParallel(InForward(model))
        wrapped(conspo_loss_of, batch, rewards, groups, parallel=Parallel(data=group)).backward()

    Inside of the forward the parameters are whole, and the hooks of the wrapper see the loss as its output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(model, *args, **kwargs)."""
        return function(self.model, *args, **kwargs)
