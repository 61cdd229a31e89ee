"""Batches of padded sequences and how a model reads them.

Layout of every batch: prompts padded on the left, responses on the right, so that all responses start in one column and
a step of sampling is one column. Shapes: b rows, p prompt columns, r response columns, t = p + r, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Batch:
    """Padded sequences, `[b, t]` each: what the model attends to, and which of the tokens are response."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    prompt_columns: int  # p
    copies: int = 1  # each so many rows in a row have one prompt

    def last_columns(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and response_mask of the columns of a policy's outputs, which may leave out most of the prompt."""
        columns = slice(-outputs.shape[1], None)
        return self.input_ids[:, columns], self.response_mask[:, columns]


def joined(
    prompts: torch.Tensor, prompt_mask: torch.Tensor, responses: torch.Tensor, kept: torch.Tensor, copies: int = 1
) -> Batch:
    """Prompts `[b, p]` and responses `[b, r]`, with the masks of what is real in each, side by side."""
    return Batch(
        torch.cat([prompts, responses], dim=1),
        torch.cat([prompt_mask, kept], dim=1),
        torch.cat([torch.zeros_like(prompt_mask), kept], dim=1),
        prompt_columns=prompts.shape[1],
        copies=copies,
    )


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, and the mask of what is not padding."""
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        filler, real = [pad_id] * gap, [1] * len(row)
        ids.append([*filler, *row] if left else [*row, *filler])
        mask.append([0] * gap + real if left else real + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that start at zero at a row's first real token, wherever its padding ends."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


Forward = Callable[..., torch.Tensor]  # the model's keyword arguments -> its logits


def read_rows(forward: Forward, batch: Batch) -> torch.Tensor:
    """Logits of all columns, `[b, t, v]`, each row read on its own; position t predicts token t + 1."""
    return forward(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions(batch.attention_mask),
        use_cache=False,
    )


def read_prompts_once(forward: Forward, batch: Batch) -> torch.Tensor:
    """Logits from the last prompt column on, `[b, 1 + r, v]`: all that predict a response token.

    The copies of a prompt share its keys and values, and autograd sums their gradients: with 8 rollouts of a dozen
    tokens on prompts of 50, the model reads 2.5 times fewer tokens.
    """
    known = batch.prompt_columns - 1
    cache = DynamicCache()
    prompt_mask = batch.attention_mask[:: batch.copies, :known]
    forward(
        input_ids=batch.input_ids[:: batch.copies, :known],
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(batch.copies)
    return forward(
        input_ids=batch.input_ids[:, known:],
        attention_mask=batch.attention_mask,
        position_ids=positions(batch.attention_mask)[:, known:],
        past_key_values=cache,
        use_cache=True,
    )
