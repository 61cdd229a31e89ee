"""The keyword arguments that overloads take as `**options` are those that the functions spell out, types and all."""

from __future__ import annotations

import inspect
import typing

import pytest

import conspo_kernels
from conspo_kernels import options

FUNCTIONS = {
    "conspo_loss": (options.LossOptions, {"return_metrics"}),
    "linear_conspo_loss": (options.LinearLossOptions, {"return_metrics"}),
    "conspo_loss_from_scores": (options.ScoreOptions, {"return_metrics"}),
    "token_logprobs": (options.LogprobOptions, {"return_entropy"}),
    "linear_token_logprobs": (options.LinearLogprobOptions, {"return_entropy"}),
    "weighted_score_loss": (options.WeightedOptions, {"return_metrics"}),
    "linear_weighted_score_loss": (options.LinearWeightedOptions, {"return_metrics"}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_the_keyword_arguments(name: str) -> None:
    typed, returned = FUNCTIONS[name]
    parameters = inspect.signature(getattr(conspo_kernels, name)).parameters.values()
    spelled = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in returned}
    annotations = {
        key: value.__forward_arg__ if hasattr(value, "__forward_arg__") else value
        for key, value in typed.__annotations__.items()
    }
    assert annotations == spelled


@pytest.mark.parametrize(
    ("module", "function"), [("ConSPOLoss", "conspo_loss"), ("LinearConSPOLoss", "linear_conspo_loss")]
)
def test_modules_take_the_settings_of_their_function(module: str, function: str) -> None:
    parameters = inspect.signature(getattr(conspo_kernels, module)).parameters
    whole = inspect.signature(getattr(conspo_kernels, function)).parameters
    per_call = {"cu_seqlens", "response_mask", "return_metrics", "bias", "weight_grad"}
    for name, parameter in parameters.items():
        assert (parameter.default, parameter.annotation) == (whole[name].default, whole[name].annotation)
    assert set(parameters) == {n for n, p in whole.items() if p.kind is p.KEYWORD_ONLY} - per_call


def test_a_signature_is_that_of_the_constructor_alone() -> None:
    class Sharper(conspo_kernels.ConSPOLoss):
        def __init__(self, sharpness: float) -> None:
            super().__init__(tau=1 / sharpness)

    assert list(inspect.signature(Sharper).parameters) == ["sharpness"]
    for module in (Sharper(2.0), conspo_kernels.LinearConSPOLoss()):
        assert [p.kind.name for p in inspect.signature(module).parameters.values()] == ["VAR_POSITIONAL", "VAR_KEYWORD"]


def test_type_hints_are_known_at_run_time() -> None:
    hints = typing.get_type_hints(conspo_kernels.LinearConSPOLoss.__init__)
    assert typing.get_args(hints["settings"]) == (options.LinearLossOptions,)
    for name in conspo_kernels.__all__:
        assert typing.get_type_hints(getattr(conspo_kernels, name)) or inspect.isclass(getattr(conspo_kernels, name))
