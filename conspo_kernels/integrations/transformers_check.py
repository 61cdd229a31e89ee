"""What a model does, compared with what its config and its batch say: run once per model, on a few tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .transformers_batch import from_unpadded
from .transformers_head import CausalLMHead, as_weight, causal_lm_head, causal_lm_of, head_module, last_hidden_states

CHECKED_TOKENS = 4
# The largest of the logits that the check sends through the model: above what models have, so that a softcap shows.
LARGEST_LOGIT = 100.0
TRANSFORM_TOLERANCE = 1e-2  # relative, and absolute: three roundings to bf16 are 6e-3

PACKED_TOKENS = 8
LEAK_TOLERANCE = 1e-5  # relative: the same kernels on the same shapes
PACKING_TOLERANCE = 5e-2  # relative, of 16-bit hidden states: other kernels of attention may run for one and for two

# Models whose head was compared, with what it was then: an adapter, a hook or another config has it compared again.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def checked_head(model: nn.Module) -> CausalLMHead:
    """`causal_lm_head`, compared with the model's own logits by `check_head` the first time that a model is seen.

    What changes logits and is cheap to see is looked at in every call. If it has changed, they are compared again.
    """
    lm = causal_lm_of(model)
    head = causal_lm_head(lm)
    outer = lm.get_output_embeddings()
    state = (
        *(part for module in dict.fromkeys((outer, head_module(lm), lm)) for part in _way_of(module)),
        _reference(lm.base_model),
        head.logit_scale,
        head.softcap,
    )
    if _CHECKED.get(lm) != state:
        check_head(lm)
        _CHECKED[lm] = state
    return head


def _way_of(module: nn.Module) -> tuple[Any, ...]:
    """What a call of a module runs: itself, its class and `forward`, or one in their place, hooks and parametrizations.

    Of hooks the numbers that torch gives them, of which no two are the same.
    """
    own_forward = vars(module).get("forward")
    replaced = getattr(module, "parametrizations", {})
    return (
        _reference(module),
        type(module),
        type(module).forward,
        None if own_forward is None else _reference(own_forward),
        *module._forward_pre_hooks,
        *module._forward_hooks,
        *(_reference(x) for name in replaced for x in replaced[name]),
    )


def _reference(value: Any) -> Any:
    """Equal to another of the same object, and keeps nothing alive: a model's own method would keep the model."""
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def check_terms(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A loss of the router that the model's own forward would add is not dropped in silence.

    Args:
        model: as `check_head`.
        inputs: the model's keyword arguments.

    Raises:
        ValueError: the model, or the call, asks for router logits, and the coefficient of their loss is not zero.
    """
    lm = causal_lm_of(model)
    text = lm.config.get_text_config()
    wanted = inputs.get("output_router_logits")
    if wanted is None:
        wanted = getattr(text, "output_router_logits", False) or getattr(lm.config, "output_router_logits", False)
    if not wanted:
        return
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the latter JetMoE's
    found = [getattr(owner, name) for owner in (lm, text) for name in names if hasattr(owner, name)]
    if not found or found[0] != 0:
        raise ValueError(
            f"{type(lm).__name__} adds a router's load-balancing loss (output_router_logits=True, coefficient "
            f"{found[0] if found else 'unknown'}), which is not part of this one: set output_router_logits=False, or "
            "call the model and use conspo_loss(output.logits, ...) + coefficient * output.aux_loss"
        )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the model's own logits of a few tokens with what its base model and `causal_lm_head` give.

    Three things are compared, in one pass through the model and one through its base model: what enters the head with
    the last hidden states; what leaves it with hidden @ weight.T + bias; and what the model then does to logits, which
    are replaced by some between -100 and 100, with the scale and the softcap of the config.

    Args:
        model: as `causal_lm_head`. It runs in evaluation mode, in which it is not left if it came in another.

    Raises:
        ValueError: they differ. The model does something to its hidden states or logits that `causal_lm_head` does not
            know, and a loss from its hidden states would be wrong; `conspo_loss` on its logits is right.

    Cost: two forward passes of four tokens.
    """
    lm = causal_lm_of(model)
    head = causal_lm_head(lm)
    ids = _plain_token_ids(lm, CHECKED_TOKENS)
    name = type(lm).__name__
    with _evaluation(lm):
        hidden = last_hidden_states(lm, {"input_ids": ids})
        seen = _logits_with_probe(lm, ids)
    if seen is None:
        raise ValueError(f"{name} does not call its head, or changes the number of its logits: use conspo_loss")
    entered, left, probe, logits = seen
    # Autocast of Accelerate is around the model's forward only: a difference of 1% that this finds.
    narrow = min(entered.dtype, hidden.dtype, key=lambda dtype: dtype.itemsize)  # a hook may cast, see `as_weight`
    if not _close(entered.to(narrow), hidden.to(narrow)):
        raise ValueError(
            f"{name} does not give its last hidden states to its head as they are: use conspo_loss on its logits. "
            "(If its forward runs under autocast, as Accelerate's mixed precision has it, call this inside of "
            "accelerator.autocast().)"
        )
    computed = nn.functional.linear(as_weight(entered, head.weight), head.weight, head.bias)
    if not _close(left, computed):
        raise ValueError(f"the head of {name} is not hidden @ weight.T + bias: use conspo_loss on its logits")
    if left.dtype.itemsize > computed.dtype.itemsize:
        raise ValueError(
            f"the head of {name} makes logits in {left.dtype}, and here they would be in {computed.dtype}: cast the "
            f"head to {left.dtype} and call this outside of autocast, or use conspo_loss on the model's logits"
        )
    expected = head.transformed(probe)
    if not torch.allclose(logits.to(expected), expected, rtol=TRANSFORM_TOLERANCE, atol=TRANSFORM_TOLERANCE):
        raise ValueError(
            f"{name} makes other logits than its config says (logit_scale={head.logit_scale}, softcap={head.softcap}): "
            "use conspo_loss on its logits"
        )


_PACKING_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[str, bool]] = weakref.WeakKeyDictionary()


def checked_packing(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """`check_packing`, the first time that such a batch comes to a model with its implementation of attention."""
    lm = causal_lm_of(model)
    state = (str(lm.config._attn_implementation), "seq_idx" in inputs)
    if _PACKING_CHECKED.get(lm) != state:
        check_packing(lm, seq_idx=state[1])
        _PACKING_CHECKED[lm] = state


@torch.no_grad()
def check_packing(model: nn.Module, *, seq_idx: bool = False) -> None:
    """Compare tokens packed behind others with the same tokens behind yet others, and alone.

    Args:
        model: as `check_head`.
        seq_idx: also tell the model which rollout each token belongs to, as some hybrid models want it.

    Raises:
        ValueError: the hidden states differ, because attention, a convolution or a state runs across the border of two
            rollouts, or positions do. Padded batches are right.

    Cost: three forward passes of up to eight tokens.
    """
    lm = causal_lm_of(model)
    ids = _plain_token_ids(lm, PACKED_TOKENS)
    half = PACKED_TOKENS // 2
    offsets = torch.tensor([0, half, PACKED_TOKENS], dtype=torch.int32, device=ids.device)
    sequence = {"seq_idx": (torch.arange(PACKED_TOKENS, device=ids.device) >= half).int()} if seq_idx else {}
    second = ids[:, half:]
    twice = torch.cat([second, second], dim=1)
    with _evaluation(lm):
        behind_first, behind_itself = (
            last_hidden_states(lm, from_unpadded(tokens, offsets, **sequence))[:, half:] for tokens in (ids, twice)
        )
        alone = last_hidden_states(lm, from_unpadded(second, offsets[:2]))
    # What stands before can be seen in the second sequence below the rounding of bf16, if two runs of one shape differ;
    # alone, other kernels may run. Random weights of Falcon-H1 showed it by 6e-4.
    leak = relative_difference(behind_first, behind_itself)
    if leak > LEAK_TOLERANCE or not _close(behind_first, alone, rounding_16=PACKING_TOLERANCE):
        raise ValueError(
            f"{type(lm).__name__} lets packed rollouts see one another (attention: {lm.config._attn_implementation}, "
            f"hidden states differ by {max(leak, relative_difference(behind_first, alone)):.1e}): use a padded batch, "
            "with an attention_mask"
        )


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    difference = torch.linalg.vector_norm(value.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()).clamp(min=1e-30))


def _close(value: Tensor, expected: Tensor, rounding_16: float = 1e-2) -> bool:
    """Equal up to rounding: the same operations on the same numbers, in another order perhaps."""
    in_16_bits = torch.finfo(expected.dtype).bits == 16 or torch.is_autocast_enabled(expected.device.type)
    rounding = rounding_16 if in_16_bits else 1e-4
    return value.shape == expected.shape and relative_difference(value, expected) <= rounding


def _logits_with_probe(lm: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What entered the head, what left it, what it was replaced by, and what the model made of that; None: cannot be.

    The probe is fp32, so a model in bf16 shows its transform without the rounding of its logits.
    """
    calls = []

    def replace(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probe = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, output.numel(), device=output.device).view(output.shape)
        calls.append((args[0], output, probe))
        return probe

    handle = lm.get_output_embeddings().register_forward_hook(replace)
    try:
        logits = lm(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if len(calls) != 1 or logits.shape != calls[0][2].shape:
        return None
    return *calls[0], logits


def _plain_token_ids(lm: Any, number: int) -> Tensor:
    """[1, number] ids that no config gives a meaning to (an image's place, padding), where there are so many."""
    text = lm.config.get_text_config()
    special = {0}
    for config in (lm.config, text):
        for name, value in config.to_dict().items():
            if "_token" in name:  # image_token_id, image_token_index, eos_token_id, of which there may be a list
                special.update(x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int))
    plain = [i for i in range(min(text.vocab_size, 1000)) if i not in special] or [0]
    repeated = plain * number
    return torch.tensor([repeated[:number]], device=lm.get_input_embeddings().weight.device)


@contextmanager
def _evaluation(lm: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
