"""How much credit a rollout gets, against its score: GRPO beside ConSPO. Computed from the objectives, not trained.

One group of eight rollouts, two of them right, at the parameters that sampled them (all ratios are 1). The credit of a
rollout is -dloss/ds, s its mean log-probability: what its tokens are pushed by, up or down. Left, one right rollout
moves while all others stay; right, one wrong rollout moves. GRPO's credit is the same wherever it is; ConSPO's follows
the gap, the more sharply the smaller tau is. At the paper's tau of 10 it is nearly flat.

    python examples/credit.py --out docs/pictures/credit.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from demo.records import replace_atomically
from matplotlib.figure import Figure
from objectives import coefficients, conspo, grpo
from torch import Tensor

GROUP, RIGHT = 8, 2
OTHERS = -1.0  # score of the rollouts that stay, nats per token
REWARDS = torch.tensor([1.0] * RIGHT + [0.0] * (GROUP - RIGHT), dtype=torch.float64)
GAPS = torch.linspace(-2, 3, 201, dtype=torch.float64)  # score of the one that moves minus that of the others
PAPER = {"tau": 10.0, "margin": 0.01}  # arXiv:2605.12969, section 5.1
CURVES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "GRPO": (grpo, {}),
    "ConSPO, tau 10 (the paper's)": (conspo, PAPER),
    "ConSPO, tau 1": (conspo, {**PAPER, "tau": 1.0}),
    "ConSPO, tau 0.3": (conspo, {**PAPER, "tau": 0.3}),
    "ConSPO, tau 0.1": (conspo, {**PAPER, "tau": 0.1}),
}


def credit(objective: Callable[..., Tensor], constants: dict[str, float], mover: int) -> Tensor:
    """-dloss/ds of the rollout that moves, for each of GAPS.

    Every rollout has one token, so its score is the token's log-probability; each gap is a group of its own, and the
    mean over groups is taken back.
    """
    scores = torch.full((len(GAPS), GROUP), OTHERS, dtype=torch.float64)
    scores[:, mover] += GAPS
    logprobs = scores.view(-1, 1)
    _loss, gradient = coefficients(
        objective, logprobs, logprobs, torch.ones_like(logprobs), REWARDS.repeat(len(GAPS)), GROUP, **constants
    )
    return -gradient.view(len(GAPS), GROUP)[:, mover] * len(GAPS)


def draw() -> Figure:
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")  # not pyplot's: there may be no display
    axes = figure.subplots(1, 2)
    moves = ((0, "a right rollout moves"), (RIGHT, "a wrong rollout moves"))
    for (mover, title), ax in zip(moves, axes, strict=True):
        # scores of a group deviate by less than a nat
        ax.axvspan(-1, 1, color="0.94", linewidth=0, zorder=-2)
        for color, (name, (objective, constants)) in enumerate(CURVES.items()):
            style, width = "--" if name == "GRPO" else "-", 3.0 if constants == PAPER else 1.6
            ax.plot(GAPS, credit(objective, constants, mover), style, color=f"C{color}", linewidth=width, label=name)
        ax.axhline(0, color="0.7", linewidth=0.8, zorder=-1)
        ax.set_xlim(GAPS[0].item(), GAPS[-1].item())
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title)
        ax.set_xlabel("its score minus that of the others (nats per token)")
        ax.set_ylabel("credit, -dloss/dscore")
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/credit.svg"), help="the picture, SVG or PNG")
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(out, lambda temporary: draw().savefig(temporary, dpi=120, metadata={"Date": None}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
