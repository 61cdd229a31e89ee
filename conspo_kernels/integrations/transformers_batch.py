"""Batches as transformers' collators and flash-attn make them, and what of them the losses need.

Padded: `input_ids` [B, T] and `attention_mask` [B, T]; a row is a rollout.
Packed: `input_ids` [1, N] without an attention mask, where the rollouts follow one another. Their offsets are
`cu_seq_lens_q` [S + 1], or else the places where `position_ids` [1, N] do not go on by one: the rule by which
transformers itself keeps the sequences apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What a batch holds for the loss and not for the model.
FOR_THE_LOSS = ("labels", "response_mask")


class RolloutTokens(NamedTuple):
    """labels: [B, T] or [1, N], not shifted.  response_mask: shaped like labels, or None.

    cu_seqlens: [S + 1], or None of a padded batch.  inputs: keyword arguments of the model.
    """

    labels: Tensor
    response_mask: Tensor | None
    cu_seqlens: Tensor | None
    inputs: dict[str, Any]


def rollout_tokens(batch: Mapping[str, Any]) -> RolloutTokens:
    """A batch, padded or packed, taken apart.

    Raises:
        TypeError, ValueError: what is missing or does not go together, by name.
    """
    ids = _tensor(batch, "input_ids")
    if ids.dim() != 2:
        raise ValueError(f"batch['input_ids'] must be [B, T], or packed [1, N], got {list(ids.shape)}")
    inputs = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
    cu_seqlens = _offsets(batch, ids)
    if cu_seqlens is not None and batch.get("position_ids") is None:
        # Without them every rollout but the first would have wrong positions, and see those before it where the
        # attention does not go by cu_seq_lens_q (eager, SDPA).
        inputs["position_ids"] = _positions(cu_seqlens, ids.shape[1], ids.device)
    labels, mask = _labels(batch, ids)
    attention_mask = batch.get("attention_mask")
    if cu_seqlens is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        real = _predicted(attention_mask, ids)
        mask = real if mask is None else (mask != 0) & real
    return RolloutTokens(labels, mask, cu_seqlens, inputs)


def check_rewards(batch: Mapping[str, Any], cu_seqlens: Tensor | None, rewards: Any) -> None:
    """That there is a reward for each place where `position_ids` begin anew; padding has such places too.

    Raises:
        ValueError: there are fewer.
    """
    if cu_seqlens is None or batch.get("cu_seq_lens_q") is not None:
        return
    begun = cu_seqlens.shape[0] - 1
    if isinstance(rewards, Tensor) and rewards.dim() == 1 and len(rewards) < begun:
        raise ValueError(
            f"rewards must have shape [{begun}] (one per rollout: batch['position_ids'] begin anew at {begun} places), "
            f"got {list(rewards.shape)}. If the batch ends in padding whose positions are 0, each of its tokens is one "
            f"more: pass cu_seq_lens_q of the {len(rewards)} rollouts, leave the padding out, or pass a padded batch "
            "with attention_mask"
        )


def packed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch without its padding, in the layout of `DataCollatorWithFlattening` and of flash-attn.

    Args:
        batch: `input_ids` and `attention_mask` [B, T], padded on either side, `labels` or `response_mask` [B, T], and
            whatever else is [B, T]. `position_ids` are made anew.

    Returns:
        `input_ids` and the others [1, N], N the number of tokens under the attention mask; `position_ids` [1, N];
        `cu_seq_lens_q`, `cu_seq_lens_k` [B + 1] int32, `max_length_q`, `max_length_k` int. The tokens are those that
        flash-attn's `unpad_input` gives, in its order.

    Raises:
        TypeError, ValueError: a value that is not [B, T], by name.

    Cost: two synchronisations, for the number of tokens and the longest length.
    """
    ids, attention_mask = _tensor(batch, "input_ids"), _tensor(batch, "attention_mask")
    keep = attention_mask != 0
    lengths = keep.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = keep.flatten().nonzero()[:, 0]
    tokens = {}
    for name in batch.keys() - {"attention_mask", "position_ids"}:
        value = _tensor(batch, name)
        if value.shape != ids.shape or keep.shape != ids.shape:
            raise ValueError(f"batch[{name!r}] must be {list(keep.shape)}, as attention_mask, got {list(value.shape)}")
        tokens[name] = value.flatten()[indices]
    return from_unpadded(tokens.pop("input_ids"), cu_seqlens, **tokens)


def from_unpadded(input_ids: Tensor, cu_seqlens: Tensor, **tokens: Tensor) -> dict[str, Any]:
    """A batch of what flash-attn's `unpad_input` returns.

        ids, indices, cu_seqlens, max_seqlen, _ = unpad_input(input_ids[..., None], attention_mask)
        batch = from_unpadded(ids, cu_seqlens, labels=labels.flatten()[indices])

    Args:
        input_ids: [N], [N, 1] or [1, N].
        cu_seqlens: [S + 1] int32 or int64.
        tokens: `labels` or `response_mask`, and whatever else the model takes per token, shaped like input_ids.

    Returns:
        As `packed`.

    Cost: one synchronisation, for the longest length.
    """
    batch: dict[str, Any] = {"input_ids": input_ids.reshape(1, -1)}
    batch |= {name: value.reshape(1, -1) for name, value in tokens.items()}
    batch["position_ids"] = _positions(cu_seqlens, input_ids.numel(), input_ids.device)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cu_seqlens.to(input_ids.device, torch.int32)
    batch["max_length_q"] = batch["max_length_k"] = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return batch


def _tensor(batch: Mapping[str, Any], name: str) -> Tensor:
    value = batch.get(name)
    if value is None:
        raise ValueError(f"batch must have {name!r}, got {sorted(batch)}")
    if not isinstance(value, Tensor):
        raise TypeError(f"batch[{name!r}] must be a torch.Tensor, got {type(value).__name__}")
    return value


def _labels(batch: Mapping[str, Any], ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """labels and response_mask: at least one of them says which tokens are responses."""
    if batch.get("labels") is None and batch.get("response_mask") is None:
        raise ValueError(
            "batch must say which tokens are responses, by 'labels' (-100 at all others) or 'response_mask' (0 at all "
            f"others), got {sorted(batch)}"
        )
    mask = _tensor(batch, "response_mask") if batch.get("response_mask") is not None else None
    labels = _tensor(batch, "labels") if batch.get("labels") is not None else ids
    for name, value in (("labels", labels), ("response_mask", mask)):
        if value is not None and value.shape != ids.shape:
            raise ValueError(f"batch[{name!r}] must be {list(ids.shape)}, as input_ids, got {list(value.shape)}")
    return labels, mask


def _predicted(attention_mask: Tensor, ids: Tensor) -> Tensor:
    """[B, T] bool: tokens, not padding, and with a token before them, which padding on the left is not."""
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"batch['attention_mask'] must be {list(ids.shape)}, as input_ids, got {list(attention_mask.shape)}"
        )
    real = attention_mask != 0
    return real & torch.nn.functional.pad(real[:, :-1], (1, 0))


def _offsets(batch: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """cu_seqlens of a packed batch, None for a padded one."""
    attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    given = batch.get("cu_seq_lens_q")
    if given is not None:
        if attention_mask is not None:
            raise ValueError("a packed batch (cu_seq_lens_q) has no padding: leave attention_mask out")
        if ids.shape[0] != 1:
            raise ValueError(f"a packed batch (cu_seq_lens_q) must have input_ids [1, N], got {list(ids.shape)}")
        cu_seqlens = _tensor(batch, "cu_seq_lens_q")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"batch['cu_seq_lens_q'] must be [S + 1], got {list(cu_seqlens.shape)}")
        return cu_seqlens
    if ids.shape[0] != 1 or attention_mask is not None or position_ids is None:
        return None
    positions = _tensor(batch, "position_ids")
    if positions.shape != ids.shape:  # of images and videos, three or four numbers per token
        raise ValueError(
            f"batch['position_ids'] must be {list(ids.shape)}, as input_ids, to say where rollouts begin, got "
            f"{list(positions.shape)}: pass cu_seq_lens_q"
        )
    begins = torch.nn.functional.pad(positions[0].diff() != 1, (1, 0), value=True)
    return torch.cat([begins.nonzero()[:, 0], begins.new_tensor([ids.shape[1]], dtype=torch.int64)]).to(torch.int32)


def _positions(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """[1, N] position of each token in its sequence; from the last offset on, of what lies behind it."""
    offsets = cu_seqlens.to(device, torch.int64)
    index = torch.arange(num_tokens, device=device)
    sequence = torch.searchsorted(offsets, index, right=True) - 1
    return (index - offsets[sequence])[None]
