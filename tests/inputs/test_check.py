"""Every mistake has an error that names the argument, what was expected and what came."""

from __future__ import annotations

import ast
import math
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from conspo_kernels import (
    ConSPOLoss,
    LinearConSPOLoss,
    Parallel,
    conspo_loss,
    conspo_loss_from_scores,
    conspo_scores,
    conspo_weights,
    linear_conspo_loss,
    linear_weighted_score_loss,
    sequence_scores,
    token_logprobs,
    weighted_logprob_loss,
    weighted_score_loss,
)
from conspo_kernels.inputs import check
from conspo_kernels.values import LARGEST, SMALLEST


def padded(**changes: Any) -> dict[str, Any]:
    return {
        "logits": torch.randn(4, 3, 9),
        "labels": torch.zeros(4, 3, dtype=torch.long),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "groups": 2,
        **changes,
    }


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "logits": torch.randn(6, 9),
        "labels": torch.zeros(6, dtype=torch.long),
        "rewards": torch.tensor([1.0, 0.0]),
        "groups": 2,
        "cu_seqlens": torch.tensor([0, 2, 6]),
        **changes,
    }


def scores(**changes: Any) -> dict[str, Any]:
    return {"scores": torch.randn(4), "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]), "groups": 2, **changes}


def logprobs(**changes: Any) -> dict[str, Any]:
    return {"logprobs": torch.randn(4, 3), "labels": torch.zeros(4, 3, dtype=torch.long), **changes}


def linear(**changes: Any) -> dict[str, Any]:
    return {
        "hidden": torch.randn(4, 3, 5),
        "weight": torch.randn(9, 5),
        **{k: v for k, v in padded().items() if k != "logits"},
        **changes,
    }


def weighted(**changes: Any) -> dict[str, Any]:
    return {
        "logits": torch.randn(4, 3, 9),
        "labels": torch.zeros(4, 3, dtype=torch.long),
        "weights": torch.tensor([0.5, -0.5, 0.1, -0.1]),
        **changes,
    }


GROUP = torch.distributed.ProcessGroup(0, 1)  # of no backend: only looked at


class Sharded(torch.Tensor):
    """As much of a DTensor as the function looks at."""

    def full_tensor(self) -> Tensor:
        return self


def loss(arguments: dict[str, Any]) -> Any:
    return conspo_loss(**arguments)


def linear_loss(arguments: dict[str, Any]) -> Any:
    return linear_conspo_loss(**arguments)


def phase_two(arguments: dict[str, Any]) -> Any:
    return weighted_score_loss(**arguments)


def known(arguments: dict[str, Any]) -> Any:
    return weighted_logprob_loss(**{k: v for k, v in arguments.items() if k != "weights"})


def linear_phase_two(arguments: dict[str, Any]) -> Any:
    arguments = {k: v for k, v in arguments.items() if k not in ("rewards", "groups")}
    return linear_weighted_score_loss(**{"weights": torch.tensor([0.5, -0.5, 0.1, -0.1]), **arguments})


def tokens(arguments: dict[str, Any]) -> Any:
    return token_logprobs(**{k: v for k, v in arguments.items() if k not in ("rewards", "groups")})


def from_scores(arguments: dict[str, Any]) -> Any:
    return conspo_loss_from_scores(**arguments)


META = torch.device("meta")
WEIGHT = torch.randn(9, 5, requires_grad=True)
COMPANIONS = {  # what may lie on the CPU whatever the device of the logits
    "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    "groups": torch.tensor([1, 1, 2, 2]),
    "margin": torch.tensor(0.0),
    "num_groups": torch.tensor(1.0),
}

VALUE_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], dict[str, Any], str]] = [
    # logits
    (loss, padded(logits=torch.zeros(4, 3, 9, dtype=torch.long)),
     r"logits must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (loss, padded(logits=torch.randn(9)), r"logits must be \[B, T, V\], or packed .*, got \[9\]"),
    (loss, padded(logits=torch.randn(1, 4, 3, 9)), r"logits must be .*, got \[1, 4, 3, 9\]"),
    (loss, padded(logits=torch.randn(4, 3, 0)),
     r"logits must have a vocabulary of at least one entry, got \[4, 3, 0\]"),
    (loss, padded(logits=torch.randn(4, 9, 3).mT), r"logits must have a last stride of 1 .*, got strides \(27, 1, 3\)"),
    *((loss, padded(**{name: torch.eye(4).to_sparse()}), f"{name} must be a dense tensor, got torch.sparse_coo")
      for name in ("logits", "labels", "response_mask", "rewards", "groups")),
    # labels and mask
    (loss, padded(labels=torch.zeros(4, 3)), "labels must be int8, int16, int32, int64 or uint8, got torch.float32"),
    (loss, padded(labels=torch.zeros(4, 2, dtype=torch.long)), r"labels must have shape \[4, 3\] .*, got \[4, 2\]"),
    (loss, packed(labels=torch.zeros(1, 6, dtype=torch.long)), r"labels must have shape \[6\] .*, got \[1, 6\]"),
    (loss, padded(labels=torch.zeros(4, 3, dtype=torch.long, device=META)),
     "labels must be on the device of logits, cpu, got meta"),
    (loss, padded(labels=torch.full((4, 3), 9)),
     r"labels must lie in \[0, 9\) or equal ignore_index \(-100\); got 9 at token \(0, 0\)"),
    (loss, padded(response_mask=torch.ones(4, 2)),
     r"response_mask must have shape \[4, 3\] \(that of labels\), got \[4, 2\]"),
    (loss, padded(response_mask=torch.ones(4, 3, dtype=torch.complex64)),
     "response_mask must be real, got torch.complex64"),
    (loss, padded(response_mask=torch.ones(4, 3, device=META)),
     "response_mask must be on the device of labels, cpu, got meta"),
    # cu_seqlens
    (loss, packed(cu_seqlens=None), r"cu_seqlens is needed for the loss of packed tokens \[6\]"),
    (tokens, packed(cu_seqlens=None, shift=True), r"cu_seqlens is needed for shift=True of packed tokens \[6\]"),
    (loss, packed(cu_seqlens=torch.tensor([0.0, 6.0])), "cu_seqlens must be int32 or int64, got torch.float32"),
    (loss, packed(cu_seqlens=torch.tensor([[0, 6]])), r"cu_seqlens must be \[S \+ 1\], got \[1, 2\]"),
    (loss, packed(cu_seqlens=torch.tensor([], dtype=torch.int32)), r"cu_seqlens must be \[S \+ 1\], got \[0\]"),
    (loss, padded(cu_seqlens=torch.tensor([0, 3])),
     r"cu_seqlens goes with packed tokens, \[N\] or \[1, N\], got \[4, 3\]"),
    (loss, packed(cu_seqlens=torch.tensor([1, 2, 6])), "cu_seqlens must begin with 0, got 1"),
    (loss, packed(cu_seqlens=torch.tensor([0, 4, 2])), "cu_seqlens must not fall, got 4 then 2 at index 2"),
    (loss, packed(cu_seqlens=torch.tensor([0, 2, 7])), "cu_seqlens must end within the 6 packed tokens, got 7"),
    (tokens, packed(cu_seqlens=torch.tensor([0, 4, 2]), shift=True), "cu_seqlens must not fall"),
    # rewards and groups
    (loss, padded(rewards=torch.zeros(5)), r"rewards must have shape \[4\] \(one per rollout\), got \[5\]"),
    (loss, padded(rewards=torch.zeros(3)),
     r"rewards must have shape \[4\] \(one per rollout; padding .* behind the last of cu_seqlens\), got \[3\]"),
    (loss, padded(rewards=torch.zeros(4, 1)), r"rewards must have shape \[4\] .*, got \[4, 1\]"),
    (loss, padded(rewards=torch.zeros(4, dtype=torch.complex64)),
     "rewards must be .*, int or bool, got torch.complex64"),
    (loss, padded(groups=3), "groups=3 rollouts per prompt must divide the number of rollouts, got 4"),
    (loss, padded(groups=0), "groups must be at least 1 and fit 64 bits, got 0"),
    (loss, padded(groups=torch.zeros(3, dtype=torch.long)), r"groups must have shape \[4\] .*, got \[3\]"),
    (loss, padded(logits=torch.zeros(0, 3, 9), labels=torch.zeros(0, 3).long(), rewards=torch.ones(0), groups=2**63),
     "groups must be at least 1 and fit 64 bits, got 9223372036854775808"),
    *((function, arguments(**{name: value.to(META)}), f"{name} must be on the CPU, got meta")
      for function, arguments in ((loss, padded), (from_scores, scores)) for name, value in COMPANIONS.items()),
    (loss, packed(cu_seqlens=torch.tensor([0, 6], device=META)), "cu_seqlens must be on the CPU, got meta"),
    (loss, padded(groups=torch.zeros(4)), "groups must be an int or prompt ids in int8, .*, got torch.float32"),
    # numbers
    *((loss, padded(**{name: bad}), f"{name} must be positive and finite, .*, got {re.escape(str(bad))}$")
      for name in ("tau", "temperature", "logit_scale", "softcap", "num_groups")
      for bad in (0, -1.0, math.inf, math.nan, 1e-300, 10**400)),
    (loss, padded(reward_threshold=math.nan), "reward_threshold must not be NaN"),
    (loss, padded(rewards=torch.zeros(4).to(torch.float8_e4m3fn)), "rewards must be .* got torch.float8_e4m3fn"),
    (loss, padded(reward_threshold=10**400), "reward_threshold must fit 64 bits, got 1000"),
    *((loss, padded(margin=bad), f"margin must be finite, .*, got {re.escape(str(float(bad)))}")
      for bad in (math.nan, 1e300, torch.tensor(math.nan), torch.tensor(-math.inf))),
    (loss, padded(ignore_index=2**63), "ignore_index must fit 64 bits, got 9223372036854775808"),
    *((loss, padded(num_groups=torch.tensor(bad)), f"num_groups must be positive and finite, .*, got {bad}")
      for bad in (0.0, math.nan, math.inf)),
    (loss, padded(num_groups=torch.ones(2)),
     r"num_groups must be a number or a real 0-d tensor, got torch.float32 \[2\]"),
    (loss, padded(num_groups=2, reduction="sum"),
     "num_groups is the denominator of reduction='mean', got reduction='sum'"),
    (loss, padded(margin=torch.zeros(1)), r"margin must be a number or a real 0-d tensor, got torch.float32 \[1\]"),
    (loss, padded(margin=torch.zeros((), requires_grad=True)), r"margin .* gets no gradient: pass margin.detach\(\)"),
    (loss, padded(margin=torch.tensor(1.0).to_sparse()), "margin must be a dense tensor, got torch.sparse_coo"),
    (loss, padded(reduction=np.array(["mean", "sum"])), "reduction must be one of 'mean', 'sum', 'none', got array"),
    (loss, padded(reduction="avg"), "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (loss, padded(implementation="cuda"),
     "implementation must be one of 'auto', 'triton', 'native', 'torch', got 'cuda'"),
    (loss, padded(rewards=torch.zeros(4).as_subclass(Sharded)),
     r"rewards must be a plain tensor, got a DTensor: pass rewards.full_tensor\(\)"),
    # the other public functions
    (from_scores, scores(scores=torch.randn(4, 1)), r"scores must be \[S\], got \[4, 1\]"),
    (from_scores, scores(scores=torch.arange(4)),
     "scores must be floating point, got torch.int64"),
    (from_scores, scores(implementation="x"), "implementation must be one of"),
    (lambda a: sequence_scores(**a), logprobs(logprobs=torch.randn(4, 3, 2)), r"logprobs must be .*, got \[4, 3, 2\]"),
    (lambda a: sequence_scores(**a), logprobs(logprobs=torch.arange(12).view(4, 3)), "logprobs must be floating point"),
    (lambda a: sequence_scores(**a), logprobs(labels=torch.zeros(3, 4, dtype=torch.long)),
     r"labels must have shape \[4, 3\]"),
    (lambda a: sequence_scores(**a), logprobs(implementation=None), "implementation must be one of .*, got None"),
    # hidden states and the head
    (linear_loss, linear(hidden=torch.zeros(4, 3, 5, dtype=torch.long)),
     "hidden must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (linear_loss, linear(hidden=torch.randn(5)), r"hidden must be \[B, T, H\], or packed .*, got \[5\]"),
    (linear_loss, linear(weight=torch.randn(9, 4)), r"weight must be \[V, H\] with H = 5 of hidden, got \[9, 4\]"),
    (linear_loss, linear(weight=torch.randn(9)), r"weight must be \[V, H\] with H = 5 of hidden, got \[9\]"),
    (linear_loss, linear(weight=torch.randn(0)), r"weight must be \[V, H\], got the empty \[0\]: .* gather it"),
    (linear_loss, linear(weight=torch.randn(9, 5).as_subclass(Sharded)),
     r"weight must be a whole tensor, got a DTensor: .* or pass weight.full_tensor\(\)"),
    (linear_loss, linear(weight=torch.randn(9, 5, device=META)), "weight must be on the device of hidden, cpu, got"),
    (linear_loss, linear(weight=torch.randn(9, 5).half()),
     "weight must have the dtype of hidden, torch.float32, got torch.float16"),
    (linear_loss, linear(bias=torch.randn(5)), r"bias must have shape \[9\] \(one per row of weight\), got \[5\]"),
    (linear_loss, linear(bias=torch.randn(9).double()), "bias must have the dtype of hidden"),
    (linear_loss, linear(workspace_mib=0), "workspace_mib must be positive and finite, .*, got 0"),
    (linear_loss, linear(labels=torch.full((4, 3), 9)), r"labels must lie in \[0, 9\) .* got 9"),
    (linear_loss, linear(labels=torch.zeros(4, 2, dtype=torch.long)),
     r"labels must have shape \[4, 3\] \(one per row of hidden\), got \[4, 2\]"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=torch.zeros(9, 4)),
     r"weight_grad must have shape \[9, 5\]"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=torch.zeros(9, 5).bfloat16()),
     "weight_grad must be torch.float32 for weight in torch.float32, got torch.bfloat16"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=torch.zeros(9, 5, device=META)),
     "weight_grad must be on the device of weight"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True),
                         weight_grad=torch.zeros(9, 5, requires_grad=True)), "weight_grad .* must not require a grad"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=torch.zeros(1, 5).expand(9, 5)),
     r"weight_grad must have an element for each of weight, got strides \(0, 1\)"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=torch._neg_view(torch.zeros(9, 5))),
     "weight_grad is written to memory, got a view that negates what memory holds"),
    (linear_loss, linear(weight=WEIGHT, weight_grad=WEIGHT.data), "weight_grad must not be the memory of weight"),
    (linear_loss, linear(weight_grad=torch.zeros(9, 5)), "weight_grad takes the gradient of weight, which does not"),
    (linear_phase_two, linear(weight=torch.randn(9, 5, requires_grad=True), labels=torch.full((4, 3), 9)),
     r"labels must lie in \[0, 9\)"),
    # known weights
    (phase_two, weighted(weights=torch.randn(3)), r"weights must have shape \[4\] \(one per rollout\), got \[3\]"),
    (phase_two, weighted(weights=torch.zeros(4, dtype=torch.long)), "weights must be floating point, got torch.int64"),
    (phase_two, weighted(weights=torch.zeros(4, device=META)), "weights must be on the CPU, got meta"),
    (phase_two, weighted(weights=torch.zeros(4, requires_grad=True)), r"weights .* pass weights.detach\(\)"),
    (phase_two, weighted(logits=torch.randn(4, 3, 9, requires_grad=True), inplace=True), "inplace would overwrite"),
    (phase_two, weighted(scores=torch.randn(3)), r"scores must have shape \[4\] \(one per rollout\), got \[3\]"),
    (lambda a: conspo_weights(**a), scores(tau=0), "tau must be positive and finite"),
    (known, weighted(coefficients=torch.zeros(4)),
     r"coefficients must have shape \[4, 3\] \(that of labels\), got \[4\]"),
    (known, weighted(coefficients=torch.zeros(4, 3, dtype=torch.int)),
     "coefficients must be floating point, got torch.int"),
    (known, weighted(coefficients=torch.zeros(4, 3, device=META)), "coefficients must be on the CPU, got meta"),
    (known, weighted(coefficients=torch.zeros(4, 3, requires_grad=True)), r"pass coefficients.detach\(\)"),
    (linear_loss, linear(logits_dtype=torch.float16),
     "logits_dtype must be None or torch.float32 for hidden in torch.f"),
    (linear_loss, linear(logits_dtype=torch.float64),
     "logits_dtype must be None or torch.float32 for hidden in torch.f"),
    # ranks
    (lambda a: Parallel(**a), {"grad_reduction": "none"}, "grad_reduction must be one of 'mean', 'sum', got 'none'"),
    (loss, padded(parallel=Parallel(context=GROUP), shift=True),
     "shift=True cannot see the first label of the next rank"),
    (lambda a: Parallel(**a), {"vocab": GROUP, "vocab_start": -1}, "parallel.vocab_start must not be negative, got -1"),
    (lambda a: Parallel(**a), {"vocab_start": 3}, "parallel.vocab_start must be 0 where parallel.vocab is None, got 3"),
]  # fmt: skip

TYPE_ERRORS: list[tuple[Callable[[dict[str, Any]], Any], dict[str, Any], str]] = [
    *((loss, padded(**{name: [1, 2]}), f"{name} must be a torch.Tensor, got list")
      for name in ("logits", "labels", "rewards", "response_mask", "cu_seqlens")),
    (loss, padded(groups=2.0), "groups must be an int or a tensor of prompt ids, got float"),
    (loss, padded(groups=True), "groups must be an int or a tensor of prompt ids, got bool"),
    *((loss, padded(**{name: "1"}), f"{name} must be a number, got str")
      for name in ("tau", "temperature", "logit_scale", "softcap", "margin", "num_groups", "reward_threshold")),
    (loss, padded(ignore_index=1.5), "ignore_index must be an int, got float"),
    *((loss, padded(**{name: 1}), f"{name} must be True or False, got int")
      for name in ("shift", "inplace_backward", "return_metrics")),
    (tokens, padded(return_entropy=None), "return_entropy must be True or False, got NoneType"),
    (from_scores, scores(scores=[1.0]), "scores must be a torch.Tensor, got list"),
    (lambda a: sequence_scores(**a), logprobs(logprobs=None), "logprobs must be a torch.Tensor, got NoneType"),
    *((linear_loss, linear(**{name: 1}), f"{name} must be a torch.Tensor, got int")
      for name in ("hidden", "weight", "bias")),
    (linear_loss, linear(logits_dtype=[]), "logits_dtype must be None or a torch.dtype, got list"),
    (linear_loss, linear(workspace_mib="512"), "workspace_mib must be a number, got str"),
    (linear_loss, linear(weight=torch.randn(9, 5, requires_grad=True), weight_grad=1), "weight_grad must be a torch"),
    *((lambda a: Parallel(**a), {name: "world"}, f"parallel.{name} must be a torch.distributed.ProcessGroup, got str")
      for name in ("data", "context", "vocab")),
    (loss, padded(parallel=3), "parallel must be a conspo_kernels.Parallel or None, got int"),
    (lambda a: Parallel(**a), {"vocab": GROUP, "vocab_start": 1.5}, "parallel.vocab_start must be an int, got float"),
    (phase_two, weighted(weights=[1.0]), "weights must be a torch.Tensor, got list"),
    (phase_two, weighted(inplace=1), "inplace must be True or False, got int"),
    (lambda a: ConSPOLoss(**a), {"temprature": 1.0}, "unexpected keyword argument 'temprature'"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "message"), VALUE_ERRORS, ids=[m[:60] for *_, m in VALUE_ERRORS])
def test_value_errors(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (loss, padded, "margin"),
        (loss, padded, "num_groups"),
        (phase_two, weighted, "weights"),
        (known, weighted, "coefficients"),
    ],
)
def test_a_constant_of_the_loss_carries_no_tangent(
    function: Callable[..., Any], arguments: Callable[..., dict[str, Any]], name: str
) -> None:
    value = {"weights": torch.ones(4), "coefficients": torch.ones(4, 3)}.get(name, torch.tensor(1.0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(ValueError, match=rf"{name} must be a constant .* pass {name}.detach\(\)"):
            function(arguments(**{name: dual}))
        function(arguments(**{name: dual.detach()}))


def test_vmap_over_a_constant_of_the_loss() -> None:
    """It runs, inside of forward mode too; what is batched hides neither gradient nor tangent."""
    margins, arguments = torch.tensor([0.0, 0.5, 1.0]), padded()

    def losses(margins: Tensor) -> Tensor:
        return torch.func.vmap(lambda m: loss({**arguments, "margin": m}))(margins)

    expected = torch.stack([loss({**arguments, "margin": m}) for m in margins])
    assert torch.equal(losses(margins), expected)
    with forward_ad.dual_level():
        assert torch.equal(losses(margins), expected)
        with pytest.raises(ValueError, match="margin must be a constant"):
            losses(forward_ad.make_dual(margins, margins))
    with pytest.raises(ValueError, match="margin must be a constant"):
        losses(margins.requires_grad_())
    with pytest.raises(ValueError, match="margin must be a constant"):
        torch.func.grad(lambda m: losses(m).sum())(margins.detach())


@pytest.mark.parametrize(("function", "arguments", "message"), TYPE_ERRORS, ids=[m[:60] for *_, m in TYPE_ERRORS])
def test_type_errors(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(arguments)


OTHERS = (
    "overwritten", "_reverse_mode", "no_second_derivative", "statistics_over_ranks", "_backward", "_local_part",
    "__reduce__", "gather_rollouts", "to_device",
)  # fmt: skip


def raised_at(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, int]:
    """File and line of the error of a call."""
    try:
        function(arguments)
    except (TypeError, ValueError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Path(frame.filename).name, frame.lineno or 0
    raise AssertionError("no error")


def test_every_error_of_inputs_and_ops_is_provoked_here() -> None:
    """But those of `overwritten`, `_reverse_mode`, of ranks, pickles and CUDA graphs, which have tests of their own."""
    reached = {raised_at(function, arguments) for function, arguments, _ in VALUE_ERRORS + TYPE_ERRORS}
    package = Path(check.__file__).parent.parent
    missing = []
    for path in (
        *package.glob("inputs/*.py"),
        *package.glob("ops/*.py"),
        package / "values.py",
        package / "parallel.py",
    ):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name in OTHERS:
                continue
            for node in ast.walk(function):
                lines = range(node.lineno, (node.end_lineno or 0) + 1) if isinstance(node, ast.Raise) else ()
                if lines and not any((path.name, line) in reached for line in lines):
                    missing.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_ends_of_the_range_are_in_it(dtype: torch.dtype) -> None:
    """1e-9 rounds down in fp32, which the op sees."""
    arguments = scores(scores=torch.tensor([-1.0, -2.0, -1.0, -2.0], dtype=dtype))
    for number in (1e-9, SMALLEST, LARGEST):
        for name in ("tau", "num_groups", "margin"):
            assert from_scores({**arguments, name: number}).isfinite()


def test_nested_tensors_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, 9)])
    with pytest.raises(ValueError, match="logits must be a dense tensor, got a nested one"):
        loss(padded(logits=nested))


def test_companions_on_the_cpu_go_with_any_device() -> None:
    """Shapes only: a meta tensor has no values."""
    arguments = {name: padded()[name].to(META) for name in ("logits", "labels")}
    assert loss(padded(**arguments, **COMPANIONS)).is_meta
    with FakeTensorMode():
        elsewhere = torch.empty(4, device="cuda")
    with pytest.raises(ValueError, match="rewards must be on the CPU or meta, where the computation is, got cuda:0"):
        check.devices(META, rewards=elsewhere)


def test_the_unchanged_arguments_are_fine() -> None:
    results: list[Tensor] = [
        loss(padded()), loss(packed()), tokens(padded()), tokens(packed()), tokens(packed(cu_seqlens=None)),
        conspo_loss_from_scores(**scores()), sequence_scores(**logprobs()),
        conspo_scores(padded()["logits"], padded()["labels"]),
    ]  # fmt: skip
    assert all(result.isfinite().all() for result in results)


def test_an_array_as_a_modules_setting_is_refused_at_the_call() -> None:
    loss_fn = ConSPOLoss(margin=np.array([0.1, 0.2]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="margin must be a number, got ndarray"):
        loss_fn(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 0.0]), 2)
    assert ConSPOLoss(margin=np.float32(0.5)).settings == {"margin": 0.5}
    assert LinearConSPOLoss().settings == ConSPOLoss(tau=10, shift=False).settings == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 0},
        {"inplace_backward": 0},
        {"temperature": True},
        {"margin": False},
        {"ignore_index": -100.0},
        {"ignore_index": np.float32(-100)},
    ],
)
def test_a_modules_setting_of_a_wrong_type_is_refused_even_if_it_equals_the_default(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(TypeError, match=f"{name} must be"):
        ConSPOLoss(**settings)(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 0.0]), 2)


def test_no_forward_mode_no_torch_func_no_second_derivative() -> None:
    """A registered op has none of them, and a tangent of its would be zero in silence."""
    logits, labels = torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.long)

    def value(logits: Tensor) -> Tensor:
        return token_logprobs(logits, labels).sum()

    for transform in (lambda: torch.func.jvp(value, (logits,), (logits,)), lambda: torch.func.grad(value)(logits)):
        with pytest.raises(NotImplementedError, match=r"logits must not be inside a torch\.func transform"):
            transform()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="logits must not carry a tangent"):
        value(forward_ad.make_dual(logits, logits))
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf).square(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="conspo_kernels has no second derivative"):
        grad.sum().backward()
