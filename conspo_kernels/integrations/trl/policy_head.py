"""The loss head of `ConSPOTrainer` on this library's ops: what runs behind the base model, inside the model's forward.

TRL builds a model's inputs and labels, and calls it for log-probabilities. A `PolicyPass` takes the model's place in
that call: it has the base model run as the model would, and one of this library's linear functions instead of the head.

    pass over rollouts                   function                      GEMMs of the head
    scores and entropies, no graph       linear_token_logprobs         1
    a micro-batch, its weights known     linear_weighted_score_loss    3; 2 where the head is frozen (LoRA)
    a step of one micro-batch            linear_token_logprobs         4; 3 where all logits fit the workspace
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conspo_kernels import ConSPOOutput, linear_token_logprobs, linear_weighted_score_loss

from ..transformers import linear_inputs
from ..transformers_batch import rollout_tokens
from ..transformers_check import checked_head
from ..transformers_head import causal_lm_head, causal_lm_of, last_hidden_states


class TokenOutput(NamedTuple):
    """What TRL reads of the output of its own head: [B, T - 1], of the labels but the first one."""

    log_probs: Tensor
    entropy: Tensor | None


class PolicyHead:
    """What the passes of one trainer share.

    Args:
        model: the policy, before DDP or FSDP wraps it. Its forward gets one keyword argument more.
        temperature: of the sampler, which the logits are divided by.
        in_fp32: logits in fp32 of hidden states in 16 bits, outside of autocast: TRL's `cast_lm_head_to_fp32`.
    """

    def __init__(self, model: Any, temperature: float, in_fp32: bool) -> None:
        self.temperature, self.in_fp32 = temperature, in_fp32
        _add_keyword(causal_lm_of(model))

    def token_logprobs(self, model: Any) -> PolicyPass:
        """In place of a model: log-probabilities and entropies, with a graph where gradients are enabled."""

        def run(lm: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            with self._linear_inputs(lm, batch) as arguments:
                return linear_token_logprobs(return_entropy=True, **arguments)

        return PolicyPass(model, run, has_entropy=True)

    def weighted_scores(
        self, model: Any, weights: Tensor, scores: Tensor, mask: Tensor, loss_scale: float
    ) -> PolicyPass:
        """In place of a model: its `output` is then the sum of weights times scores, whose gradient is known.

        Args:
            weights: [B] dloss/dscores.
            scores: [B], of the first pass.
            mask: [B, C] of the completions, zero where a token takes no part.
            loss_scale: what the loss is multiplied by in backward. Gradients are rounded to 16 bits before that.
        """

        def run(lm: Any, batch: Mapping[str, Any]) -> ConSPOOutput:
            labels = batch["labels"]
            chosen = torch.nn.functional.pad(mask, (labels.shape[1] - mask.shape[1], 0))
            with self._linear_inputs(lm, {**batch, "response_mask": chosen}) as arguments:
                result = linear_weighted_score_loss(
                    weights=weights * loss_scale, scores=scores, return_metrics=True, **arguments
                )
            return result._replace(loss=result.loss / loss_scale)

        return PolicyPass(model, run, has_entropy=False)

    @contextlib.contextmanager
    def _linear_inputs(self, lm: Any, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments that the linear functions share, and around their call no autocast where logits are fp32."""
        head, tokens = causal_lm_head(lm), rollout_tokens(batch)
        hidden = last_hidden_states(lm, tokens.inputs)
        device = hidden.device.type
        with torch.autocast(device, enabled=False) if self.in_fp32 else contextlib.nullcontext():
            inputs = linear_inputs(hidden.float() if self.in_fp32 else hidden, head, tokens)
            yield {**inputs, "temperature": self.temperature}


class PolicyPass:
    """A model in the call by which TRL takes log-probabilities; afterwards `output` is what the pass has computed."""

    def __init__(self, model: Any, run: Callable[[Any, Mapping[str, Any]], Any], has_entropy: bool) -> None:
        self.model, self.run, self.has_entropy = model, run, has_entropy
        self.output: Any = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> TokenOutput:
        """As TRL's fused head: its arguments, its shapes."""
        assert fused_lm_head
        self.output = self.model(**inputs, conspo_pass=functools.partial(_with_labels, self.run, labels))
        if not self.has_entropy:
            return TokenOutput(self.output.logprobs[:, :-1], None)
        logprobs, entropy = self.output
        return TokenOutput(logprobs[:, :-1], entropy[:, :-1].detach())


def _with_labels(run: Callable[..., Any], labels: Tensor, lm: Any, inputs: dict[str, Any]) -> Any:
    batch = {name: value for name, value in inputs.items() if value is not None}  # PEFT passes what it was not given
    return run(lm, {**batch, "labels": labels})


def _add_keyword(lm: Any) -> None:
    """`lm(..., conspo_pass=run)` is run(lm, inputs), inside of what wraps the forward; without it nothing changes.

    As TRL adds its own head: to the one model, and with the signature that `generate` reads.
    """
    original = lm.forward

    @functools.wraps(type(lm).forward)
    def forward(self: Any, *inputs: Any, conspo_pass: Callable[..., Any] | None = None, **named: Any) -> Any:
        if conspo_pass is None:
            return original(*inputs, **named)
        assert not inputs
        return conspo_pass(self, named)

    lm.forward = types.MethodType(forward, lm)


def policy_head(model: Any, args: Any, accelerator: Any, temperature: float) -> PolicyHead | None:
    """The head that `args.loss_head` asks for; None: TRL's own.

    "auto" takes this library's where it fits the model, which `check_head` tries on a few tokens, and warns where not.

    Raises:
        ValueError: loss_head="conspo", and it does not fit; the message says why.
    """
    if args.loss_head == "trl":
        return None
    reason = _obstacle(model, args, accelerator)
    if reason is None:
        return PolicyHead(model, temperature, args.cast_lm_head_to_fp32)
    if args.loss_head == "conspo":
        raise ValueError(f'loss_head="conspo" does not fit: {reason}')
    warnings.warn(f"log-probabilities come from TRL's own loss head: {reason}", stacklevel=4)
    return None


def _obstacle(model: Any, args: Any, accelerator: Any) -> str | None:
    """Why this library's head cannot run for the model, the same on all ranks; None: it can."""
    reason = _of_the_set_up(args, accelerator) or _of_the_model(model, args, accelerator)
    if accelerator.num_processes == 1:
        return reason
    from accelerate.utils import gather_object

    return next((it for it in gather_object([reason]) if it is not None), None)


def _of_the_set_up(args: Any, accelerator: Any) -> str | None:
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        return "ZeRO-3 shards the weight of lm_head, which backward would not find whole"
    if deepspeed is not None and accelerator.mixed_precision == "fp16":
        return "DeepSpeed scales the loss in fp16, after the gradient of the head was rounded"
    if args.torch_compile:
        return "torch_compile=True compiles the model's own forward"
    return None


def _of_the_model(model: Any, args: Any, accelerator: Any) -> str | None:
    # TRL's fp32 head runs outside of autocast, and so it is compared.
    try:
        with contextlib.nullcontext() if args.cast_lm_head_to_fp32 else accelerator.autocast():
            checked_head(model)
    except Exception as error:  # whatever a model's own forward raises on a few tokens of text, too
        return f"{error}" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
    return None
