"""The protocol of the experiments, fixed before they run: tasks, settings, methods, budgets, seeds, and what decides.

A run is one (task, setting, method, constants, learning rate, seed). For every task, setting and method:

1. Tuning: each learning rate with each candidate of the method's own constants, on TUNING_SEED. The pair with the
   highest accuracy on the validation problems after the last step is taken (ties: the smaller learning rate, then the
   earlier candidate).
2. The taken pair on each of SEEDS. The result is DECIDES: accuracy on the held-out problems after the last step, which
   nothing before looks at.

Methods are compared in pairs over seeds: a seed fixes the warmed-up weights, the prompts and the random numbers of
sampling, whatever the method. Every run of a setting has the same number of rollouts and of updates.

All comparisons are reported. Nothing is chosen after the runs: no seed, no metric, no step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

DECIDES = "held_out_accuracy"  # sampled at temperature 1, EVALUATION_SAMPLES per problem
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
LEARNING_RATES = (1e-5, 3e-5, 1e-4)  # pilots: at 3e-4 ConSPO and GRPO both collapse

PROMPTS, GROUP = 16, 8
MAX_GRAD_NORM = 1.0
WARMUP_ACCURACY = 0.35  # of supervised steps on right answers; the policy that all methods of a seed start from
HELD_OUT, VALIDATION, EVALUATION_SAMPLES = 512, 256, 4
EVALUATE_EVERY = 16  # steps, for the curves of SEEDS

TASKS = {
    "spell_backward": "words of 3 to 7 letters, spelled backward: responses of 4 to 8 tokens",
    "running_sums": "sums of 2 to 8 digits worked out term by term: responses of 2 to 25 tokens, only the last counts",
}
WARMUP_LR = {"spell_backward": 5e-4, "running_sums": 1e-3}
UPDATES = {"on policy": 1, "four updates": 4}  # of each batch of rollouts
STEPS = {"on policy": 80, "four updates": 32}  # 10,240 and 4,096 rollouts a run


@dataclass(frozen=True)
class Method:
    """An objective of `objectives.py`, the candidates of its own constants, and where it differs from the others.

    margin, margin_warmup: of `CosineMargin`, among the constants of the objectives that have a margin.
    same_as: the setting in which it is another method, by theorem (a test shows the gradients equal) -> that method.
    """

    objective: str
    candidates: tuple[dict[str, Any], ...]
    same_as: dict[str, str] = field(default_factory=dict)


CURRICULUM = {"margin_warmup": 0.5}
METHODS = {
    "conspo": Method("conspo", ({"tau": 1.0, "margin": 0.5, **CURRICULUM}, {"tau": 1.0, "margin": 1.0, **CURRICULUM})),
    "grpo": Method("grpo", ({"clip": 0.2}, {"clip": 0.1})),
    "dapo": Method("dapo", ({"dynamic_sampling": True}, {"dynamic_sampling": True, "clip_high": 0.4})),
    "dr_grpo": Method("dr_grpo", ({"clip": 0.2}, {"clip": 0.1})),
    "disco": Method("disco", ({"tau": 10.0}, {"tau": 1.0})),
    "gmpo": Method("gmpo", ({"clip": 0.4}, {"clip": 0.2}), {"on policy": "grpo"}),
    "cispo": Method("cispo", ({"ceiling": 5.0}, {"ceiling": 2.0})),
    "sapo": Method("sapo", ({}, {"tau_positive": 2.0, "tau_negative": 2.1}), {"on policy": "grpo"}),
    # ablations
    "conspo, no margin": Method("conspo", ({"tau": 1.0}, {"tau": 0.5})),
    "conspo, fixed margin": Method(
        "conspo", tuple({"tau": 1.0, "margin": m, "margin_warmup": 0.0} for m in (0.5, 1.0))
    ),
    "linear score gap": Method("linear_score_gap", ({},)),
    "conspo, clipped ratios": Method(
        "conspo_of_clipped_ratios", tuple({"tau": tau, "margin": 0.5, **CURRICULUM} for tau in (1.0, 0.3))
    ),
}
# On policy every ratio is 1 and no clip acts: constants that only clip make one candidate there.
CLIPS = {"clip", "clip_high", "ceiling"}


@dataclass(frozen=True)
class Run:
    """One training run; `name` is its file."""

    task: str
    setting: str
    method: str
    candidate: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return "_".join(str(value).replace(" ", "-").replace(",", "") for value in asdict(self).values())

    @property
    def constants(self) -> dict[str, Any]:
        return METHODS[self.method].candidates[self.candidate]


def methods_in(setting: str) -> list[str]:
    """Without those that are another method there."""
    return [name for name, method in METHODS.items() if setting not in method.same_as]


def cells() -> Iterator[tuple[str, str, str]]:
    """(task, setting, method)."""
    for task, setting in itertools.product(TASKS, UPDATES):
        yield from ((task, setting, method) for method in methods_in(setting))


def candidates(setting: str, method: str) -> list[int]:
    """The numbers of a method's candidates that differ in a setting."""
    different: dict[str, int] = {}
    for number, constants in enumerate(METHODS[method].candidates):
        acting = {k: v for k, v in constants.items() if UPDATES[setting] > 1 or k not in CLIPS}
        different.setdefault(repr(sorted(acting.items())), number)
    return list(different.values())


def tuning_runs(task: str, setting: str, method: str) -> list[Run]:
    """In the order in which ties are decided."""
    return [
        Run(task, setting, method, candidate, lr, TUNING_SEED)
        for lr in LEARNING_RATES
        for candidate in candidates(setting, method)
    ]


def chosen(task: str, setting: str, method: str, validation: dict[str, float]) -> tuple[int, float] | None:
    """The candidate and learning rate that tuning takes; None while a tuning run is missing.

    validation: accuracy after the last step by the name of the run.
    """
    runs = tuning_runs(task, setting, method)
    if any(run.name not in validation for run in runs):
        return None
    best = max(runs, key=lambda run: validation[run.name])  # the first of equals
    return best.candidate, best.lr


def final_runs(task: str, setting: str, method: str, taken: tuple[int, float]) -> list[Run]:
    return [Run(task, setting, method, *taken, seed) for seed in SEEDS]


def number_of_runs() -> int:
    return sum(len(tuning_runs(*cell)) + len(SEEDS) for cell in cells())
