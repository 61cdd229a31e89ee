"""What runs in the executor, in a process of its own where Triton does not interpret:

    python tests/executed.py FUNCTION [argument ...]

prints the function's result as JSON. The tests that read it are in `test_executed.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.compiled import CASES, call_sequence_score, call_token_logprob
from conspo_kernels import conspo_loss, token_logprobs
from conspo_kernels.backends.triton import group_infonce, rows, scale, sequence_score, softmax, token_logprob
from conspo_kernels.objective import GroupLoss
from conspo_kernels.ptx import Fault, compiled, driver
from conspo_kernels.ptx.execute import Program
from conspo_kernels.reference import group_losses, prompt_groups
from conspo_kernels.values import LogitRows, LogitTransform, Upstream

KERNELS = (
    token_logprob._statistics_kernel, token_logprob._combine_kernel, token_logprob._backward_kernel,
    sequence_score._forward_kernel, sequence_score._backward_kernel, group_infonce._kernel, scale._kernel,
)  # fmt: skip


def worst(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute error."""
    return (actual.double() - exact).abs().max().item()


def token_errors(result: tuple[Any, ...]) -> dict[str, float]:
    """Errors of a call of `call_token_logprob`; that of the gradient relative to the largest of its row."""
    (logits, labels, transform), statistics, grad = result
    leaf = logits.double().requires_grad_()
    y = leaf if transform.softcap is None else transform.softcap * torch.tanh(leaf / transform.softcap)
    full = y.log_softmax(-1)
    logprobs = full.gather(-1, labels[..., None])[..., 0]
    errors = {"logprobs": worst(statistics.logprobs, logprobs)}
    total = (logprobs * statistics.logprobs).sum()
    if statistics.entropy is not None:
        entropy = -(full.exp() * full).sum(-1)
        errors["entropy"] = worst(statistics.entropy, entropy)
        total = total + (entropy * statistics.entropy).sum()
    (exact,) = torch.autograd.grad(total, leaf)
    size = exact.abs().amax(-1, keepdim=True)
    return errors | {"gradient": worst(grad / size, exact / size)}


def score_errors(result: tuple[Any, ...]) -> dict[str, float]:
    logprobs, scores, grad = result
    exact = logprobs.double().mean(-1)
    return {"scores": worst(scores, exact), "gradient": worst(grad, exact[:, None].expand(grad.shape) / grad.shape[1])}


def group_errors(result: tuple[Any, ...]) -> dict[str, float]:
    rollouts, settings, found = result
    assert isinstance(found, GroupLoss)
    leaf = rollouts.scores.double().requires_grad_()
    groups = prompt_groups(4, rollouts.rewards, rollouts.counts.tolist(), settings.reward_threshold)
    losses = group_losses(list(leaf), groups, settings.tau, settings.margin.item())
    loss = torch.stack(list(losses.values())).mean()
    (weights,) = torch.autograd.grad(loss, leaf)
    return {"loss": worst(found.loss, loss.detach()), "weights": worst(found.weights, weights)}


def scale_errors(result: tuple[Any, ...]) -> dict[str, float]:
    before, after = result
    return {"scaled": worst(after, before.double() / 2)}


def errors_of(case: str, result: tuple[Any, ...]) -> dict[str, float]:
    kinds: dict[str, Callable[[tuple[Any, ...]], dict[str, float]]] = {
        "padded": score_errors, "packed": score_errors, "equal groups": group_errors, "ragged groups": group_errors,
        "bf16, by a scalar": scale_errors,
    }  # fmt: skip
    return kinds.get(case, token_errors)(result)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the kernels that are executed."""
    names: list[str] = []
    run = Program.run

    def recording(self: Program, *arguments: Any) -> None:
        names.append(self.function.name)
        run(self, *arguments)

    Program.run = recording  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Program.run = run  # type: ignore[method-assign]


def cases(target: str) -> dict[str, Any]:
    """Every case of `benchmarks.compiled`: the kernels that it executes, and their errors."""
    found = {}
    for seed, (case, call) in enumerate(CASES.items()):
        with compiled(target, seed=seed), recorded() as names:
            found[case] = {"errors": errors_of(case, call()), "kernels": names}
    return found


# Faults, planted one by one: where, and what stands there instead.


def forget(*functions: JITFunction) -> None:
    """What was compiled of a source that has changed."""
    for function in functions:
        function.hash = None
        function.device_caches.clear()


@contextlib.contextmanager
def planted(function: JITFunction, old: str, new: str) -> Iterator[None]:
    """Another source of a function, and of the kernels that call it."""
    callers = [softmax.grad_tile, token_logprob._backward_tile, *KERNELS]
    source = function.src
    assert source.count(old) == 1, (old, source)
    try:
        function._unsafe_update_src(source.replace(old, new))
        forget(*callers)
        yield
    finally:
        function._unsafe_update_src(source)
        forget(*callers)


def fault_of(call: Callable[[], object]) -> str:
    """The message of the fault that a call ends with, or nothing."""
    try:
        with compiled("sm_90"):
            call()
    except Fault as fault:
        return str(fault)
    return ""


def unaligned_rows() -> LogitRows:
    """V 4,097, so that the second row begins two bytes off, in a tensor that ends with its last row."""
    logits = torch.randn(1, 2, 4097, dtype=torch.bfloat16)
    return LogitRows(logits, torch.tensor([[5, 4096]]), LogitTransform())


def without_barriers(call: Callable[[], object], kernel: str) -> list[str]:
    """The faults of a call without the first barrier of a kernel, without the second, ..."""
    decode = driver._Utilities.load_binary
    faults: list[str] = []
    count = 1
    while len(faults) < count:

        def load(self: Any, name: str, binary: bytes, *rest: Any) -> Any:
            nonlocal count
            if name == kernel:
                pieces = binary.decode().split("bar.sync \\t0;")
                count = len(pieces) - 1
                gap = len(faults)
                kept = [*pieces[: gap], pieces[gap] + pieces[gap + 1], *pieces[gap + 2 :]]
                binary = "bar.sync \\t0;".join(kept).encode()
            return decode(self, name, binary, *rest)

        driver._Utilities.load_binary = load  # type: ignore[method-assign]
        forget(*KERNELS)
        try:
            faults.append(fault_of(call))
        finally:
            driver._Utilities.load_binary = decode  # type: ignore[method-assign]
            forget(*KERNELS)
    return faults


def faults() -> dict[str, Any]:
    """What the executor says of each planted fault."""
    given = unaligned_rows()

    def forward() -> object:
        return token_logprob.forward(given, False)

    found: dict[str, Any] = {"none": fault_of(forward)}
    with planted(rows.edges, "row + vocab_size)\n", "row + vocab_size + 1)\n"):
        found["mask"] = fault_of(forward)
    with planted(rows.interior, "first = tl.cdiv(row, VECTOR)", "first = row // VECTOR"):
        found["bounds of the interior"] = fault_of(forward)
    with planted(rows.interior, "return first * VECTOR,", "return tl.multiple_of(row, VECTOR),"):
        found["hint"] = fault_of(forward)
    found["barriers, statistics"] = without_barriers(forward, "_statistics_kernel")
    found["barriers, scores"] = without_barriers(lambda: call_sequence_score(False, 300), "_forward_kernel")
    with planted(softmax.grad_tile, "scale * inner * 4", "scale * inner * 3.9"), compiled("sm_90"):
        found["constant"] = token_errors(call_token_logprob(torch.randn(1, 2, 4097), softcap=30.0))["gradient"]
    with compiled("sm_90"):
        found["no constant"] = token_errors(call_token_logprob(torch.randn(1, 2, 4097), softcap=30.0))["gradient"]
    return found


def main() -> None:
    name, *arguments = sys.argv[1:]
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
