"""`ConSPOTrainer`'s optimizer step with this library's loss head beside TRL's own: processor time and peak memory.

    python -m benchmarks.trl_step [--rollouts 64] [--tokens 512] [--vocabulary 50257] [--hidden 128] [--rounds 8]

Both phases of micro-batches of eight rollouts, without generation, in turns: each micro-batch is a round. Times are
those of the processor, on one thread, so that other processes on the machine matter less; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.measure import Call, peak_bytes

ROWS = 8
HEADS = ("conspo", "trl")


def policy(vocabulary: int, hidden: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0,
            bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip


def trainer(head: str, model: Any, micro_batches: int) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from conspo_kernels.integrations.trl import ConSPOConfig, ConSPOTrainer

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    config = ConSPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", loss_head=head, num_generations=8,
        per_device_train_batch_size=ROWS, gradient_accumulation_steps=micro_batches, max_completion_length=8,
        gradient_checkpointing=False,
    )  # fmt: skip
    return ConSPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )


def micro_batch(tokens: int, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """One group of eight, half of it right: an eighth of each sequence is prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = tokens // 8
    ids = torch.randint(2, vocabulary, (ROWS, tokens), generator=generator)
    return {
        "prompt_ids": ids[:, :prompt],
        "completion_ids": ids[:, prompt:],
        "prompt_mask": torch.ones(ROWS, prompt, dtype=torch.long),
        "completion_mask": torch.ones(ROWS, tokens - prompt, dtype=torch.long),
        "conspo_rewards": (torch.arange(ROWS) % 2).float(),
        "conspo_groups": torch.zeros(ROWS, dtype=torch.long),
    }


def both_phases(trained: Any, batch: dict[str, Tensor]) -> None:
    """What an optimizer step does with one of its micro-batches, and no more."""
    trained.model.train()
    trained._weigh([batch], new=False)
    trained._compute_loss(trained.model, batch).backward()
    trained.model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rollouts", 64), ("tokens", 512), ("vocabulary", 50257), ("hidden", 128), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    trainers = {
        head: trainer(head, policy(options.vocabulary, options.hidden), options.rollouts // ROWS) for head in HEADS
    }
    seconds: dict[str, list[float]] = {head: [] for head in HEADS}
    for turn in range(options.rounds + 1):  # the first round warms up
        for head, trained in trainers.items():
            batch = micro_batch(options.tokens, options.vocabulary, turn)
            before = time.process_time()
            both_phases(trained, batch)
            if turn:
                seconds[head].append(time.process_time() - before)
        print(f"round {turn}", {head: round(values[-1], 2) for head, values in seconds.items() if values}, flush=True)
    median = {head: statistics.median(values) for head, values in seconds.items()}
    for head in HEADS:
        prepare = functools.partial(micro_batch, options.tokens, options.vocabulary, 0)
        peak = peak_bytes(Call(prepare, functools.partial(both_phases, trainers[head])), torch.device("cpu"))
        step = median[head] * options.rollouts / ROWS
        print(f"{head:7} {step:7.1f} processor seconds per step, peak {peak / 2**20:8.0f} MiB beyond the parameters")
    print(f"ratio of medians {median['trl'] / median['conspo']:.2f}")


if __name__ == "__main__":
    main()
