"""Keyword arguments that public functions share, for the type checker: overloads take them as `**options`.

The functions themselves spell their arguments out; a test holds the two together.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from .parallel import Parallel


class TokenOptions(TypedDict, total=False):
    """Which tokens count, the transform of their logits, and the implementation."""

    cu_seqlens: Tensor | None
    response_mask: Tensor | None
    shift: bool
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    parallel: Parallel | None
    implementation: str


class HeadOptions(TypedDict, total=False):
    """Options of every linear function."""

    bias: Tensor | None
    workspace_mib: float | None
    weight_grad: Tensor | None
    logits_dtype: torch.dtype | None
    synchronize: bool


class GraphHeadOptions(HeadOptions, total=False):
    """Options of linear functions whose backward computes the gradient."""

    batch_invariant: bool


class ObjectiveOptions(TypedDict, total=False):
    """The objective on scores."""

    tau: float
    margin: float | Tensor
    reward_threshold: float
    reduction: str
    num_groups: float | Tensor | None


class ScoreOptions(ObjectiveOptions, total=False):
    """Of losses from scores."""

    parallel: Parallel | None
    implementation: str


class LossOptions(TokenOptions, ObjectiveOptions, total=False):
    """Of `conspo_loss`."""

    inplace_backward: bool


class LinearLossOptions(TokenOptions, ObjectiveOptions, GraphHeadOptions, total=False):
    """Of `linear_conspo_loss`."""


class LogprobOptions(TokenOptions, total=False):
    """Of `token_logprobs`."""

    inplace_backward: bool


class LinearLogprobOptions(TokenOptions, GraphHeadOptions, total=False):
    """Of `linear_token_logprobs`."""


class WeightedOptions(TokenOptions, total=False):
    """Of `weighted_score_loss`."""

    inplace: bool
    scores: Tensor | None


class LinearWeightedOptions(TokenOptions, HeadOptions, total=False):
    """Of `linear_weighted_score_loss`."""

    scores: Tensor | None
