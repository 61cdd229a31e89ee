"""Every public function, called with anything: it raises our error that names an argument, or returns what is right.

Right is the fp64 oracle on the same arguments, within a few roundings of the accumulator relative to the largest number
that took part. The default profile is quick; `pytest tests/inputs/test_fuzz.py
--hypothesis-profile=long` looks further.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import arguments as drawn
import pytest
import torch
from arguments import Arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import max_error
from torch import Tensor

import conspo_kernels
from conspo_kernels import (
    ConSPOLoss,
    ConSPOOutput,
    CosineMargin,
    conspo_loss,
    conspo_loss_from_scores,
    conspo_scores,
    linear_conspo_loss,
    linear_token_logprobs,
    linear_weighted_score_loss,
    reference,
    sequence_scores,
    token_logprobs,
    weighted_score_loss,
)

PACKAGE = Path(conspo_kernels.__file__).parent
SOURCES_OF_ERRORS = ("inputs/", "values.py", "margin.py", "modules.py", "sources.py", "ops/", "backends/registry.py")
ROUNDINGS = 64
HEAD = ("hidden", "weight", "bias")
Exact = dict[str, Tensor]


OF_A_CALL = ("cu_seqlens", "response_mask", "return_metrics")  # what the module form takes with a batch


def module_form(logits: Any, labels: Any, rewards: Any, groups: Any, **arguments: Any) -> Any:
    at_the_call = {name: arguments.pop(name) for name in OF_A_CALL if name in arguments}
    return ConSPOLoss(**arguments)(logits, labels, rewards, groups, **at_the_call)


def margin_at(step: Any, **schedule: Any) -> Any:
    return CosineMargin(**schedule)(step)


# The oracle of each public function: fp64 results by name, of arguments that hold copies in fp64.


def exact_loss(a: Arguments) -> Exact:
    settings = {k: v for k, v in a.items() if k not in ("implementation", "inplace_backward", "return_metrics")}
    output = reference.reference_loss(**settings)
    return {"loss": output.loss, "scores": output.scores, "logprobs": output.logprobs, "entropy": output.entropy}


def exact_tokens(a: Arguments) -> Exact:
    settings = {k: v for k, v in a.items() if k not in ("implementation", "inplace_backward", "return_entropy")}
    if settings.get("cu_seqlens") is None and a["labels"].dim() == 1:
        settings["cu_seqlens"] = torch.tensor([0, a["labels"].numel()])
    offsets = settings.get("cu_seqlens")
    num_rollouts = len(a["labels"]) if offsets is None else len(offsets) - 1
    return exact_loss({**settings, "rewards": torch.zeros(num_rollouts), "groups": 1})


def exact_weighted(a: Arguments) -> Exact:
    output = exact_tokens({k: v for k, v in a.items() if k not in ("weights", "inplace")})
    rollouts = reference.response_tokens(
        a["labels"], a.get("response_mask"), a.get("cu_seqlens"), a.get("shift", False), a.get("ignore_index", -100)
    )
    weights = a["weights"].double().unbind()
    terms = [w * s for w, s, tokens in zip(weights, output["scores"], rollouts, strict=True) if w != 0 and tokens]
    return {"loss": sum(terms, output["scores"][:0].sum()), "scores": output["scores"]}


def with_logits(oracle: Callable[[Arguments], Exact]) -> Callable[[Arguments], Exact]:
    """The oracle of a linear function."""

    def exact(a: Arguments) -> Exact:
        head = [None if a.get(name) is None else a[name].double() for name in HEAD]
        others = {k: v for k, v in a.items() if k not in (*HEAD, "workspace_mib")}
        return oracle({**others, "logits": torch.nn.functional.linear(*head)})

    return exact


def exact_sequence_scores(a: Arguments) -> Exact:
    rollouts = reference.response_tokens(
        a["labels"], a.get("response_mask"), a.get("cu_seqlens"), a.get("shift", False), a.get("ignore_index", -100)
    )
    flat = a["logprobs"].flatten()
    empty = flat[:0].sum() + torch.nan
    scores = [reference.sequence_score([flat[t] for t, _ in tokens]) if tokens else empty for tokens in rollouts]
    return {"scores": reference.stacked(scores, flat[:0])}


def exact_loss_from_scores(a: Arguments) -> Exact:
    scores, reduction, num_groups = a["scores"], a.get("reduction", "mean"), a.get("num_groups")
    counts = (~scores.isnan()).int().tolist()
    groups = reference.prompt_groups(a["groups"], a["rewards"], counts, a.get("reward_threshold", 0.5))
    losses = reference.group_losses(scores.unbind(), groups, a.get("tau", 10.0), float(a.get("margin", 0.0)))
    zero = scores[:0].sum()
    if reduction == "none":
        places = [g.members[0] for g in groups] if isinstance(a["groups"], int) else range(len(scores))
        return {"loss": reference.stacked([losses.get(place, zero) for place in places], scores[:0]), "scores": scores}
    denominator = 1.0 if reduction == "sum" else float(max(len(losses), 1) if num_groups is None else num_groups)
    return {"loss": sum(losses.values(), zero) / denominator, "scores": scores}


class PublicFunction(NamedTuple):
    call: Callable[..., Any]
    parameters: Callable[..., Any]  # whose signature names the arguments
    right: st.SearchStrategy[Arguments]
    oracle: Callable[[Arguments], Exact]
    main: str  # the argument with a gradient, whose dtype decides on that of the results
    result: str  # what it returns, by its oracle's name


FUNCTIONS = {
    "conspo_loss": PublicFunction(conspo_loss, conspo_loss, drawn.loss_arguments(), exact_loss, "logits", "loss"),
    "ConSPOLoss": PublicFunction(module_form, conspo_loss, drawn.loss_arguments(), exact_loss, "logits", "loss"),
    "conspo_scores": PublicFunction(
        conspo_scores, conspo_scores, drawn.phase_one_arguments(), exact_tokens, "logits", "scores"
    ),
    "token_logprobs": PublicFunction(
        token_logprobs, token_logprobs, drawn.logprob_arguments(), exact_tokens, "logits", "logprobs"
    ),
    "sequence_scores": PublicFunction(
        sequence_scores, sequence_scores, drawn.sequence_arguments(), exact_sequence_scores, "logprobs", "scores"
    ),
    "conspo_loss_from_scores": PublicFunction(
        conspo_loss_from_scores,
        conspo_loss_from_scores,
        drawn.score_arguments(),
        exact_loss_from_scores,
        "scores",
        "loss",
    ),
    "weighted_score_loss": PublicFunction(
        weighted_score_loss, weighted_score_loss, drawn.phase_two_arguments(), exact_weighted, "logits", "loss"
    ),
    "linear_token_logprobs": PublicFunction(
        linear_token_logprobs, linear_token_logprobs, drawn.linear_logprob_arguments(), with_logits(exact_tokens),
        "hidden", "logprobs",
    ),
    "linear_conspo_loss": PublicFunction(
        linear_conspo_loss, linear_conspo_loss, drawn.linear_loss_arguments(), with_logits(exact_loss), "hidden", "loss"
    ),
    "linear_weighted_score_loss": PublicFunction(
        linear_weighted_score_loss, linear_weighted_score_loss, drawn.linear_phase_two_arguments(),
        with_logits(exact_weighted), "hidden", "loss",
    ),
}  # fmt: skip


def results(function: PublicFunction, returned: Any) -> dict[str, Tensor]:
    """What a public function returned, by the names of its oracle."""
    if isinstance(returned, ConSPOOutput) and function.main == "hidden":  # which leaves out what has no gradient
        return {"loss": returned.loss}
    if isinstance(returned, ConSPOOutput):
        named = {"loss": returned.loss, "scores": returned.scores, "logprobs": returned.logprobs}
        return {name: value for name, value in named.items() if value is not None}
    if isinstance(returned, tuple):
        return {"logprobs": returned[0], "entropy": returned[1]}
    return {function.result: returned}


def assert_error_of_ours(error: Exception, parameters: list[str]) -> None:
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    where = source.relative_to(PACKAGE).as_posix() if source.is_relative_to(PACKAGE) else source.as_posix()
    if not where.startswith(SOURCES_OF_ERRORS) or not any(re.search(rf"\b{p}\b", str(error)) for p in parameters):
        raise AssertionError(f"{where} raised an error that is none of ours, or names no argument") from error


def largest_number(a: Arguments, main: Tensor) -> float:
    """The largest finite number that scores or log-probabilities are differences of."""
    if main.is_meta:
        return 1.0
    if "hidden" in a:  # logits are sums that are rounded before they are capped
        logits = torch.nn.functional.linear(*(None if a.get(x) is None else a[x].double().abs() for x in HEAD))
        return (
            max(1.0, logits.max().item() * a.get("logit_scale", 1.0) / a.get("temperature", 1.0))
            if logits.numel()
            else 1.0
        )
    finite = main.detach()[main.detach().isfinite()].double()
    if "logits" in a:
        transform = (a.get("temperature", 1.0), a.get("logit_scale", 1.0), a.get("softcap"))
        finite = reference.transformed_logits(finite, *transform)
    return max(1.0, finite.abs().max().item() if finite.numel() else 0.0)


def assert_exact(function: PublicFunction, name: str, a: Arguments, copies: Arguments, returned: Any) -> None:
    """The results of a public function and their gradient are those of the oracle on copies of its arguments."""
    main, copy = a[function.main], copies[function.main]
    dtype = torch.float64 if main.dtype == torch.float64 else torch.float32
    if isinstance(copies.get("reward_threshold"), int):  # torch compares unsigned rewards with a float only
        copies["reward_threshold"] = float(copies["reward_threshold"])
    leaf = copies[function.main] = copy.double().requires_grad_(main.requires_grad)
    exact, actual = function.oracle(copies), results(function, returned)

    size, tau, margin = largest_number(a, main), float(a.get("tau", 10.0)), abs(float(a.get("margin", 0.0)))
    denominator = float(a["num_groups"]) if a.get("num_groups") is not None else 1.0
    rounding = ROUNDINGS * torch.finfo(main.dtype if "hidden" in a else dtype).eps  # logits are rounded to their dtype
    tolerance = {
        "logprobs": rounding * size,
        "entropy": rounding * size,
        "scores": rounding * size,
        "loss": rounding * (size + margin + 2 * tau) * max(1, exact["loss"].numel(), len(exact["scores"])) / denominator
        if "loss" in exact
        else 0.0,
    }
    for key, value in actual.items():
        assert value.dtype == dtype, key
        if not value.is_meta:
            assert max_error(value, exact[key].to(dtype)) <= tolerance[key], key
        else:
            assert main.is_meta
            assert value.shape == exact[key].shape, key

    wanted = {"conspo_scores": ()}.get(name, ("loss",) if "loss" in actual else tuple(actual))
    connected = [actual[key] for key in wanted]
    assert all(value.requires_grad == main.requires_grad for value in connected)
    if not main.requires_grad or main.is_meta or not all(value.isfinite().all() for value in connected) or not wanted:
        return
    (grad,) = torch.autograd.grad(sum(value.sum() for value in connected), main)
    (exact_grad,) = torch.autograd.grad(sum(exact[key].sum() for key in wanted), leaf)
    slope = float(a.get("logit_scale", 1.0)) / float(a.get("temperature", 1.0))
    relative = rounding * (size + (size + margin) / tau)
    info = torch.finfo(main.dtype)
    allowed = relative * 4 * slope / denominator + 2 * info.eps * exact_grad.abs().max().item() if grad.numel() else 0.0
    assert grad.dtype == main.dtype
    if "hidden" in a and grad.numel():  # a product of rounded numbers with weight
        allowed = (allowed + 4 * info.eps * slope) * len(a["weight"]) * max(1.0, a["weight"].abs().max().item())
    if allowed > info.max:  # of slopes of 1e18 (1e9 / 1e-9) in fp16, a rounding of the accumulator is beyond the range
        return
    assert max_error(grad, exact_grad.to(main.dtype)) <= allowed + info.tiny, "gradient"


def interpretable(rewards: Tensor) -> Tensor:
    """Triton's interpreter compares bf16 by its bits."""
    return rewards.float() if rewards.dtype == torch.bfloat16 and not torch.cuda.is_available() else rewards


def copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach().clone()


def call(name: str, a: Arguments, may_raise: bool) -> bool:
    """Whether the function returned, after what it did has been judged."""
    function = FUNCTIONS[name]
    if a.get("implementation") == "triton" and isinstance(a.get("rewards"), Tensor):
        a = {**a, "rewards": interpretable(a["rewards"])}
    copies = {key: copied(value) for key, value in a.items()}
    try:
        returned = function.call(**a)
    except (TypeError, ValueError) as error:
        if not may_raise:
            raise
        assert_error_of_ours(error, list(inspect.signature(function.parameters).parameters))
        return False
    assert_exact(function, name, a, copies, returned)
    return True


def examples(implementation: str, factor: float) -> settings:
    """The interpreter is slow."""
    share = {"torch": 1.0, "native": 1.0, "triton": 0.1}[implementation]
    return settings(max_examples=max(1, round(settings.default.max_examples * factor * share)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_arguments(function: str, implementation: str) -> None:
    @examples(implementation, 0.6)
    @given(FUNCTIONS[function].right)
    def property_holds(a: Arguments) -> None:
        call(function, {**a, "implementation": implementation}, may_raise=False)

    property_holds()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_arguments(function: str, implementation: str) -> None:
    optional = tuple(
        p.name
        for p in inspect.signature(FUNCTIONS[function].parameters).parameters.values()
        if p.name != "implementation"
    )

    @examples(implementation, 2)
    @given(drawn.changed(FUNCTIONS[function].right, optional))
    def property_holds(a: Arguments) -> None:
        call(function, {"implementation": implementation, **a}, may_raise=True)

    property_holds()


@examples("torch", 4)
@given(drawn.changed(drawn.margin_arguments(), ()))
def test_any_margin_schedule(a: Arguments) -> None:
    try:
        margin = margin_at(**a)
    except (TypeError, ValueError) as error:
        assert_error_of_ours(error, list(drawn.MARGIN_ARGUMENTS))
        return
    target, ratio, total, step = (float(a[name]) for name in drawn.MARGIN_ARGUMENTS)
    progress = 1.0 if ratio == 0 else min(step / total / ratio, 1.0)
    assert type(margin) is float
    assert margin == pytest.approx(target / 2 * (1 - math.cos(math.pi * progress)), rel=1e-12, abs=1e-300)
