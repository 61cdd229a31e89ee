"""Reinforcement learning with verifiable rewards, start to end in minutes on two cores: the demo of conspo_kernels.

A small Llama learns to spell words backward. Supervised steps first, until it solves some prompts but not most; then
ConSPO (or GRPO, with as many rollouts) on its own samples, marked right or wrong by reasoning-gym's verifier. Accuracy
on held-out words is measured before and after. `--model smollm2` is a pretrained model, SmolLM2-135M-Instruct, that
learns sums and differences of one digit; it starts from its own accuracy, without supervised steps.

    python examples/train.py                       # ConSPO, files in runs/demo
    python examples/train.py --loss grpo --out runs/grpo
    python examples/train.py --model smollm2       # files in runs/smollm2
    python examples/train.py --fused-linear        # the loss from hidden states, logits never whole

From a checkout that is not installed, put it on the path first: `PYTHONPATH=. python examples/train.py`.
The same seed, threads and machine give the same run on a CPU. Ctrl-C leaves whole files of what was reached.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo.grpo import grpo_loss
from demo.plot import plot_run
from demo.policy import Policy, build_char_policy
from demo.records import StepLog, replace_atomically, write_json
from demo.rollout import Rollouts, accuracy, sample
from demo.settings import parse_arguments
from demo.smollm2 import build_smollm2_policy
from demo.tasks import OneDigitSums, SpellBackward, Task
from demo.warmup import warm_up
from tqdm import tqdm
from transformers import set_seed

from conspo_kernels import (
    CosineMargin,
    conspo_loss,
    conspo_loss_from_scores,
    linear_conspo_loss,
    linear_token_logprobs,
    sequence_scores,
    token_logprobs,
)

INTERRUPTED = 130  # the shell's exit code for a process ended by Ctrl-C


def seeded(seed: int, purpose: str) -> random.Random:
    """A stream of its own for each purpose: a change in one (more warm-up, no warm-up) leaves the others alone."""
    return random.Random(f"{seed} {purpose}")


def torch_generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seeded(seed, purpose).getrandbits(63))


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def build(args: argparse.Namespace) -> tuple[Policy, Task]:
    """The model asked for, and the task that it solves sometimes."""
    if args.model == "smollm2":
        return build_smollm2_policy(args.device), OneDigitSums(held_out=args.held_out)
    return build_char_policy(args.device), SpellBackward(held_out=args.held_out)


def warmed_up(args: argparse.Namespace, policy: Policy, task: Task) -> int | None:
    """Bring the policy to its starting point; the supervised steps that took, None where they were read from a file."""
    if args.warm_start is not None and args.warm_start.exists():
        policy.model.load_state_dict(torch.load(args.warm_start, map_location=policy.device, weights_only=True))
        return None
    if args.warmup_steps == 0:
        return 0
    steps = warm_up(
        policy,
        task,
        max_steps=args.warmup_steps,
        target_accuracy=args.warmup_accuracy,
        lr=args.warmup_lr,
        batch_size=args.warmup_batch,
        rng=seeded(args.seed, "warm-up"),
        generator=torch_generator(args.seed, "warm-up", policy.device),
    )
    if args.warm_start is not None:
        args.warm_start.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(args.warm_start, lambda file: torch.save(policy.model.state_dict(), file))
    return steps


def policy_loss(
    args: argparse.Namespace, outputs: Sequence[torch.Tensor], rollouts: Rollouts, margin: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss of one batch of rollouts, its ConSPO metrics, and the log-probabilities of the sampled tokens.

    outputs: the logits, or hidden states and the lm_head's weight.
    """
    first, *head = outputs
    labels, mask = rollouts.batch.last_columns(first)
    tokens: dict[str, Any] = {"response_mask": mask, "shift": True, "implementation": args.implementation}
    contrast: dict[str, Any] = {"tau": args.tau, "margin": margin}
    if args.loss == "conspo":
        more = {"temperature": args.temperature, **tokens, **contrast}
        groups = (labels, rollouts.rewards, args.group_size)
        if head:
            output = linear_conspo_loss(first, head[0], *groups, return_metrics=True, **more)
        else:
            output = conspo_loss(first, *groups, inplace_backward=True, return_metrics=True, **more)
        assert output.logprobs is not None  # these are of tokens
        return output.loss, output.metrics, output.logprobs
    if head:
        logprobs = linear_token_logprobs(first, head[0], labels, temperature=args.temperature, **tokens)
    else:
        logprobs = token_logprobs(first, labels, temperature=args.temperature, inplace_backward=True, **tokens)
    scores = sequence_scores(logprobs, labels, **tokens)
    # The baseline is seen through the same instruments: the ConSPO metrics of its scores, which it does not optimise.
    seen = conspo_loss_from_scores(
        scores.detach(),
        rollouts.rewards,
        args.group_size,
        implementation=args.implementation,
        return_metrics=True,
        **contrast,
    )
    return grpo_loss(scores, rollouts.rewards, args.group_size), seen.metrics, logprobs.detach()


def reinforce(args: argparse.Namespace, policy: Policy, task: Task, log: StepLog, summary: dict[str, Any]) -> None:
    """On-policy steps: sample, verify, one update; every rollout is used once."""
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=args.lr)
    margin_at = CosineMargin(args.steps, args.margin, args.margin_warmup)
    prompt_rng = seeded(args.seed, "prompts")
    generator = torch_generator(args.seed, "rollouts", policy.device)
    with tqdm(range(args.steps), desc=args.loss, unit="step") as bar:
        for step in bar:
            started = clock(policy.device)
            rollouts = sample(
                policy,
                task,
                task.draw(prompt_rng, args.prompts_per_step),
                copies=args.group_size,
                temperature=args.temperature,
                generator=generator,
            )
            if args.fused_linear:
                outputs = [policy.hidden(rollouts.batch), policy.head]
            else:
                outputs = [policy.logits(rollouts.batch)]
            # loss.backward() in two parts, so that the loss can be timed apart from the model.
            loss_started = clock(policy.device)
            with policy.autocast():
                loss, metrics, logprobs = policy_loss(args, outputs, rollouts, margin_at(step))
            grads = torch.autograd.grad(loss, outputs)
            loss_seconds = clock(policy.device) - loss_started
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, grads)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), args.max_grad_norm)
            optimizer.step()
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "reward_mean": rollouts.rewards.mean().item(),
                "grad_norm": grad_norm.item(),
                "sampled_logprob_mean": logprobs.sum().item() / rollouts.lengths.sum().item(),
                "response_length_mean": rollouts.lengths.float().mean().item(),
                "finished_fraction": rollouts.finished.float().mean().item(),
                **{name: value.item() for name, value in metrics.items()},
                "loss_seconds": loss_seconds,
                "seconds": clock(policy.device) - started,
            }
            log.add(row)
            summary["steps"] = step + 1
            bar.set_postfix(reward=f"{row['reward_mean']:.3f}", gap=f"{row['conspo/score_gap']:.3f}")


def evaluate(args: argparse.Namespace, policy: Policy, task: Task, moment: str, summary: dict[str, Any]) -> None:
    """Held-out accuracy, sampled and greedy, into the summary; the same random numbers before and after."""
    summary[f"accuracy_{moment}"] = accuracy(
        policy,
        task,
        task.held_out,
        samples=args.eval_samples,
        generator=torch_generator(args.seed, "evaluation", policy.device),
        label=f"accuracy {moment}",
    )
    summary["details"][f"greedy_accuracy_{moment}"] = accuracy(policy, task, task.held_out, samples=1, generator=None)


def demo(args: argparse.Namespace, log: StepLog, summary: dict[str, Any]) -> None:
    """Warm up, evaluate, reinforce, evaluate; the summary is filled as each is reached."""
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    policy, task = build(args)
    details = summary["details"]
    summary["model"] = policy.name
    details.update(task=task.name, device=policy.device.type, parameters=policy.model.num_parameters())

    started = time.perf_counter()
    details["warmup_steps"] = warmed_up(args, policy, task)
    details["warmup_seconds"] = round(time.perf_counter() - started, 1)
    evaluate(args, policy, task, "before", summary)
    started = time.perf_counter()
    reinforce(args, policy, task, log, summary)
    details["reinforcement_seconds"] = round(time.perf_counter() - started, 1)
    evaluate(args, policy, task, "after", summary)


def write_results(out: Path, log: StepLog, summary: dict[str, Any]) -> None:
    """The summary, with the cost of a step and of the loss in it (from its inputs to their gradients), and the plot."""
    if log.rows:
        summary["details"]["seconds_per_step"] = round(statistics.median(row["seconds"] for row in log.rows), 4)
        share = statistics.median(row["loss_seconds"] / row["seconds"] for row in log.rows)
        summary["details"]["loss_share_of_step"] = round(share, 4)
    write_json(out / "summary.json", summary)
    if log.rows:
        title = f"{summary['model']}, {summary['details']['task']}, {summary['loss']}, seed {summary['seed']}"
        plot_run(log.rows, out / "curve.png", title)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv, __doc__.split("\n\n")[0])
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "curve.png", "summary.json"):  # an earlier run's files are not this run's
        (args.out / name).unlink(missing_ok=True)
    settings = {
        name: str(value) if isinstance(value, Path | torch.device) else value for name, value in vars(args).items()
    }
    summary: dict[str, Any] = {
        "model": None,
        "loss": args.loss,
        "seed": args.seed,
        "steps": 0,
        "seconds": 0.0,
        "accuracy_before": None,
        "accuracy_after": None,
        "settings": settings,
        "details": {"interrupted": False},
    }
    log = StepLog(args.out / "metrics.jsonl")
    started = time.perf_counter()
    try:
        demo(args, log, summary)
    except KeyboardInterrupt:
        summary["details"]["interrupted"] = True
    finally:
        log.close()
        summary["seconds"] = round(time.perf_counter() - started, 1)
        write_results(args.out, log, summary)
    if summary["details"]["interrupted"]:
        print(f"interrupted after {summary['steps']} of {args.steps} steps; {args.out} holds what was reached")
        return INTERRUPTED
    for kind, values in (("sampled", summary), ("greedy", summary["details"])):
        prefix = "greedy_" if kind == "greedy" else ""
        before, after = values[f"{prefix}accuracy_before"], values[f"{prefix}accuracy_after"]
        print(f"held-out accuracy, {kind}: {before:.3f} -> {after:.3f}")
    print(f"{summary['seconds']:.0f} s; metrics.jsonl, curve.png and summary.json are in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
