"""Reinforcement learning with verifiable rewards, start to end in minutes on two cores: the demo of conspo_kernels.

A small Llama learns to spell words backward. Supervised steps first, until it solves some prompts but not most; then
ConSPO (or GRPO, with as many rollouts) on its own samples, marked right or wrong by reasoning-gym's verifier. Accuracy
on held-out words is measured before and after.

    python examples/train.py                       # ConSPO, files in runs/demo
    python examples/train.py --loss grpo --out runs/grpo

From a checkout that is not installed, put it on the path first: `PYTHONPATH=. python examples/train.py`.
The same seed, threads and machine give the same run on a CPU. Ctrl-C leaves whole files of what was reached.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_task import SpellBackward
from grpo import grpo_loss
from plot import plot_run
from policy import Policy, build_policy
from records import StepLog, replace_atomically, write_json
from rollout import Rollouts, accuracy, sample
from tqdm import tqdm
from transformers import set_seed
from warmup import warm_up

from conspo_kernels import CosineMargin, conspo_loss, conspo_loss_from_scores, sequence_scores, token_logprobs

INTERRUPTED = 130  # the shell's exit code for a process ended by Ctrl-C


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--loss", choices=("conspo", "grpo"), default="conspo")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=200, help="reinforcement learning steps")
    add("--prompts-per-step", type=int, default=32)
    add("--group-size", type=int, default=8, help="rollouts per prompt")
    add("--lr", type=float, default=1e-4, help="Adam's learning rate")
    add("--max-grad-norm", type=float, default=1.0)
    add("--temperature", type=float, default=1.0, help="of the rollouts and of the loss; evaluation is at 1")
    add("--tau", type=float, default=1.0, help="temperature of the contrast between rollouts, nats per token")
    add("--margin", type=float, default=0.5, help="target margin, nats per token")
    add("--margin-warmup", type=float, default=0.5, help="fraction of the steps over which the margin rises")
    add("--warmup-steps", type=int, default=2000, help="supervised steps at most")
    add("--warmup-accuracy", type=float, default=0.35, help="sampled accuracy at which the supervised steps end")
    add("--warmup-lr", type=float, default=5e-4)
    add("--warmup-batch", type=int, default=64, help="words per supervised step")
    add("--warm-start", type=Path, help="file that keeps the warmed-up weights: read if it is there, else written")
    add("--held-out", type=int, default=512, help="words kept for evaluation")
    add("--eval-samples", type=int, default=4, help="samples per held-out word")
    add("--implementation", choices=("auto", "torch", "triton", "native"), default="auto")
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")
    # Matrices of 128 columns leave little to share, and threads wait for each other where another process wants a core.
    add("--threads", type=int, default=1, help="CPU threads; the model is too small to gain much from more")
    add("--out", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args(argv)
    counts = ("steps", "prompts_per_step", "warmup_steps", "warmup_batch", "held_out", "eval_samples", "threads")
    for name in counts:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.group_size < 2:
        parser.error(f"--group-size must be at least 2 for a contrast, got {arguments.group_size}")
    return arguments


def seeded(seed: int, purpose: str) -> random.Random:
    """A stream of its own for each purpose: a change in one (more warm-up, no warm-up) leaves the others alone."""
    return random.Random(f"{seed} {purpose}")


def torch_generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seeded(seed, purpose).getrandbits(63))


def warmed_up(args: argparse.Namespace, policy: Policy, task: SpellBackward) -> int | None:
    """Bring the policy to its starting point; the supervised steps that took, None where they were read from a file."""
    if args.warm_start is not None and args.warm_start.exists():
        policy.model.load_state_dict(torch.load(args.warm_start, map_location=policy.device, weights_only=True))
        return None
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
    args: argparse.Namespace, policy: Policy, rollouts: Rollouts, margin: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The loss of one batch of rollouts, its ConSPO metrics, and the log-probabilities of the sampled tokens."""
    batch = rollouts.batch
    tokens: dict[str, Any] = {"mask": batch.response_mask, "shift": True, "implementation": args.implementation}
    contrast: dict[str, Any] = {"tau": args.tau, "margin": margin}
    logits = batch.logits(policy)
    if args.loss == "conspo":
        output = conspo_loss(
            logits,
            batch.input_ids,
            rollouts.rewards,
            args.group_size,
            temperature=args.temperature,
            inplace_backward=True,
            return_metrics=True,
            **tokens,
            **contrast,
        )
        return output.loss, output.metrics, output.logprobs
    logprobs = token_logprobs(logits, batch.input_ids, temperature=args.temperature, inplace_backward=True, **tokens)
    scores = sequence_scores(logprobs, batch.input_ids, **tokens)
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


def reinforce(
    args: argparse.Namespace, policy: Policy, task: SpellBackward, log: StepLog, summary: dict[str, Any]
) -> None:
    """On-policy steps: sample, verify, one update; every rollout is used once."""
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=args.lr)
    margin_at = CosineMargin(args.margin, args.margin_warmup, args.steps)
    prompt_rng = seeded(args.seed, "prompts")
    generator = torch_generator(args.seed, "rollouts", policy.device)
    with tqdm(range(args.steps), desc=args.loss, unit="step") as bar:
        for step in bar:
            started = time.perf_counter()
            rollouts = sample(
                policy,
                task,
                task.draw(prompt_rng, args.prompts_per_step),
                copies=args.group_size,
                temperature=args.temperature,
                generator=generator,
            )
            loss, metrics, logprobs = policy_loss(args, policy, rollouts, margin_at(step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
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
                "seconds": time.perf_counter() - started,
            }
            log.add(row)
            summary["steps"] = step + 1
            bar.set_postfix(reward=f"{row['reward_mean']:.3f}", gap=f"{row['conspo/score_gap']:.3f}")


def evaluate(
    args: argparse.Namespace, policy: Policy, task: SpellBackward, moment: str, summary: dict[str, Any]
) -> None:
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    policy = build_policy(torch.device(device))
    task = SpellBackward(held_out=args.held_out)
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
    write_json(out / "summary.json", summary)
    if log.rows:
        title = f"{summary['model']}, {summary['details']['task']}, {summary['loss']}, seed {summary['seed']}"
        plot_run(log.rows, out / "curve.png", title)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "curve.png", "summary.json"):  # an earlier run's files are not this run's
        (args.out / name).unlink(missing_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
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
