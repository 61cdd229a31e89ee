"""Group InfoNCE on scores, loss and weights, in Triton: one launch for few rollouts, two for many.

The mean needs the number of valid groups before the first weight is known. Up to `FEW` rollouts one program walks tiles
of GROUPS groups x MEMBERS rollouts, first to count the valid groups, then for losses and weights; tiles stay in the
first-level cache between the walks. More rollouts would make it wait for one tile after another: there each program has
one tile of groups, and leaves the sum of its losses and the number of its valid groups; a second launch adds these up,
in a fixed order, and divides. The equations and the names are those of `objective.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...objective import Objective, Rollouts
from .direct import kernel
from .launch import FUSED, ceil_div, family, registers
from .softmax import NEG_INF, finite_max

MEMBERS = tl.constexpr(16)
GROUPS = tl.constexpr(16)
FEW = 1024  # rollouts: four tiles, of which a program reads each four times
LAUNCH: dict[str, Any] = {"num_warps": 8, **FUSED}
# ptxas, which does not know that there are few programs, would rather use a stack than have fewer at a time.
REGISTERS = 64
BLOCK = tl.constexpr(1024)  # of the second launch, rollouts per program
UNSPECIALIZED = ("num_rollouts", "num_groups", "group_size", "num_programs")
# A user's slice begins anywhere.
UNALIGNED = ("scores_ptr", "rewards_ptr", "counts_ptr", "margin_ptr", "denominator_ptr")


@triton.jit
def _extent(k0, groups):
    """Start and stop of the groups k0 .. k0 + GROUPS; empty past the last one."""
    offsets_ptr, num_groups, group_size = groups
    k = k0 + tl.arange(0, GROUPS)
    mask = k < num_groups
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + k, mask=mask, other=0)
        stop = tl.load(offsets_ptr + k + 1, mask=mask, other=0)
    else:
        start = tl.where(mask, k * group_size, 0)
        stop = tl.where(mask, start + group_size, 0)
    return start, stop


@triton.jit
def _any_left(k0, num_rollouts, groups):
    """Whether there are rollouts in group k0 or later: trailing ragged groups are empty."""
    offsets_ptr, num_groups, _group_size = groups
    if offsets_ptr is not None:
        return tl.load(offsets_ptr + tl.minimum(k0, num_groups)) < num_rollouts
    else:
        return k0 < num_groups


@triton.jit
def _members(start, stop, j, rollouts):
    """Members j .. j + MEMBERS of each group: rollout, whether there is one, score, positive, negative."""
    order_ptr, scores_ptr, rewards_ptr, counts_ptr, threshold = rollouts
    position = start[:, None] + (j + tl.arange(0, MEMBERS))[None, :]
    inside = position < stop[:, None]
    rollout = position
    if order_ptr is not None:
        rollout = tl.load(order_ptr + position, mask=inside, other=0)
    score = tl.load(scores_ptr + rollout, mask=inside, other=0.0)
    reward = tl.load(rewards_ptr + rollout, mask=inside, other=0)
    if reward.dtype.is_floating():
        scorable = inside & (reward == reward)
    else:
        scorable = inside
        reward = reward.to(tl.float32)
    # As PyTorch compares: in the dtype of the rewards, in fp32 where they are integers.
    positive = reward > threshold.to(reward.dtype)
    scorable = scorable & (tl.load(counts_ptr + rollout, mask=inside, other=0) > 0)
    return rollout, inside, score, scorable & positive, scorable & (positive == 0)


@triton.jit
def _softplus(x):
    """log(1 + e^x) with log1p spelled out: tl has none, and log(1 + e) alone loses a well separated positive's loss."""
    e = tl.exp(-tl.abs(x))
    one_plus = 1 + e
    inexact = one_plus != 1
    log1p = tl.where(inexact, tl.log(one_plus) * (e / tl.where(inexact, one_plus - 1, 1)), e)
    return tl.maximum(x, 0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1 / (1 + e), e / (1 + e))


@triton.jit
def _negatives(start, stop, rollouts, tau):
    """Of each group: how many positives, whether it is valid, and the (max, sum) of exp(s / tau) over its negatives."""
    num_positive = tl.zeros((GROUPS,), tl.int32)
    num_negative = tl.zeros((GROUPS,), tl.int32)
    peak = tl.full((GROUPS,), NEG_INF, tau.dtype)
    total = tl.zeros((GROUPS,), tau.dtype)
    for j in range(0, tl.max(stop - start), MEMBERS):
        _rollout, _inside, score, positive, negative = _members(start, stop, j, rollouts)
        num_positive += tl.sum(positive.to(tl.int32), axis=1)
        num_negative += tl.sum(negative.to(tl.int32), axis=1)
        z = tl.where(negative, score / tau, NEG_INF)
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        base = finite_max(new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = new_peak
    return num_positive, (num_positive > 0) & (num_negative > 0), finite_max(peak), total


@triton.jit
def _positives(start, stop, lse, margin, rollouts, tau):
    """Of each group: the sums of softplus(x_i) and of q_i over its positives."""
    sum_softplus = tl.zeros_like(lse)
    sum_q = tl.zeros_like(lse)
    for j in range(0, tl.max(stop - start), MEMBERS):
        _rollout, _inside, score, positive, _negative = _members(start, stop, j, rollouts)
        x = lse[:, None] - (score - margin) / tau
        sum_softplus += tl.sum(tl.where(positive, _softplus(x), tl.zeros_like(x)), axis=1)
        sum_q += tl.sum(tl.where(positive, _sigmoid(x), tl.zeros_like(x)), axis=1)
    return sum_softplus, sum_q


@triton.jit
def _number(ptr, value, acc: tl.constexpr):
    """A number: read from the device, or passed by the host that knew it."""
    if ptr is not None:
        return tl.load(ptr).to(acc)
    else:
        return tl.full((), value, tl.float64).to(acc)


@triton.jit
def _count_valid(num_rollouts, rollouts, groups, tau):
    num_valid = tl.zeros((GROUPS,), tl.int32)
    k0 = num_rollouts * 0  # a 0 of its type, which a loop variable has to keep
    while _any_left(k0, num_rollouts, groups):
        start, stop = _extent(k0, groups)
        _num_positive, valid, _peak, _total = _negatives(start, stop, rollouts, tau)
        num_valid += valid.to(tl.int32)
        k0 += GROUPS
    return tl.sum(num_valid)


@triton.jit
def _tile(k0, rollouts, groups, loss_ptr, weights_ptr, margin, tau, denominator, REDUCTION: tl.constexpr):
    """Weights of the groups k0 .. k0 + GROUPS; their losses, and which are valid."""
    acc: tl.constexpr = tau.dtype
    start, stop = _extent(k0, groups)
    num_positive, valid, peak, total = _negatives(start, stop, rollouts, tau)
    lse = peak + tl.log(total)
    per_positive = 1 / tl.maximum(num_positive, 1).to(acc)

    sum_softplus, sum_q = _positives(start, stop, lse, margin, rollouts, tau)
    group_loss = tl.where(valid, tau * per_positive * sum_softplus, tl.zeros_like(peak))
    if REDUCTION == "none":
        k = k0 + tl.arange(0, GROUPS)
        tl.store(loss_ptr + k, group_loss, mask=k < groups[1])

    pull = sum_q * per_positive / tl.where(total > 0, total, tl.full((), 1, acc))
    for j in range(0, tl.max(stop - start), MEMBERS):
        rollout, inside, score, positive, negative = _members(start, stop, j, rollouts)
        q = _sigmoid(lse[:, None] - (score - margin) / tau)
        odds = tl.exp(score / tau - peak[:, None])
        weight = tl.where(positive, -q * per_positive[:, None], pull[:, None] * odds)
        takes_part = valid[:, None] & (positive | negative)
        tl.store(weights_ptr + rollout, tl.where(takes_part, weight / denominator, 0), mask=inside)
    return group_loss, valid


# Reads scores, rewards and counts a few times, from the cache after the first; writes a number per rollout, and with
# several programs 2 per program.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _kernel(
    scores_ptr, rewards_ptr, counts_ptr, order_ptr, offsets_ptr, margin_ptr, denominator_ptr, loss_ptr, weights_ptr,
    partial_ptr,
    num_rollouts: tl.int64, num_groups: tl.int64, group_size: tl.int64, margin: tl.float64, denominator: tl.float64,
    tau: tl.float64, threshold: tl.float64,
    DENOMINATOR: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = scores_ptr.dtype.element_ty
    tau = tl.full((), tau, acc)
    margin = _number(margin_ptr, margin, acc)
    one = tl.full((), 1, acc)
    rollouts = (order_ptr, scores_ptr, rewards_ptr, counts_ptr, tl.full((), threshold, tl.float64))
    groups = (offsets_ptr, num_groups, group_size)

    if partial_ptr is not None:
        program = tl.program_id(0).to(tl.int64)
        group_loss, valid = _tile(
            program * GROUPS, rollouts, groups, loss_ptr, weights_ptr, margin, tau, one, REDUCTION
        )
        tl.store(partial_ptr + 2 * program, tl.sum(group_loss))
        tl.store(partial_ptr + 2 * program + 1, tl.sum(valid.to(tl.int32)).to(acc))
    else:
        if DENOMINATOR == "given":
            divisor = _number(denominator_ptr, denominator, acc)
        elif DENOMINATOR == "valid":
            divisor = tl.maximum(_count_valid(num_rollouts, rollouts, groups, tau), 1).to(acc)
        else:
            divisor = one
        loss = tl.zeros((GROUPS,), acc)
        k0 = num_groups * 0
        while _any_left(k0, num_rollouts, groups):
            group_loss, _valid = _tile(k0, rollouts, groups, loss_ptr, weights_ptr, margin, tau, divisor, REDUCTION)
            loss += group_loss
            k0 += GROUPS
        if REDUCTION != "none":
            tl.store(loss_ptr, tl.sum(loss) / divisor)


# Reads 2 numbers per program of the first launch, reads and writes one per rollout.
@kernel(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def _reduce_kernel(
    partial_ptr, denominator_ptr, loss_ptr, weights_ptr,
    num_rollouts: tl.int64, num_programs: tl.int64, denominator: tl.float64,
    DENOMINATOR: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = weights_ptr.dtype.element_ty
    loss, num_valid = tl.zeros((BLOCK,), acc), tl.zeros((BLOCK,), acc)
    start = num_programs * 0
    while start < num_programs:
        program = start + tl.arange(0, BLOCK)
        loss += tl.load(partial_ptr + 2 * program, mask=program < num_programs, other=0.0)
        num_valid += tl.load(partial_ptr + 2 * program + 1, mask=program < num_programs, other=0.0)
        start += BLOCK
    if DENOMINATOR == "given":
        divisor = _number(denominator_ptr, denominator, acc)
    elif DENOMINATOR == "valid":
        divisor = tl.maximum(tl.sum(num_valid), 1)
    else:
        divisor = tl.full((), 1, acc)
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, tl.sum(loss) / divisor)
    rollouts = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(weights_ptr + rollouts, mask=rollouts < num_rollouts, other=0.0)
    tl.store(weights_ptr + rollouts, weights / divisor, mask=rollouts < num_rollouts)


def infonce(scores: Tensor, counts: Tensor, rollouts: Rollouts, objective: Objective) -> tuple[Tensor, Tensor]:
    """Loss and weights of scores [S]."""
    rewards, groups = rollouts
    num_rollouts = scores.numel()
    num_groups = num_rollouts // groups.size if groups.offsets is None else groups.offsets.numel() - 1
    # Trailing ragged groups are empty, and are never visited by one program: hence zeros.
    loss = scores.new_zeros(num_groups) if objective.reduction == "none" else scores.new_empty(())
    weights = torch.empty_like(scores)
    num_programs = 1 if num_rollouts <= FEW else ceil_div(num_groups, GROUPS.value)
    partial = scores.new_empty(2 * num_programs) if num_programs > 1 else None
    divided_by = "one"
    if objective.reduction == "mean":
        divided_by = "valid" if objective.num_groups is None else "given"
    margin_ptr, margin = _pointer_or_number(objective.margin)
    denominator_ptr, denominator = _pointer_or_number(objective.num_groups)
    numbers = (margin, denominator, objective.tau, objective.reward_threshold)
    options = {"DENOMINATOR": divided_by, **LAUNCH}
    _kernel[(num_programs,)](
        scores, rewards, counts, groups.order, groups.offsets, margin_ptr, denominator_ptr, loss, weights, partial,
        num_rollouts, num_groups, groups.size, *numbers, REDUCTION=objective.reduction, **options,
        **registers(REGISTERS, family(scores.device)),
    )  # fmt: skip
    if partial is not None and objective.reduction != "none":
        _reduce_kernel[(ceil_div(num_rollouts, BLOCK.value),)](
            partial, denominator_ptr, loss, weights, num_rollouts, num_programs, denominator, **options
        )
    return loss, weights


def _pointer_or_number(x: Tensor | None) -> tuple[Tensor | None, float]:
    """(tensor, 0) for a 0-d tensor on the device, (None, number) for one that the host can read."""
    if x is None:
        return None, 0.0
    return (None, float(x.item())) if x.is_cpu else (x, 0.0)
