"""The paper's constants (its section 5.1) are the defaults of every public signature, config and integration."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import conspo_kernels
from conspo_kernels import integrations, reference
from conspo_kernels.integrations import nemo_rl, slime

TAU, TARGET, WARMUP_RATIO = 10.0, 0.01, 0.3
NEUTRAL_MARGIN = 0.0  # a curriculum needs a step, which only a trainer or a loop knows


def public_callables() -> Iterator[tuple[str, Any]]:
    """Every function and class of the top level, of the reference and of the integrations' modules, by name."""
    found = pkgutil.walk_packages(integrations.__path__, integrations.__name__ + ".")
    for module in [conspo_kernels, reference, *(importlib.import_module(package.name) for package in found)]:
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_") and value.__module__.startswith("conspo_kernels"):
                yield f"{module.__name__}.{name}", value


def defaults_of(name: str) -> dict[str, Any]:
    """The default of a parameter, by the callable that has it."""
    found = {}
    for where, value in public_callables():
        try:
            parameters = inspect.signature(value).parameters
        except (TypeError, ValueError):  # a class of C
            continue
        if name in parameters and parameters[name].default is not inspect.Parameter.empty:
            found[where] = parameters[name].default
    return found


def test_tau_of_every_signature() -> None:
    found = defaults_of("tau")
    assert set(found.values()) == {TAU}, found
    names = {where.rpartition(".")[2] for where in found}
    assert names >= {"conspo_loss", "linear_conspo_loss", "conspo_loss_from_scores", "conspo_weights"}
    assert names >= {"ConSPOLoss", "LinearConSPOLoss", "reference_loss"}
    assert names >= {"Objective", "register", "experience_maker", "conspo_trainer", "group_streams"}


def test_margin_of_every_signature_is_neutral() -> None:
    """But where a warm-up stands beside it: that is a curriculum's target."""
    curricula = defaults_of("margin_warmup_ratio")
    assert set(curricula.values()) == {WARMUP_RATIO}
    found = {where: default for where, default in defaults_of("margin").items() if where not in curricula}
    assert len(found) >= 12
    assert set(found.values()) == {NEUTRAL_MARGIN}, found


def test_the_curriculum() -> None:
    schedule = conspo_kernels.CosineMargin(1000)
    assert (schedule.total_steps, schedule.target, schedule.warmup_ratio) == (1000, TARGET, WARMUP_RATIO)
    assert [schedule(step) for step in (0, 300, 1000)] == [0.0, TARGET, TARGET]


@pytest.mark.parametrize("steps", [None, 1000])
def test_slimes_arguments(steps: int | None) -> None:
    """Its arguments have no defaults of their own: an argument that is not there has the paper's value."""
    objective = slime._objective(SimpleNamespace(conspo_margin_steps=steps))
    assert objective.tau == TAU
    assert objective.margin == (NEUTRAL_MARGIN if steps is None else conspo_kernels.CosineMargin(steps))


@pytest.mark.parametrize("config", [{}, SimpleNamespace()])
def test_nemo_rls_configuration(config: Any) -> None:
    loss_config = {name: needed for name, (_default, needed) in nemo_rl.DEFAULT_AND_NEEDED.items()}
    assert nemo_rl.ConSPOAdvantageEstimator(config, loss_config).objective.tau == TAU
