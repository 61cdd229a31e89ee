"""Differences over seeds: intervals, the paired permutation test, Holm's correction."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from .protocol import Results, Run

# 97.5 % quantiles of Student's t by degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


def values(results: Results, runs: Sequence[Run]) -> dict[int, float]:
    """Results of the runs that are there, by seed."""
    return {run.seed: results[run.name]["result"] for run in runs if run.name in results}


def complete(results: Results, runs: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    """By name, the runs of the seeds of which none is missing; no runs at all while a name has none planned."""
    missing = {run.seed for some in runs.values() for run in some if run.name not in results}
    planned = all(runs.values())
    return {name: [run for run in some if planned and run.seed not in missing] for name, some in runs.items()}


def paired(results: Results, runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """runs - others, over the seeds that both have."""
    left, right = values(results, runs), values(results, others)
    return [left[seed] - right[seed] for seed in left if seed in right]


def half_width(differences: Sequence[float]) -> float:
    """Of the mean's 95 % interval, by Student's t; infinite for one value."""
    if len(differences) < 2:
        return float("inf")
    return STUDENT[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** 0.5


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation test: all 2^n signs of the differences are alike under no effect."""
    observed = abs(sum(differences)) * (1 - 1e-12)  # its own signs count, whatever the order of the sum
    totals = (sum(signed) for signed in itertools.product(*((d, -d) for d in differences)))
    return sum(abs(total) >= observed for total in totals) / 2 ** len(differences)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p corrected for the number of tests, stepping down from the smallest."""
    adjusted, so_far = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        so_far = max(so_far, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = so_far
    return adjusted
