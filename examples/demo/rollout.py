"""Sequences the policy is taught and sequences it samples: supervised batches, cached sampling, accuracy.

Shapes as in sequences.py: b rows, p prompt columns, r response columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache

from .policy import Policy
from .sequences import Batch, joined, pad, positions
from .tasks import Entry, Task


def supervised_batch(policy: Policy, task: Task, entries: Sequence[Entry]) -> Batch:
    """Prompts with their right answers."""
    tokenizer = policy.tokenizer
    prompts, prompt_mask = pad([tokenizer.encode_prompt(task.prompt(e)) for e in entries], tokenizer.pad_id, left=True)
    answers, answer_mask = pad(
        [tokenizer.encode_response(task.answer(e)) for e in entries], tokenizer.pad_id, left=False
    )
    prompts, prompt_mask, answers, answer_mask = (
        x.to(policy.device) for x in (prompts, prompt_mask, answers, answer_mask)
    )
    return joined(prompts, prompt_mask, answers, answer_mask)


@torch.no_grad()
def _sample_columns(
    policy: Policy,
    prompts_bp: torch.Tensor,
    prompt_mask_bp: torch.Tensor,
    *,
    copies: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled tokens and the mask of those up to and including the end of sequence, `[b * copies, r]` each."""
    tokenizer = policy.tokenizer
    cache = DynamicCache(config=policy.model.config)
    logits = policy.forward(
        input_ids=prompts_bp,
        attention_mask=prompt_mask_bp,
        position_ids=positions(prompt_mask_bp),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )[:, -1]
    # A prompt is read once, whatever the number of its rollouts.
    cache.batch_repeat_interleave(copies)
    logits = logits.repeat_interleave(copies, dim=0)
    attended = prompt_mask_bp.repeat_interleave(copies, dim=0)
    open_b = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    tokens, kept = [], []
    for step in range(max_new_tokens):
        if generator is None:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        drawn = torch.where(open_b, drawn, tokenizer.pad_id)
        tokens.append(drawn)
        kept.append(open_b)
        open_b = open_b & (drawn != tokenizer.eos_id)
        if step + 1 == max_new_tokens or not open_b.any():
            break
        attended = torch.cat([attended, kept[-1][:, None].to(attended.dtype)], dim=1)
        logits = policy.forward(
            input_ids=drawn[:, None],
            attention_mask=attended,
            position_ids=positions(attended)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )[:, -1]
    return torch.stack(tokens, dim=1), torch.stack(kept, dim=1).to(prompt_mask_bp.dtype)


@dataclass(frozen=True)
class Rollouts:
    """`copies` sampled responses per entry, an entry's copies next to each other."""

    batch: Batch
    texts: list[str]
    rewards: torch.Tensor  # [b], on the CPU
    lengths: torch.Tensor  # [b], response tokens, the end of sequence among them
    finished: torch.Tensor  # [b], whether the end of sequence came in time


def sample(
    policy: Policy,
    task: Task,
    entries: Sequence[Entry],
    *,
    copies: int,
    temperature: float = 1.0,
    generator: torch.Generator | None,
) -> Rollouts:
    """Responses to each entry and the verifier's rewards. Without a generator the decoding is greedy."""
    tokenizer = policy.tokenizer
    prompts, prompt_mask = pad([tokenizer.encode_prompt(task.prompt(e)) for e in entries], tokenizer.pad_id, left=True)
    prompts, prompt_mask = prompts.to(policy.device), prompt_mask.to(policy.device)
    tokens, kept = _sample_columns(
        policy,
        prompts,
        prompt_mask,
        copies=copies,
        max_new_tokens=task.max_new_tokens,
        temperature=temperature,
        generator=generator,
    )
    prompts, prompt_mask = prompts.repeat_interleave(copies, dim=0), prompt_mask.repeat_interleave(copies, dim=0)
    batch = joined(prompts, prompt_mask, tokens, kept, copies)
    lengths = kept.sum(1).cpu()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    texts = [tokenizer.decode(row) for row in rows]
    rewards = [task.reward(entries[index // copies], text) for index, text in enumerate(texts)]
    finished = torch.tensor([row[-1] == tokenizer.eos_id for row in rows])
    return Rollouts(batch, texts, torch.tensor(rewards), lengths, finished)


def _slices(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def accuracy(
    policy: Policy,
    task: Task,
    entries: Sequence[Entry],
    *,
    samples: int,
    generator: torch.Generator | None,
    label: str | None = None,
) -> float:
    """Fraction of right answers at temperature 1 (greedy without a generator), shown as a bar if it has a label."""
    solved = 0.0
    with tqdm(total=len(entries), desc=label, unit="prompt", disable=label is None) as bar:
        for part in _slices(entries, 64):
            solved += sample(policy, task, part, copies=samples, generator=generator).rewards.sum().item()
            bar.update(len(part))
            bar.set_postfix(accuracy=f"{solved / (bar.n * samples or 1):.3f}")
    return solved / (len(entries) * samples)
