"""What the cases of the gradient check give: from a public function, from the fp64 oracle, and from eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import conspo_kernels

from .. import ConSPOOutput, conspo_loss_from_scores, conspo_weights, reference, sequence_scores
from .cases import FROM_SCORES, GRADED, HIDDEN_SIZE, Case, Inputs

OWN_OPTIONS = {"inplace_backward", "inplace", "return_entropy", "workspace_mib"}  # the oracle does not have them


def head_of(inputs: Inputs, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of a linear function."""
    tokens, vocab_size = inputs.labels.numel() * HIDDEN_SIZE, inputs.vocab_size
    hidden, weight, bias = leaf.split([tokens, vocab_size * HIDDEN_SIZE, vocab_size])
    return hidden.view(*inputs.labels.shape, HIDDEN_SIZE), weight.view(vocab_size, HIDDEN_SIZE), bias


def logits_of(case: Case, inputs: Inputs, leaf: Tensor) -> Tensor:
    if case.linear:
        return torch.nn.functional.linear(*head_of(inputs, leaf))
    return leaf[:-1, :-1, :-3] if case.view else leaf


def call(case: Case, inputs: Inputs, leaf: Tensor, implementation: str) -> dict[str, Tensor]:
    """The outputs of the public function."""
    options = {**inputs.options, "implementation": implementation}
    labels, rewards, groups = inputs.labels, inputs.rewards, inputs.groups
    if case.op == "conspo_loss_from_scores":
        loss = conspo_loss_from_scores(leaf, rewards, groups, **options)
        assert isinstance(loss, Tensor)
        return {"loss": loss}
    if case.op == "conspo_weights":
        result = conspo_weights(leaf, rewards, groups, **options)
        return {"loss": result.loss, "weights": result.weights}
    if case.op == "sequence_scores":
        return {"scores": sequence_scores(leaf, labels, **options)}
    arguments: list[Any]
    if case.linear:
        hidden, weight, bias = head_of(inputs, leaf)
        arguments, options["bias"] = [hidden, weight, labels], bias
    else:
        arguments = [logits_of(case, inputs, leaf.clone()), labels]  # in-place gradients overwrite the clone
    function = getattr(conspo_kernels, case.op)
    if case.op.endswith("conspo_scores"):
        return {"scores": function(*arguments, **options)}
    if case.known:
        return {"loss": function(*arguments, inputs.known, **options)}
    if case.op.endswith("conspo_loss"):
        output = function(*arguments, rewards, groups, **options, return_metrics=True)
        assert isinstance(output, ConSPOOutput)
        assert output.logprobs is not None
        if case.linear:  # which computes neither scores nor log-probabilities of rollouts without gradient
            return {"loss": output.loss}
        return {"loss": output.loss, "scores": output.scores, "logprobs": output.logprobs}
    tokens = function(*arguments, **options)
    return {"logprobs": tokens} if isinstance(tokens, Tensor) else dict(zip(GRADED[case.op], tokens, strict=True))


def exact(case: Case, inputs: Inputs, leaf: Tensor) -> dict[str, Tensor]:
    """The same from the oracle, for a leaf in fp64."""
    if case.op in (*FROM_SCORES, "sequence_scores"):
        return eager(case, inputs, leaf)  # which takes the oracle's own parts, in the dtype of the leaf
    options = {k: v for k, v in inputs.options.items() if k not in OWN_OPTIONS}
    logits = logits_of(case, inputs, leaf)
    output = reference.reference_loss(logits, inputs.labels, inputs.rewards, inputs.groups, **options)
    outputs = output._asdict()
    return {**outputs, "loss": _known(case, outputs, inputs)} if case.known else outputs


def eager(case: Case, inputs: Inputs, leaf: Tensor) -> dict[str, Tensor]:
    """The same as plain PyTorch gives it: the log-softmax in the dtype of the logits, what follows in fp32."""
    options = inputs.options
    if case.op == "conspo_loss_from_scores":
        return {"loss": _loss(leaf, inputs)}
    if case.op == "conspo_weights":
        scores = leaf.detach().requires_grad_()
        loss = _loss(scores, inputs)
        return {"loss": loss, "weights": torch.autograd.grad(loss, scores)[0].nan_to_num(), "scores": scores}
    rollouts = inputs.rollouts()
    if case.op == "sequence_scores":
        return {"scores": _scores(leaf.flatten(), rollouts)}
    logits = logits_of(case, inputs, leaf)
    y = logits.reshape(-1, logits.shape[-1]) * options.get("logit_scale", 1.0)
    if (softcap := options.get("softcap")) is not None:
        y = torch.where(y == -torch.inf, y, softcap * torch.tanh(y / softcap))
    full = torch.log_softmax(y / options.get("temperature", 1.0), dim=-1)
    rows, labels = torch.tensor([token for tokens in rollouts for token in tokens], device=leaf.device).unbind(1)
    zeros = full.new_zeros(len(full))
    logprobs = zeros.index_put((rows,), full[rows, labels])
    possible = full[rows][:, 1 if case.masked else 0 :]
    entropy = zeros.index_put((rows,), -(possible.exp() * possible).sum(-1))
    scores = _scores(logprobs.float(), rollouts)
    shape = inputs.labels.shape
    outputs = {"logprobs": logprobs.view(shape), "entropy": entropy.view(shape), "scores": scores}
    if case.known:
        return {**outputs, "loss": _known(case, outputs, inputs)}
    return {**outputs, "loss": _loss(scores, inputs)} if case.op.endswith("conspo_loss") else outputs


def _scores(logprobs: Tensor, rollouts: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    scores = [reference.sequence_score([logprobs[row] for row, _ in tokens]) if tokens else None for tokens in rollouts]
    return torch.stack([logprobs.new_tensor(torch.nan) if score is None else score for score in scores])


def _known(case: Case, outputs: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """The sum of weighted scores or log-probabilities, without empty rollouts and ignored tokens."""
    values = outputs["logprobs" if case.op.endswith("logprob_loss") else "scores"]
    return (values.nan_to_num() * inputs.known.to(values)).sum()


def _loss(scores: Tensor, inputs: Inputs) -> Tensor:
    """The losses of the oracle's groups, reduced; a NaN score is that of an empty rollout."""
    options = inputs.options
    parts = reference.prompt_groups(inputs.groups, inputs.rewards, (~scores.isnan()).int().tolist(), 0.5)
    rows = list(scores.unbind())
    losses = reference.group_losses(rows, parts, options.get("tau", 10.0), options.get("margin", 0.0))
    if options.get("reduction") == "none":
        places = [g.members[0] for g in parts] if isinstance(inputs.groups, int) else range(len(rows))
        return torch.stack([losses.get(place, scores.new_zeros(())) for place in places])
    total = torch.stack(list(losses.values())).sum()
    return total if options.get("reduction") == "sum" else total / options.get("num_groups", len(losses))
