"""A real TRL run on a CPU, in a minute or two: `ConSPOTrainer` teaches a small Llama to spell words backward.

The model, the words and the verifier are those of train.py; TRL samples, shuffles and steps. Supervised steps first,
until the model solves some words but not most. Then ConSPO: 32 words with eight rollouts each per step, in four
micro-batches over which TRL scatters the groups. Accuracy on held-out words is measured before and after.

    python examples/trl_conspo.py                  # files in runs/trl: summary.json, curves.png
    python examples/trl_conspo.py --seed 1 --steps 60

It needs `pip install 'conspo-kernels[train,trl]'`, and reasoning-gym as train.py does. From a checkout that is not
installed, put it on the path first: `PYTHONPATH=. python examples/trl_conspo.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up: model, tokenizer and words are made here

import torch
from datasets import Dataset
from demo.plot import plot_run
from demo.policy import CharTokenizer, Policy, build_char_policy
from demo.records import write_json
from demo.rollout import accuracy
from demo.tasks import SpellBackward
from demo.warmup import warm_up
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, set_seed

from conspo_kernels.integrations.trl import ConSPOConfig, ConSPOTrainer

GROUP_SIZE, MICRO_BATCH, MICRO_BATCHES = 8, 64, 4  # 32 words per step


def fast_tokenizer(characters: CharTokenizer) -> PreTrainedTokenizerFast:
    """The characters' tokens as transformers has tokenizers: one per symbol of the text."""
    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(characters.symbols)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


class Spelled:
    """TRL's reward function: 1 for a word spelled backward, by reasoning-gym's verifier."""

    __name__ = "spelled"  # in TRL's logs

    def __init__(self, task: SpellBackward, characters: CharTokenizer) -> None:
        self.task, self.characters = task, characters

    def __call__(self, *, completion_ids: list[list[int]], entry: list[int], **_columns: Any) -> list[float]:
        return [
            self.task.reward(self.task.train[i], self.characters.decode(ids))
            for i, ids in zip(entry, completion_ids, strict=True)
        ]


class Bar(TrainerCallback):
    """One line of progress, in place of TRL's table per step. Arguments are those that transformers passes."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_others: Any) -> None:  # noqa: ARG002
        self.bar = tqdm(total=state.max_steps, desc="ConSPO", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:  # noqa: ARG002
        if "reward" in logs:
            self.bar.set_postfix(reward=f"{logs['reward']:.3f}", gap=f"{logs['conspo/score_gap'] or 0:.3f}")
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:  # noqa: ARG002
        self.bar.close()


def trainer_of(args: argparse.Namespace, policy: Policy, task: SpellBackward, characters: CharTokenizer) -> Any:
    config = ConSPOConfig(
        output_dir=str(args.out),
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_completion_length=task.max_new_tokens,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        logging_steps=1,
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    words = {"prompt": [task.prompt(it) + ">" for it in task.train], "entry": list(range(len(task.train)))}
    trainer = ConSPOTrainer(
        policy.model,
        reward_funcs=Spelled(task, characters),
        args=config,
        train_dataset=Dataset.from_dict(words),
        processing_class=fast_tokenizer(characters),
        callbacks=[Bar()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="ConSPO with TRL on a CPU", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of ConSPO")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup-steps", type=int, default=2000, help="supervised steps, at most")
    parser.add_argument("--warmup-accuracy", type=float, default=0.35, help="at which they stop")
    parser.add_argument("--held-out", type=int, default=512, help="words kept away from training")
    parser.add_argument("--eval-samples", type=int, default=2, help="responses per held-out word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    started = time.perf_counter()
    task, characters, policy = (
        SpellBackward(held_out=args.held_out),
        CharTokenizer(),
        build_char_policy(torch.device("cpu")),
    )

    def held_out(label: str) -> float:
        generator = torch.Generator().manual_seed(args.seed)
        return accuracy(policy, task, task.held_out, samples=args.eval_samples, generator=generator, label=label)

    steps = warm_up(
        policy, task, max_steps=args.warmup_steps, target_accuracy=args.warmup_accuracy, lr=5e-4, batch_size=64,
        rng=random.Random(args.seed), generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    summary: dict[str, Any] = {"seed": args.seed, "warmup_steps": steps, "steps": args.steps}
    summary["warmup_seconds"] = round(time.perf_counter() - started, 1)
    summary["accuracy_before"] = held_out("accuracy before")
    trainer = trainer_of(args, policy, task, characters)
    trainer.train()
    summary["accuracy_after"] = held_out("accuracy after")
    summary["seconds"] = round(time.perf_counter() - started, 1)
    rows = [
        {name: float("nan") if x is None else x for name, x in it.items()} | {"reward_mean": it["reward"]}
        for it in trainer.state.log_history
        if "reward" in it
    ]
    title = f"TRL, ConSPOTrainer: {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%} of held-out words"
    plot_run(rows, args.out / "curves.png", title)
    write_json(args.out / "summary.json", summary)
    print(f"held-out accuracy {summary['accuracy_before']:.1%} before, {summary['accuracy_after']:.1%} after")
    return summary


if __name__ == "__main__":
    main()
