"""Arguments of every public function, drawn at random: right ones of all kinds, and right ones with something changed.

Right arguments are small, lie in memory in every way that is allowed, and hold what a training loop may hold: masked
vocabulary entries, NaN rewards, empty rollouts, nonsense under masks. A change replaces one argument, by the same
tensor bent (another shape, dtype, device, layout or values) or by something that is none of its kind at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Arguments = dict[str, Any]
IGNORE_INDICES = (-100, -1, 0, 2, 2**40)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOATS, *INTEGERS, *NARROW, torch.bool, torch.complex64)
POSITIVE = st.sampled_from([1.0, 0.5, 0.05, 3.0, 1, 7, 1e-9, 1e9, 2.0**-30, 2.0**30, np.float64(0.7)])


def placed(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values elsewhere: a slice of something longer, transposed, off an alignment, or one row for all."""
    place = draw(st.sampled_from(["as it is", "sliced", "offset", "transposed", "one row"]))
    if x.dim() == 0 or x.numel() == 0:
        return x
    if place == "sliced":
        return torch.stack([torch.ones_like(x), x, torch.ones_like(x)], 0)[1]
    if place == "offset":
        return torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape)
    if place == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if place == "transposed" and x.dim() == 1:
        return torch.stack([x, torch.ones_like(x)], 1)[:, 0]
    if place == "one row":
        return x[:1].expand_as(x)
    return x


@st.composite
def packed_tokens(draw: st.DrawFn) -> Arguments:
    """labels, and how they are cut into rollouts: padded, or packed with some rows past the last offset."""
    packed = draw(st.sampled_from(["no", "[N]", "[1, N]"]))
    dtype = draw(st.sampled_from(INTEGERS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    arguments: Arguments = {}
    if packed == "no":
        shape: tuple[int, ...] = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    else:
        lengths = draw(st.lists(st.integers(0, 3), max_size=4))
        shape = (sum(lengths) + draw(st.integers(0, 2)),)
        shape = shape if packed == "[N]" else (1, *shape)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        arguments["cu_seqlens"] = placed(draw, offsets) if len(lengths) == 0 else offsets
        arguments["cu_seqlens"] = arguments["cu_seqlens"].to(draw(st.sampled_from([torch.int32, torch.int64])))
    labels = torch.randint(0, 3, shape, generator=generator)
    ignore_index = draw(st.sampled_from(IGNORE_INDICES))
    if ignore_index >= -128 and ignore_index < 128 and dtype != torch.uint8:
        labels[torch.rand(shape, generator=generator) < 0.2] = ignore_index
    if draw(st.booleans()):
        keep = torch.rand(shape, generator=generator) < 0.7
        labels[~keep] = 99
        arguments["response_mask"] = placed(draw, keep).to(draw(st.sampled_from(DTYPES[:-1])))
        labels[arguments["response_mask"] != 0] %= 3  # placing may have moved the mask
    arguments |= {"labels": labels.to(dtype), "shift": draw(st.booleans()), "ignore_index": ignore_index}
    return arguments


@st.composite
def tokens(draw: st.DrawFn) -> Arguments:
    """logits, labels, and how to read them."""
    arguments = draw(packed_tokens())
    shape = (*arguments["labels"].shape, draw(st.sampled_from([3, 4, 8, 13])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    logits[..., 3:][torch.rand(shape, generator=generator)[..., 3:] < 0.2] = -math.inf  # labels are below 3
    logits = placed(draw, logits.to(draw(st.sampled_from(FLOATS))))
    if draw(st.booleans()):
        logits = logits.detach().requires_grad_()
        if draw(st.booleans()):
            logits, arguments["inplace_backward"] = logits * 1, True
    arguments |= {"logits": logits, "temperature": draw(POSITIVE), "logit_scale": draw(POSITIVE)}
    if draw(st.booleans()):
        arguments["softcap"] = draw(POSITIVE)
    return arguments


@st.composite
def contrast(draw: st.DrawFn, num_rollouts: int) -> Arguments:
    """Rewards, groups, and the settings of the objective."""
    values = st.sampled_from([0.0, 1.0, 0.25, math.nan])
    rewards = torch.tensor(draw(st.lists(values, min_size=num_rollouts, max_size=num_rollouts)))
    dtype = draw(st.sampled_from((*FLOATS, *INTEGERS, torch.bool, torch.uint16, torch.uint64)))
    rewards = placed(draw, (rewards if dtype.is_floating_point else rewards.nan_to_num(nan=1.0)).to(dtype))
    groups: int | Tensor = draw(st.sampled_from([n for n in (1, 2, 3, 4) if num_rollouts % n == 0]))
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, 2), min_size=num_rollouts, max_size=num_rollouts))
        groups = placed(draw, torch.tensor(ids, dtype=draw(st.sampled_from(INTEGERS))))
    arguments: Arguments = {
        "rewards": rewards,
        "groups": groups,
        "tau": draw(POSITIVE),
        "margin": draw(st.sampled_from([0.0, 0.3, -2, 1e9, -1e9, torch.tensor(0.25), torch.tensor(2)])),
        "reward_threshold": draw(st.sampled_from([0.5, 0.0, -1, math.inf, -math.inf, 1e300])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "return_metrics": draw(st.booleans()),
    }
    if arguments["reduction"] == "mean" and draw(st.booleans()):
        arguments["num_groups"] = draw(st.one_of(POSITIVE, st.sampled_from([torch.tensor(3), torch.tensor(0.5)])))
    return arguments


@st.composite
def loss_arguments(draw: st.DrawFn) -> Arguments:
    arguments = draw(tokens())
    offsets = arguments.get("cu_seqlens")
    num_rollouts = len(arguments["labels"]) if offsets is None else len(offsets) - 1
    return arguments | draw(contrast(num_rollouts))


@st.composite
def headed(draw: st.DrawFn, arguments: Arguments) -> Arguments:
    """Hidden states and a head in place of the logits."""
    logits = arguments.pop("logits")
    arguments.pop("inplace_backward", None)
    hidden_size, dtype = draw(st.sampled_from([1, 2, 5])), logits.dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(*size: int) -> Tensor:
        x = placed(draw, torch.randn(size, generator=generator).to(dtype)).detach()
        return x.requires_grad_(logits.requires_grad and draw(st.booleans()))

    hidden = tensor(*logits.shape[:-1], hidden_size).detach().requires_grad_(logits.requires_grad)
    arguments |= {"hidden": hidden, "weight": tensor(logits.shape[-1], hidden_size)}
    if draw(st.booleans()):
        arguments["bias"] = tensor(logits.shape[-1])
    arguments["workspace_mib"] = draw(st.sampled_from([512, 1e-4, 2.0**-30, 2.0**30]))
    return arguments


@st.composite
def linear_loss_arguments(draw: st.DrawFn) -> Arguments:
    return draw(headed(draw(loss_arguments())))


@st.composite
def linear_logprob_arguments(draw: st.DrawFn) -> Arguments:
    return draw(headed(draw(logprob_arguments())))


def weighted(draw: st.DrawFn, arguments: Arguments) -> Arguments:
    """Weights of the rollouts, as phase 2 takes them; `inplace` for `inplace_backward`."""
    offsets = arguments.get("cu_seqlens")
    num_rollouts = len(arguments["labels"]) if offsets is None else len(offsets) - 1
    values = draw(st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=num_rollouts, max_size=num_rollouts))
    arguments["weights"] = placed(draw, torch.tensor(values)).to(draw(st.sampled_from(FLOATS)))
    if arguments.pop("inplace_backward", False):
        arguments["inplace"] = True
    return arguments


@st.composite
def phase_two_arguments(draw: st.DrawFn) -> Arguments:
    return weighted(draw, draw(tokens()))


@st.composite
def linear_phase_two_arguments(draw: st.DrawFn) -> Arguments:
    return weighted(draw, draw(headed(draw(tokens()))))


@st.composite
def logprob_arguments(draw: st.DrawFn) -> Arguments:
    arguments = draw(tokens())
    if not arguments["shift"] and draw(st.booleans()):
        arguments.pop("cu_seqlens", None)  # then all rows count
        arguments["labels"] = (
            arguments["labels"].clamp(0, 2) if "response_mask" not in arguments else arguments["labels"]
        )
    arguments["return_entropy"] = draw(st.booleans())
    return arguments


@st.composite
def phase_one_arguments(draw: st.DrawFn) -> Arguments:
    arguments = draw(tokens())
    arguments.pop("inplace_backward", None)
    return arguments


@st.composite
def sequence_arguments(draw: st.DrawFn) -> Arguments:
    arguments = draw(packed_tokens())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logprobs = -torch.rand(arguments["labels"].shape, generator=generator) * draw(st.sampled_from([1.0, 1e4]))
    return arguments | {"logprobs": placed(draw, logprobs.to(draw(st.sampled_from(FLOATS)))).requires_grad_()}


@st.composite
def score_arguments(draw: st.DrawFn) -> Arguments:
    values = st.sampled_from([-1.0, -1.5, -30.0, 0.0, -0.01, math.nan])
    scores = placed(draw, torch.tensor(draw(st.lists(values, max_size=6))).to(draw(st.sampled_from(FLOATS))))
    return {"scores": scores.detach().requires_grad_()} | draw(contrast(len(scores)))


MARGIN_ARGUMENTS = ("target", "warmup_ratio", "total_steps", "step")


@st.composite
def margin_arguments(draw: st.DrawFn) -> Arguments:
    numbers = st.one_of(st.floats(0, 1), st.integers(0, 10), st.sampled_from([np.float32(0.7), np.int64(1), 1e300]))
    strategies = (
        st.one_of(numbers, st.floats(-1e3, 1e3)),
        st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 5e-324])),
        numbers.filter(lambda x: x > 0),
        numbers,
    )
    return {name: draw(values) for name, values in zip(MARGIN_ARGUMENTS, strategies, strict=True)}


NO_KIND = (
    *(0, -1, 1, 2, 2.5, -0.0, math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-300, 10**400, -(10**400), 2**63),
    *(True, False, None, "1", "mean", "auto", "native", b"mean", [], (), {}, [1.0], 1j, object, torch.float32),
    *(np.float64(0.5), np.float32(0.5), np.int64(2), np.bool_(True), np.array([1.0, 2.0]), np.array("mean")),
    *(Fraction(1, 2), Decimal("0.5"), torch.Size([2])),
    *(torch.tensor(0.5), torch.tensor(2), torch.tensor(0), torch.tensor(-1.0), torch.tensor(math.nan)),
    *(torch.tensor(math.inf), torch.tensor(1e300, dtype=torch.float64), torch.tensor(1j), torch.tensor(True)),
    *(torch.tensor(0.5, requires_grad=True), torch.tensor(0.5, device="meta"), torch.tensor([0.5]), torch.empty(0)),
    *(torch.nn.Parameter(torch.tensor(1.0)), torch.tensor(1, dtype=torch.uint16)),
    torch.tensor(0.5).to(torch.float8_e5m2), torch.eye(2).to_sparse(),
)  # fmt: skip

BENT: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda x: x.mT if x.dim() > 1 else x,
    "leading dimensions transposed": lambda x: x.transpose(0, 1) if x.dim() > 1 else x,
    "one dimension more": lambda x: x[None],
    "one more at the end": lambda x: x[..., None],
    "flat": lambda x: x.flatten(),
    "one dimension less": lambda x: x[0] if len(x.shape) and len(x) else x,
    "shorter": lambda x: x[..., :-1] if x.dim() else x,
    "later": lambda x: x[1:] if x.dim() else x,
    "empty": lambda x: x[:0] if x.dim() else x,
    "twice as long": lambda x: torch.cat([x, x]) if x.dim() else x,
    "every second": lambda x: x[..., ::2] if x.dim() else x,
    "backward": lambda x: x.flip(0) if x.dim() else x,
    "one element for all": lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape) if x.numel() else x,
    "overlapping": lambda x: x.as_strided(x.shape, [1] * x.dim()),
    "on no device": lambda x: x.detach().to("meta"),
    "an array": lambda x: x.detach().float().numpy(),
    "a list": lambda x: x.tolist(),
    "sparse": lambda x: x.detach().float().to_sparse(),
    "negative": lambda x: -x.detach().long(),
    "large": lambda x: x.detach() + 100 if x.dtype in (torch.int32, torch.int64, torch.float32) else x,
    "huge": lambda x: torch.full_like(x, 2**62, requires_grad=False) if x.dtype == torch.int64 else x,
    "NaN": lambda x: torch.full_like(x, math.nan, requires_grad=False) if x.is_floating_point() else x,
    "no leaf": lambda x: x * 1 if x.is_floating_point() else x,
    **{
        str(dtype): lambda x, dtype=dtype: (x.detach().real if x.is_complex() else x.detach()).to(dtype)
        for dtype in DTYPES
    },
}


@st.composite
def changed(draw: st.DrawFn, right: st.SearchStrategy[Arguments], optional: tuple[str, ...]) -> Arguments:
    """Right arguments, up to two of them changed, and possibly one that was left at its default given."""
    arguments = dict(draw(right))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*arguments, *optional]))
        present = arguments.get(name)
        if isinstance(present, Tensor) and draw(st.integers(0, 3)):
            bend = draw(st.sampled_from(sorted(BENT)))
            try:
                arguments[name] = BENT[bend](present)
            except (RuntimeError, NotImplementedError):  # an exotic tensor that torch cannot bend so
                continue
        else:
            arguments[name] = draw(st.sampled_from(NO_KIND))
    return arguments
