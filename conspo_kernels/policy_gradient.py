"""Any loss of token log-probabilities whose gradient by them is known: one coefficient per token.

    logprobs     = token_logprobs(...) or linear_token_logprobs(...)         without a graph, or last step's
    coefficients = torch.autograd.grad(loss_of(logprobs), logprobs)[0]       any loss: GRPO, DAPO, CISPO, DPO ...
    weighted_logprob_loss(..., coefficients).backward()                      the gradient of that loss

The loss depends on the parameters through the log-probabilities alone, so sum_t c_t logp_t with c = dloss/dlogp has its
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs.parallel import Parallel
from .inputs.tokens import TokenLayout
from .sources import HiddenSource, LogitSettings, LogitsSource
from .weighted import weighted_logprobs


def weighted_logprob_loss(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    inplace: bool = False,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """sum_t coefficients[t] * logp[t] over response tokens, with its gradient computed in this call.

    Args:
        coefficients: shaped like labels, floating point, aligned with what `token_logprobs` returns: dloss/dlogp of any
            loss of the log-probabilities. Constants. Those of ignored tokens are not looked at. May lie on the CPU.
        inplace: the gradient overwrites the logits, in this call: no [.., V] buffer is allocated. As `inplace_backward`
            of `token_logprobs`, whose every misuse raises here too.
        parallel: a `Parallel`: `vocab` splits the vocabulary. With `context` the value is the sum over its ranks, and
            gradients are multiplied as `grad_reduction` says.
        Others: as `token_logprobs`.

    Returns:
        0-d, fp32 (fp64 for fp64 logits). The value is that of the sum, not of the loss the coefficients come from; the
        gradient is that of both. It is there already: backward multiplies it by the scalar that comes in, which costs
        nothing where that is 1; a second one raises. In fp16 a loss scale belongs into the coefficients.

    Raises:
        TypeError, ValueError: as `token_logprobs`.

    Cost: one read and one write of the logits where the caches hold a row; tokens whose coefficient is zero are not
        written to (in a new buffer: zero-filled). With `parallel.vocab` the gradient is left to backward: one read
        more.

    Source: the chain rule.
    """
    settings = LogitSettings.from_arguments(temperature, logit_scale, softcap, parallel, implementation)
    source = LogitsSource.from_arguments(logits, settings, inplace=inplace)
    tokens = TokenLayout.from_arguments(source.predictions, labels, response_mask, cu_seqlens, shift, ignore_index)
    return weighted_logprobs(source, tokens, coefficients)


def linear_weighted_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    workspace_mib: float = 512,
    logits_dtype: torch.dtype | None = None,
    synchronize: bool = False,
    cu_seqlens: Tensor | None = None,
    response_mask: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    parallel: Parallel | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`weighted_logprob_loss` of logits = hidden @ weight.T + bias, which are never whole in memory.

    Args:
        hidden, weight, bias, workspace_mib, logits_dtype, synchronize: as `linear_token_logprobs`.
        Others: as `weighted_logprob_loss`.

    Returns, Raises: as `weighted_logprob_loss`.

    Cost: three GEMMs of 2 * N * H * V operations in this call, two where neither weight nor bias needs a gradient.
        Tokens whose coefficient is zero cost nothing on a CPU, and on a GPU where the coefficients lie on the CPU. With
        `parallel.vocab` as `linear_token_logprobs`: three or four GEMMs.

    Source: the chain rule.
    """
    settings = LogitSettings.from_arguments(temperature, logit_scale, softcap, parallel, implementation)
    source = HiddenSource.from_arguments(
        hidden, weight, bias, settings, workspace_mib=workspace_mib, logits_dtype=logits_dtype, synchronize=synchronize
    )
    tokens = TokenLayout.from_arguments(source.predictions, labels, response_mask, cu_seqlens, shift, ignore_index)
    return weighted_logprobs(source, tokens, coefficients)
