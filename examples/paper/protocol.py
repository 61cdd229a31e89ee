"""The design of the study, fixed before its runs: parts, methods, sizes, seeds, order, and what decides.

0 directions     From one policy, steps of equal divergence against sum_i w_i s_i: the exact change of accuracy.
                 Weights w are a group's weight times the shares of its rollouts, all combinations; where the
                 group's weight is ConSPO's own (the mean of q), with three margins. With normalised shares a
                 margin acts among the right rollouts of a group alone, and these are all alike in a task with one
                 right answer: it drops out there. Four kinds of policy, ten seeds.
1 main           Every rollout is used once, in four mini-batches. ConSPO and its seven baselines at their papers'
                 constants. Learning rates in factors of two are tuned on three seeds: from START_GRID on, extended
                 until the best is inside. Then each method at its best rate and its two neighbours, on other
                 seeds. Primary comparison: ConSPO - GRPO on spell_backward, each at its best rate, by a paired
                 permutation test. All other comparisons of a task are corrected by Holm.
2 cause          What the score and a bound on the ratio do where a batch is used again: {log-probability, ratio} x
                 {no bound, bound 0.2} x {mini-batches, repetition}, three learning rates: in mini-batches those of
                 ConSPO in part 1, in repetition its best, a half and a quarter. A clipped ratio is the bounded
                 ratio here. (A trust region on top of it would change nothing: it stops the same tokens.) GRPO in
                 repetition beside them.
3 sensitivity    tau, the margin and its warm-up, one at a time about ConSPO's constants, at its best rate of part
                 1.
4 pretrained     SmolLM2-135M on the demo's sums, at the demo's budget, learning rate and one update per batch:
                 ConSPO, GRPO, DisCO.

In all parts groups that are all right or all wrong are discarded before the mini-batches are made, as in the
paper's section 5.1; DAPO's dynamic sampling comes to the same. ConSPO's weights are computed anew at the
parameters of each update, so the objective is exact. Old log-probabilities are the sampling policy's. Gradients
are not clipped by norm: in pilots of one seed at 3e-5 norms of the first and last mini-batch lay between 4 and 17
throughout, and Adam takes their scale out. At 1e-4 both methods ended below or near their best; so the grid begins
lower.

A seed fixes the start, the prompts and the random numbers of sampling, whatever the method. Differences are in
pairs over seeds. The result of a run is its accuracy on the held-out problems after the last batch, of a tuning
run that on the validation problems; neither is trained on. It is exact for spell_backward, sampled for the others.
Ties in tuning: the smaller rate. No run is left out, no metric, seed or step is chosen afterwards.

Order of the runs: that of `planned`, in which part 0 stops after four of its seeds until parts 1 and 2 are there;
no number depends on it. Expected: HOURS, 9 in all, of at most 14. So that it is no more, part 1's second task has
two tuning seeds, neighbouring rates for ConSPO and GRPO alone, and eight seeds for the six others. Its sums had 8 to
16 terms and its runs 32 batches, until a pilot before its first run, with seeds of no part: no warm-up reached 12 %
in 165 s. With 4 to 8 terms it takes 75 s, and 32 batches moved GRPO from 8.6 to 11.6 % and ConSPO to 11.0 % at 3e-5,
to 9.1 and 4.7 % at 1.2e-4. So it has 4 to 8 terms and 64 batches, and its grid begins around 3e-5.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

HELD_OUT, VALIDATION, EVALUATION_SAMPLES = 512, 256, 4
UPDATES = 4  # of a batch of rollouts
FIRST_RATE = 3e-5
# Rates are FIRST_RATE * 2^k, k from the one to the other at first.
START_GRID = {"spell_backward": (-2, 0), "long_sums": (-1, 1)}
TUNING_SEEDS, SEEDS, CAUSE_SEEDS, PRETRAINED_SEEDS = (100, 101, 102), tuple(range(12)), tuple(range(10)), (0, 1, 2)
# Pass rates that the supervised warm-up is kept at: first that of the training runs, then those of part 0 alone.
START = {"spell_backward": (0.35, 0.08, 0.2, 0.4), "long_sums": (0.12,)}
SPOILT = 0.35
WARMUP_LR = {"spell_backward": 5e-4, "long_sums": 1e-3}


class Size(NamedTuple):
    """A batch has `prompts` groups of `group` rollouts; a run has `batches`, and looks at itself `every` so many."""

    prompts: int
    group: int
    batches: int
    every: int


SIZES = {"spell_backward": Size(32, 8, 32, 4), "long_sums": Size(16, 16, 64, 32), "smollm2": Size(8, 8, 20, 20)}
TASKS = {
    "spell_backward": "words of 3 to 7 letters, spelled backward: one right answer of 4 to 8 tokens, exact accuracy",
    "long_sums": "sums of 4 to 8 digits worked out freely, the last number counts: responses of up to 32 tokens",
    "smollm2": "SmolLM2-135M-Instruct on sums of two digits, as in the demo",
}


class Method(NamedTuple):
    """An objective of objectives.py with its constants. margin, alpha: of `CosineMargin`; trust_region: its epsilon."""

    objective: str
    constants: dict[str, Any]


CONSTANTS = {"tau": 10.0, "margin": 0.01, "alpha": 0.3}  # ConSPO's, section 5.1
MAIN = {
    "conspo": Method("conspo", CONSTANTS),
    "grpo": Method("grpo", {"clip": 0.2}),
    "dapo": Method("dapo", {"clip_low": 0.2, "clip_high": 0.28}),
    "dr_grpo": Method("dr_grpo", {"clip": 0.2}),
    "disco": Method("disco", {"tau": 10.0, "delta": 1e-4, "beta": 1e3}),
    "gmpo": Method("gmpo", {"clip": 0.4}),
    "cispo": Method("cispo", {"ceiling": 5.0}),
    "sapo": Method("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
}
PRIMARY = ["conspo", "grpo"]  # the comparison that the study is for; the others are secondary
CAUSE = {
    "conspo": MAIN["conspo"],
    "conspo, trust region": Method("conspo", {**CONSTANTS, "trust_region": 0.2}),
    "conspo of ratios": Method("conspo_of_clipped_ratios", {**CONSTANTS, "clip": math.inf}),
    "conspo of clipped ratios": Method("conspo_of_clipped_ratios", {**CONSTANTS, "clip": 0.2}),
}
SENSITIVITY = {
    **{f"tau {tau:g}": Method("conspo", {**CONSTANTS, "tau": tau}) for tau in (0.1, 0.3, 1.0, 5.0, 20.0)},
    "linear": Method("linear_score_gap", {}),
    **{f"M {margin:g}": Method("conspo", {**CONSTANTS, "margin": margin}) for margin in (0.0, 0.05, 0.5)},
    **{f"alpha {alpha:g}": Method("conspo", {**CONSTANTS, "alpha": alpha}) for alpha in (0.1, 1.0)},
}
METHODS = MAIN | CAUSE | SENSITIVITY

# Part 0: (rate at which the warm-up was kept, whether on spoilt answers), and the factors of the weights.
STARTS = {"8 %": (0.08, False), "20 %": (0.2, False), "40 %": (0.4, False), "spoilt": (SPOILT, True)}
DIVERGENCE = 0.02  # nats per token
DIRECTION_SEEDS, DIRECTION_PROMPTS, DIRECTION_GROUP, DIRECTION_SEEN = tuple(range(10)), 32, 16, 16
GROUP_WEIGHTS = ("1", "sqrt(p(1-p))", "N/(N+1)")
CREDITS = ("flat", "10 nats", "3 spreads", "1 spread", "0.3 spreads")  # tau of the shares; the spread is of the scores
MARGINS = ("0", "0.01", "1 spread")
DIRECTIONS = [(weight, credit, "0") for weight in GROUP_WEIGHTS for credit in CREDITS] + [
    ("mean q", credit, margin) for credit in CREDITS[1:] for margin in MARGINS
]
CONSPO, GRPO, LINEAR = ("mean q", "10 nats", "0.01"), ("sqrt(p(1-p))", "flat", "0"), ("1", "flat", "0")

# Core-hours expected of each part, warm-ups in it, from pilots of one run: 11 s for a run of spell_backward, 20 s with
# repetition, 16 s for its warm-up, 20 s for the directions of a policy, 450 s for a run of smollm2, 75 s for a run of
# the sums and as much for its warm-up. Runs that an earlier part has are not counted again.
HOURS = {
    "directions": 0.15, "tuning": 0.3, "main": 0.3, "directions, more": 0.2, "cause": 1.2,
    "sensitivity": 0.4, "neighbours": 0.5, "pretrained": 1.2, "sums, tuning": 1.2, "sums": 1.7, "sums, neighbours": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run. Two parts that name the same run share it."""

    task: str
    method: str
    updates: str  # "mini-batches", "repetition" or "one update"
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/{self.updates}/{self.lr:g}/{self.seed}"


@dataclass(frozen=True)
class Start:
    """One policy of part 0, with all directions from it."""

    policy: str
    seed: int

    @property
    def name(self) -> str:
        return f"directions/{self.policy}/{self.seed}"


Unit = Run | Start
Results = Mapping[str, Mapping[str, Any]]  # records, by the names of their units


def unit_of(row: Mapping[str, Any]) -> Unit:
    return Run(**row["run"]) if "run" in row else Start(**row["start"])


def rate(k: int) -> float:
    return float(f"{FIRST_RATE * 2.0**k:.3g}")


def tuning_seeds(task: str) -> Sequence[int]:
    return TUNING_SEEDS[:2] if task == "long_sums" else TUNING_SEEDS


def seeds(task: str, method: str) -> Sequence[int]:
    return SEEDS[:8] if task == "long_sums" and method not in PRIMARY else SEEDS


def tuning(task: str, method: str, results: Results) -> tuple[list[Run], int | None]:
    """The tuning runs that can be named now, and the exponent of the best rate once it lies inside of the grid."""
    low, high = START_GRID[task]
    while True:
        runs = {
            k: [Run(task, method, "mini-batches", rate(k), seed) for seed in tuning_seeds(task)]
            for k in range(low, high + 1)
        }
        everything = list(itertools.chain(*runs.values()))
        if any(run.name not in results for run in everything):
            return everything, None
        best = max(runs, key=lambda k: (statistics.mean(results[run.name]["result"] for run in runs[k]), -k))
        if low < best < high:
            return everything, best
        low, high = min(low, best - 1), max(high, best + 1)


def finals(task: str, methods: Sequence[str], shifts: Sequence[int], results: Results) -> Iterator[Run]:
    """Seeds are the outer loop, so that what is there of them is there for every method."""
    best = {method: tuning(task, method, results)[1] for method in methods}
    for seed, method, shift in itertools.product(SEEDS, methods, shifts):
        k = best[method]
        if k is not None and seed in seeds(task, method):
            yield Run(task, method, "mini-batches", rate(k + shift), seed)


def cause(results: Results) -> Iterator[Run]:
    best = tuning("spell_backward", "conspo", results)[1]
    if best is None:
        return
    for shift, seed, updates in itertools.product((0, -1, 1), CAUSE_SEEDS, ("mini-batches", "repetition")):
        lr = rate(best + shift - (updates == "repetition"))
        yield from (Run("spell_backward", method, updates, lr, seed) for method in CAUSE)
        if updates == "repetition":
            yield Run("spell_backward", "grpo", updates, lr, seed)


def sensitivity(results: Results) -> Iterator[Run]:
    best = tuning("spell_backward", "conspo", results)[1]
    if best is not None:
        for seed, method in itertools.product(SEEDS, ("conspo", *SENSITIVITY)):
            yield Run("spell_backward", method, "mini-batches", rate(best), seed)


def planned(results: Results) -> dict[str, list[Unit]]:
    """Every unit that can be named now, in the order of the runs; what tuning decides is named once it has."""
    plan: dict[str, list[Unit]] = {}
    starts: list[Unit] = [Start(policy, seed) for seed in DIRECTION_SEEDS for policy in STARTS]
    first = 4 * len(STARTS)  # seeds are the outer loop
    plan["directions"] = starts[:first]
    task = "spell_backward"
    plan["tuning"] = [run for method in MAIN for run in tuning(task, method, results)[0]]
    plan["main"] = list(finals(task, list(MAIN), (0,), results))
    plan["cause"] = list(cause(results))
    plan["directions, more"] = starts[first:]
    plan["sensitivity"] = list(sensitivity(results))
    plan["neighbours"] = list(finals(task, list(MAIN), (-1, 1), results))
    plan["pretrained"] = [
        Run("smollm2", method, "one update", 2e-5, seed)
        for seed in PRETRAINED_SEEDS
        for method in ("conspo", "grpo", "disco")
    ]
    task = "long_sums"
    plan["sums, tuning"] = [run for method in MAIN for run in tuning(task, method, results)[0]]
    plan["sums"] = list(finals(task, list(MAIN), (0,), results))
    plan["sums, neighbours"] = list(finals(task, PRIMARY, (-1, 1), results))
    return plan


def parameters(unit: Unit) -> dict[str, Any]:
    """A unit as a record has it."""
    return {"run" if isinstance(unit, Run) else "start": asdict(unit)}
