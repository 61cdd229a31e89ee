"""Checks of users' arguments. Each error names the argument, what was expected and what came.

TypeError: not a tensor, not a number. ValueError: a tensor or number of the wrong kind. This module reads metadata
only; ops check the values of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.registry import BACKENDS
from ..values import accumulated, factor
from .autocast import product_dtype

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
INTEGERS = "int8, int16, int32, int64 or uint8"
REDUCTIONS = ("mean", "sum", "none")
PADDING = "; padding at the end of packed tokens is none if it lies behind the last of cu_seqlens"


def _tensor(name: str, value: Any, sharded: bool = False) -> None:
    """sharded: a DTensor is taken, or has an error of its own."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    if not sharded and hasattr(value, "full_tensor"):
        raise ValueError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor() or its local part")


def _reverse_mode(name: str, value: Tensor) -> None:
    """Registered ops have a backward only: without this check a forward-mode derivative would be zero in silence."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise NotImplementedError(f"{name} must not be inside a torch.func transform, got one: use autograd")
    if _has_tangent(value):
        raise NotImplementedError(f"{name} must not carry a tangent, got one: there is no forward-mode derivative")


def _has_tangent(value: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def _constant(name: str, value: Tensor) -> None:
    """A tensor that no mode may differentiate by."""
    compiling = torch.compiler.is_compiling()
    while not compiling and torch._C._functorch.is_batchedtensor(value):  # whose gradient and tangent vmap hides
        value = torch._C._functorch.get_unwrapped(value)
    if value.requires_grad or (not compiling and _has_tangent(value)):
        raise ValueError(f"{name} must be a constant of the loss, which gets no gradient: pass {name}.detach()")


def _dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...], words: str) -> None:
    if value.dtype not in allowed:
        raise ValueError(f"{name} must be {words}, got {value.dtype}")


def _differentiable(name: str, value: Any, words: str, sharded: bool = False) -> None:
    """A floating-point tensor that reverse mode may differentiate by."""
    _tensor(name, value, sharded)
    _reverse_mode(name, value)
    _dtype(name, value, LOGIT_DTYPES, words)


def _shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {list(value.shape)}")


def _same_device(name: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {other}, {device}, got {value.device}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def implementation(value: Any) -> None:
    _choice("implementation", value, ("auto", *BACKENDS))


def logit_transform(temperature: Any, logit_scale: Any, softcap: Any) -> list[float]:
    """A `LogitTransform`, as ops take it."""
    numbers = [factor("temperature", temperature), factor("logit_scale", logit_scale)]
    return numbers if softcap is None else [*numbers, factor("softcap", softcap)]


def logits(value: Any) -> None:
    _differentiable("logits", value, "fp16, bf16, fp32 or fp64", sharded=True)
    if value.dim() not in (2, 3):
        raise ValueError(f"logits must be [B, T, V], or packed [N, V] or [1, N, V], got {list(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one entry, got {list(value.shape)}")
    if value.shape[-1] > 1 and value.numel() > 0 and value.stride(-1) != 1:
        raise ValueError(f"logits must have a last stride of 1 (the others are free), got strides {value.stride()}")


def linear(hidden: Any, weight: Any, bias: Any) -> None:
    """Hidden states and the head that makes logits of them."""
    for name, value in (("hidden", hidden), ("weight", weight), *(() if bias is None else (("bias", bias),))):
        _tensor(name, value, sharded=True)
        _reverse_mode(name, value)
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} must be a whole tensor, got a DTensor: call the loss where the parameter is gathered, inside "
                f"the wrapped module's forward, or pass {name}.full_tensor()"
            )
        _dtype(name, value, LOGIT_DTYPES, "fp16, bf16, fp32 or fp64")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be [B, T, H], or packed [N, H] or [1, N, H], got {list(hidden.shape)}")
    if weight.numel() == 0:
        raise ValueError(
            f"weight must be [V, H], got the empty {list(weight.shape)}: if it is sharded (ZeRO-3), gather it around "
            "the call"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, H] with H = {hidden.shape[-1]} of hidden, got {list(weight.shape)}")
    if bias is not None:
        _shape("bias", bias, (weight.shape[0],), "one per row of weight")
    for name, value in (("weight", weight), *(() if bias is None else (("bias", bias),))):
        _same_device(name, value, "hidden", hidden.device)
        if value.dtype != hidden.dtype and product_dtype(value) != product_dtype(hidden):
            raise ValueError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}: cast one of them (for fp32 "
                "logits of 16-bit operands pass logits_dtype=torch.float32, for an fp32 head hidden.float())"
            )


def weight_grad(value: Any, weight: Tensor) -> None:
    """A buffer that backward adds the gradient of weight to."""
    _tensor("weight_grad", value)
    _shape("weight_grad", value, tuple(weight.shape), "that of weight")
    wide = accumulated(weight.dtype)
    _dtype("weight_grad", value, (wide,), f"{wide} for weight in {weight.dtype}")
    _same_device("weight_grad", value, "weight", weight.device)
    if any(stride == 0 and n > 1 for stride, n in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(f"weight_grad must have an element for each of weight, got strides {value.stride()}")
    _memory_holds("weight_grad", value)
    if not torch.compiler.is_compiling() and value.untyped_storage()._cdata == weight.untyped_storage()._cdata:
        raise ValueError("weight_grad must not be the memory of weight, which it would be added to")
    if value.requires_grad:
        raise ValueError("weight_grad is added to in backward: it must not require a gradient itself")
    if not weight.requires_grad:
        raise ValueError("weight_grad takes the gradient of weight, which does not require one")


def logits_dtype(value: Any, hidden: Tensor) -> None:
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"logits_dtype must be None or a torch.dtype, got {type(value).__name__}")
    allowed = {None, hidden.dtype, accumulated(hidden.dtype)}
    if value not in allowed:
        words = " or ".join(sorted(str(x) for x in allowed))
        raise ValueError(f"logits_dtype must be {words} for hidden in {hidden.dtype}, got {value!r}")


def tokens(labels: Any, response_mask: Any, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    """labels: one per row of the argument `name`, whose leading dimensions are `shape`."""
    _tensor("labels", labels)
    _dtype("labels", labels, INTEGER_DTYPES, INTEGERS)
    _shape("labels", labels, shape, f"one per row of {name}")
    _same_device("labels", labels, name, device)
    if response_mask is not None:
        _tensor("response_mask", response_mask)
        if response_mask.is_complex():
            raise ValueError(f"response_mask must be real, got {response_mask.dtype}")
        _shape("response_mask", response_mask, tuple(labels.shape), "that of labels")
        _same_device("response_mask", response_mask, "labels", device)


def cu_seqlens(value: Any, shape: tuple[int, ...], needed_for: str | None) -> None:
    """Offsets of packed tokens, for rows of leading dimensions `shape`; `needed_for`: as of `tokens_of`."""
    if value is None:
        if len(shape) == 1 and needed_for is not None:
            raise ValueError(f"cu_seqlens is needed for {needed_for} of packed tokens {list(shape)}")
        return
    _tensor("cu_seqlens", value)
    _dtype("cu_seqlens", value, (torch.int32, torch.int64), "int32 or int64")
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [S + 1], got {list(value.shape)}")
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(f"cu_seqlens goes with packed tokens, [N] or [1, N], got {list(shape)}")


def logprobs(value: Any) -> None:
    _differentiable("logprobs", value, "floating point")
    if value.dim() not in (1, 2):
        raise ValueError(f"logprobs must be [B, T], or packed [N] or [1, N], got {list(value.shape)}")


def scores(value: Any) -> None:
    _differentiable("scores", value, "floating point")
    if value.dim() != 1:
        raise ValueError(f"scores must be [S], got {list(value.shape)}")


def weights(value: Any, num_rollouts: int, device: torch.device, phase_one: Any) -> None:
    """Weights, one per rollout.  phase_one: the scores of phase 1, or None."""
    for name, x in (("weights", value), *(() if phase_one is None else (("scores", phase_one),))):
        _factors(name, x, (num_rollouts,), "one per rollout", device)
    _constant("weights", value)


def coefficients(value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Coefficients, one per token."""
    _factors("coefficients", value, shape, "that of labels", device)
    _constant("coefficients", value)


def _factors(name: str, value: Any, shape: tuple[int, ...], why: str, device: torch.device) -> None:
    _tensor(name, value)
    _dtype(name, value, LOGIT_DTYPES, "floating point")
    _shape(name, value, shape, why)
    devices(device, **{name: value})


def trust_region(values: Any, logprobs: Any, old_logprobs: Any, epsilon: Any) -> None:
    for name, value in (("coefficients", values), ("logprobs", logprobs), ("old_logprobs", old_logprobs)):
        _differentiable(name, value, "floating point")
        _shape(name, value, tuple(values.shape), "that of coefficients")
        _same_device(name, value, "coefficients", values.device)
    _constant("coefficients", values)
    if epsilon is not None:
        factor("epsilon", epsilon)


def rewards(value: Any, num_rollouts: int) -> None:
    _tensor("rewards", value)
    if value.is_complex() or (value.is_floating_point() and value.dtype not in LOGIT_DTYPES):
        raise ValueError(f"rewards must be fp16, bf16, fp32, fp64, int or bool, got {value.dtype}")
    fewer = value.dim() == 1 and value.shape[0] < num_rollouts
    _shape("rewards", value, (num_rollouts,), "one per rollout" + (PADDING if fewer else ""))


def groups(value: Any, num_rollouts: int) -> None:
    if isinstance(value, Tensor):
        _tensor("groups", value)
        _dtype("groups", value, INTEGER_DTYPES, f"an int or prompt ids in {INTEGERS}")
        _shape("groups", value, (num_rollouts,), "one prompt id per rollout")
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"groups must be an int or a tensor of prompt ids, got {type(value).__name__}")
    if not 1 <= value < 2**63:
        raise ValueError(f"groups must be at least 1 and fit 64 bits, got {value}")
    if num_rollouts % int(value) != 0:
        raise ValueError(f"groups={value} rollouts per prompt must divide the number of rollouts, got {num_rollouts}")


def objective(margin: Any, reward_threshold: Any, reduction: Any, num_groups: Any) -> None:
    """But tau: these are numbers already, or tensors."""
    _scalar("margin", margin)
    if reward_threshold != reward_threshold:
        raise ValueError("reward_threshold must not be NaN, got nan")
    _choice("reduction", reduction, REDUCTIONS)
    if num_groups is not None:
        _scalar("num_groups", num_groups)
        if reduction != "mean":
            raise ValueError(f"num_groups is the denominator of reduction='mean', got reduction={reduction!r}")


def no_shift_over_ranks(shift: bool) -> None:
    if shift:
        raise ValueError(
            "shift=True cannot see the first label of the next rank of parallel.context: pass labels that are aligned "
            "with the logits that predict them"
        )


def _scalar(name: str, value: Any) -> None:
    """A tensor in place of a number."""
    if not isinstance(value, Tensor):
        return
    _tensor(name, value)
    if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be a number or a real 0-d tensor, got {value.dtype} {list(value.shape)}")
    _constant(name, value)


def devices(device: torch.device, **values: Any) -> None:
    """Small tensors lie on the device of the computation, or on the CPU: from there they are copied without waiting."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
            places = "the CPU" if device.type == "cpu" else f"the CPU or {device}, where the computation is"
            raise ValueError(f"{name} must be on {places}, got {value.device}")


def flags(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def _memory_holds(name: str, value: Tensor) -> None:
    if not torch.compiler.is_compiling() and value.is_neg():
        raise ValueError(f"{name} is written to memory, got a view that negates what memory holds: call resolve_neg()")


def overwritten(name: str, inplace: Any, value: Tensor) -> None:
    """Logits that a gradient may overwrite: neither a leaf nor its view, and no two rows share storage."""
    flags(**{name: inplace})
    if not (value.requires_grad and torch.is_grad_enabled()):
        return
    if value.is_leaf:
        raise ValueError(
            f"{name} would overwrite logits, a leaf tensor of yours: pass a model's output or logits.clone()"
        )
    _memory_holds(name, value)
    if not torch.compiler.is_compiling():
        if value._base is not None and value._base.is_leaf:
            raise ValueError(f"{name} would overwrite logits, a view of a leaf tensor of yours: pass logits.clone()")
        # What hooks pack and unpack, activation checkpointing's too, autograd does not check for modifications.
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            raise ValueError(f"{name} must be called outside of saved-tensor hooks and checkpoint(), got inside")
    outer, inner = ((1, 1), *zip(value.stride()[:-1], value.shape[:-1], strict=True))[-2:]
    if inner[1] > 1 and inner[0] > outer[0]:
        outer, inner = inner, outer
    row = value.shape[-1]
    span = inner[0] * (inner[1] - 1) + row
    if (inner[1] > 1 and inner[0] < row) or (outer[1] > 1 and outer[0] < span):
        raise ValueError(f"{name} needs logits whose rows do not overlap, got strides {value.stride()}")
