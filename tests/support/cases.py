"""The cases that every implementation runs, named by what they are there for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")
IGNORE = -100
SHARP = 1.0  # tau where a case names none: at the default of 10 weights would hardly depend on scores


@dataclass(frozen=True)
class Case:
    """lengths: tokens per rollout.  prompts: leading tokens per rollout that are ignored.  scale: of normal logits."""

    name: str
    lengths: tuple[int, ...]
    vocab_size: int
    rewards: tuple[float, ...] | tuple[bool, ...]
    groups: int | tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    prompts: tuple[int, ...] = ()
    scale: float = 2.0
    masked_columns: int = 0  # leading vocabulary entries at -inf
    shift: bool = False
    mask: bool = False  # prompts are under a mask, their labels nonsense, rather than at ignore_index

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


@dataclass(frozen=True)
class Inputs:
    """What a public function takes: logits (a leaf), then the other arguments."""

    logits: Tensor
    labels: Tensor
    rewards: Tensor
    groups: int | Tensor
    kwargs: dict[str, Any]


CASES = (
    Case("two groups", (5, 3, 7, 2, 4, 4, 1, 6), 64, (1, 0, 0, 1, 0, 1, 1, 1), 4, {"margin": 0.3}),
    Case("prime vocabulary", (3, 4, 2, 5), 251, (0, 1, 1, 0), 4, {"tau": 0.3}, prompts=(1, 0, 1, 2)),
    Case("tail block", (2, 2), 4096 + 8 + 3, (1, 0), 2),
    Case("two chunks and edges", (1, 1), 32768 + 4096 + 13, (1, 0), 2),
    Case("one logit", (3, 2), 1, (1, 0), 2, {"margin": 0.5}),
    Case("fewer logits than a vector", (3, 2, 3, 2), 3, (1, 0, 0, 1), 4),
    Case("one-token rollouts", (1, 1, 1, 1), 40, (1, 0, 1, 0), 2, {"tau": 0.1}),
    Case("an all-positive and an all-negative group", (2,) * 6, 16, (1, 1, 1, 0, 0, 0), 2),
    Case("no valid group", (2,) * 4, 16, (1, 1, 0, 0), 2),
    Case("everything ignored", (2, 3), 16, (1, 0), 2, prompts=(2, 3)),
    Case("an empty rollout", (2, 3, 2, 4), 16, (1, 0, 0, 1), 4, prompts=(0, 3, 0, 0)),
    Case("a group that an empty rollout leaves without a negative", (2, 3, 2, 4), 16, (1, 0, 0, 1), 2, prompts=(0, 3)),
    Case("NaN rewards", (2, 3, 2, 4, 2), 16, (1, 0, NAN, NAN, 1), (0, 0, 0, 1, 1)),
    Case("ragged groups in any order", (3, 1, 2, 4, 2, 3, 1), 24, (1, 0, 1, 0, 1, 1, 0), (7, -3, 7, -3, -3, 9, 7)),
    Case("bool rewards", (2, 3, 2, 4), 16, (True, False, False, True), 2),
    Case("a threshold", (2, 3, 2, 4), 16, (0.01, 1.0, 0.1, 0.01), 4, {"reward_threshold": 0.01}),
    Case("the paper's constants", (5, 3, 7, 2, 4, 4), 64, (1, 0, 0, 1, 0, 1), 3, {"tau": 10.0, "margin": 0.01}),
    Case("temperature", (4, 3), 33, (1, 0), 2, {"temperature": 0.7}),
    Case("softcap", (4, 3), 33, (1, 0), 2, {"softcap": 3.0, "temperature": 1.3}, scale=6.0),
    Case("logit scale and softcap", (4, 3), 520, (0, 1), 2, {"logit_scale": 0.25, "softcap": 2.0}, scale=8.0),
    Case("logit scale", (4, 3), 520, (0, 1), 2, {"logit_scale": 0.0625}, scale=20.0),
    Case("sum", (2,) * 6, 16, (1, 0, 1, 0, 0, 0), 2, {"reduction": "sum"}),
    Case("none", (2,) * 6, 16, (1, 0, 1, 0, 0, 0), 2, {"reduction": "none"}),
    Case("none, ragged", (2,) * 6, 16, (1, 0, 1, 0, 0, 0), (5, 2, 2, 2, 5, 8), {"reduction": "none"}),
    Case("num_groups", (2,) * 6, 16, (1, 0, 1, 0, 0, 0), 2, {"num_groups": 5}),
    Case("large logits", (3, 3), 50, (1, 0), 2, scale=1e4),
    Case("masked vocabulary", (3, 3, 2, 2), 4104, (1, 0, 0, 1), 2, masked_columns=4000),
    Case("masked vocabulary under a softcap", (3, 3), 70, (1, 0), 2, {"softcap": 5.0}, masked_columns=20),
    Case("shift", (4, 3, 5, 1), 19, (1, 0, 0, 1), 2, shift=True, prompts=(1, 1, 2)),
    Case("mask", (4, 3, 5, 2), 19, (1, 0, 0, 1), 2, mask=True, prompts=(1, 1, 2)),
    Case("shift and mask", (4, 3, 5, 2), 19, (1, 0, 0, 1), 4, shift=True, mask=True, prompts=(2, 1, 3)),
    Case("another ignore_index", (4, 3, 5, 2), 19, (1, 0, 0, 1), 4, {"ignore_index": 0}, prompts=(2, 1, 3)),
)

# More groups, and more rollouts in one, than a tile of the objective's kernel holds; slow to interpret.
MANY_ROLLOUTS = (
    Case("one group of forty", (2,) * 40, 8, (1, 0, 0, 1, 0) * 8, 40, {"tau": 0.2, "margin": 1.0}),
    Case("forty groups", (1,) * 80, 8, (1, 0) * 40, 2),
)


def build(case: Case, dtype: torch.dtype, *, packed: bool, device: torch.device | str = "cpu") -> Inputs:
    """The same tokens padded or packed. Padding and what lies past the last offset hold nonsense."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    ignore_index = case.options.get("ignore_index", IGNORE)
    low = max(case.masked_columns, int(ignore_index == 0 and case.vocab_size > 1))
    prompts = case.prompts + (0,) * (len(case.lengths) - len(case.prompts))
    rows = [
        torch.randn(n, case.vocab_size, generator=generator, dtype=torch.float64) * case.scale for n in case.lengths
    ]
    labels = [torch.randint(low, case.vocab_size, (n,), generator=generator) for n in case.lengths]
    masks = [torch.arange(n) >= prompt for n, prompt in zip(case.lengths, prompts, strict=True)]
    for row, label, keep in zip(rows, labels, masks, strict=True):
        row[:, : case.masked_columns] = -torch.inf
        label[~keep] = 10**6 if case.mask else ignore_index

    longest = max(case.lengths)
    pads = [3] if packed else [longest - n for n in case.lengths]

    def joined(parts: list[Tensor], fill: float) -> Tensor:
        if packed:
            return torch.cat([*parts, parts[0].new_full((3, *parts[0].shape[1:]), fill)])
        return torch.stack(
            [
                torch.cat([part, part.new_full((pad, *part.shape[1:]), fill)])
                for part, pad in zip(parts, pads, strict=True)
            ]
        )

    # What lies past the last offset is nobody's business, so its labels may be nonsense; padding is not.
    filler = 10**6 if packed or case.mask else ignore_index
    options = {"tau": SHARP, **case.options}
    if case.shift:
        options["shift"] = True
    if case.mask:
        options["response_mask"] = joined(masks, False).to(device)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    rewards = torch.tensor(case.rewards)
    if rewards.dtype == torch.int64 and len(case.lengths) % 2 == 0:
        rewards = rewards.float()
    groups = case.groups if isinstance(case.groups, int) else torch.tensor(case.groups)
    logits = joined(rows, 0.5).to(device, dtype).requires_grad_(True)
    return Inputs(logits, joined(labels, filler).to(device), rewards, groups, options)


def eager_logprobs(inputs: Inputs) -> Tensor:
    """Log-probabilities of all entries as users write them in PyTorch, in the dtype of the logits."""
    options = inputs.kwargs
    z = inputs.logits * options.get("logit_scale", 1.0)
    if (softcap := options.get("softcap")) is not None:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return torch.log_softmax(z / options.get("temperature", 1.0), dim=-1)
