"""What runs in the executor, in a process of its own where Triton does not interpret:

    python tests/support/executed.py FUNCTION [argument ...]

prints the function's result as JSON. The tests that read it are in `test_executed.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.compiled import (
    CASES,
    TARGETS,
    call_group_infonce,
    call_over,
    call_sequence_score,
    call_token_logprob,
    offline,
)
from conspo_kernels.backends.triton import (
    group_infonce,
    obstacle,
    row_kernels,
    rows,
    scale,
    sequence_score,
    softmax,
    token_logprob,
)
from conspo_kernels.reference import group_losses, prompt_groups
from conspo_kernels.values import LogitRows, LogitTransform
from ptx_executor import Fault, compiled, driver
from ptx_executor.execute import Program

FUNCTIONS = [
    function
    for module in (softmax, rows, row_kernels, sequence_score, group_infonce, scale)
    for function in vars(module).values()
    if isinstance(function, JITFunction)
]


def worst(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute error."""
    return (actual.double() - exact).abs().max().item()


def token_errors(result: tuple[Any, ...]) -> dict[str, float]:
    """Errors of a call of `call_token_logprob`; that of the gradient relative to the largest of its row."""
    (logits, labels, transform, _start), statistics, grad = result
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


def known_errors(result: tuple[Any, ...]) -> dict[str, float]:
    """Of `call_forward_backward`, likewise."""
    (logits, labels, _transform, _start), logprobs, grad = result
    leaf = logits.double().requires_grad_()
    expected = leaf.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    (exact,) = torch.autograd.grad(expected.sum(), leaf)
    size = exact.abs().amax(-1, keepdim=True)
    return {"logprobs": worst(logprobs, expected.detach()), "gradient": worst(grad / size, exact / size)}


def score_errors(result: tuple[Any, ...]) -> dict[str, float]:
    logprobs, scores, grad = result
    exact = logprobs.double().mean(-1)
    return {"scores": worst(scores, exact), "gradient": worst(grad, exact[:, None].expand(grad.shape) / grad.shape[1])}


def group_errors(result: tuple[Any, ...]) -> dict[str, float]:
    scores, rollouts, objective, (value, weights_of_scores) = result
    leaf = scores.double().requires_grad_()
    groups = prompt_groups(4, rollouts.rewards, [1] * len(scores), objective.reward_threshold)
    losses = group_losses(list(leaf), groups, objective.tau, objective.margin.item())
    loss = torch.stack(list(losses.values())).mean()
    (weights,) = torch.autograd.grad(loss, leaf)
    return {"loss": worst(value, loss.detach()), "weights": worst(weights_of_scores, weights)}


def scale_errors(result: tuple[Any, ...]) -> dict[str, float]:
    before, after = result
    return {"scaled": worst(after, before.double() / 2)}


def errors_of(case: str, result: tuple[Any, ...]) -> dict[str, float]:
    kinds: dict[str, Callable[[tuple[Any, ...]], dict[str, float]]] = {
        "padded": score_errors, "packed": score_errors, "equal groups": group_errors, "ragged groups": group_errors,
        "bf16, by a scalar": scale_errors,
    }  # fmt: skip
    return kinds.get(case, known_errors if case.startswith("known") else token_errors)(result)


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
    """Every case of `benchmarks.compiled`, which wants the machine code: the kernels executed, and their errors."""
    result = {}
    for seed, (case, call) in enumerate(CASES.items()):
        with compiled(target, seed=seed, assembled=True), recorded() as names:
            result[case] = {"errors": errors_of(case, call()), "kernels": names}
    return result


# Faults, planted one by one: where, and what stands there instead.


def forget(*functions: JITFunction) -> None:
    """What was compiled of a source that has changed."""
    for function in functions:
        function.hash = None
        function.device_caches.clear()


@contextlib.contextmanager
def planted(function: JITFunction, old: str, new: str) -> Iterator[None]:
    """Another source of a function, and of the kernels that call it."""
    source = function.src
    assert source.count(old) == 1, (old, source)
    try:
        function._unsafe_update_src(source.replace(old, new))
        forget(*FUNCTIONS)
        yield
    finally:
        function._unsafe_update_src(source)
        forget(*FUNCTIONS)


def fault_of(call: Callable[[], object], target: str = "sm_90") -> str:
    """The message of the fault that a call ends with, or nothing."""
    try:
        with compiled(target):
            call()
    except Fault as fault:
        return str(fault)
    return ""


def unaligned_rows() -> LogitRows:
    """Of a tile and more. The second row begins two bytes off, and the tensor ends with it."""
    logits = torch.randn(1, 2, 5001, dtype=torch.bfloat16)
    return LogitRows(logits, torch.tensor([[5, 5000]]), LogitTransform())


def without_barriers(call: Callable[[], object], kernel: str) -> list[str]:
    """The faults of a call without the first barrier of a kernel, without the second, ..."""
    decode = driver.program_of
    faults: list[str] = []
    count = 1
    while len(faults) < count:

        def changed(text: str) -> Program:
            nonlocal count
            if f".entry {kernel}(" in text:
                pieces = text.split("bar.sync \t0;")
                count = len(pieces) - 1
                gap = len(faults)
                kept = [*pieces[:gap], pieces[gap] + pieces[gap + 1], *pieces[gap + 2 :]]
                text = "bar.sync \t0;".join(kept)
            return decode(text)

        driver.program_of = changed  # type: ignore[assignment]
        forget(*FUNCTIONS)
        try:
            faults.append(fault_of(call))
        finally:
            driver.program_of = decode
            forget(*FUNCTIONS)
    return faults


def faults() -> dict[str, Any]:
    """What the executor says of each planted fault."""
    given = unaligned_rows()

    def forward() -> object:
        return token_logprob.forward(given, False)

    result: dict[str, Any] = {"none": fault_of(forward)}
    with planted(rows.edges, "row + vocab_size - last", "row + vocab_size + 1 - last"):
        result["mask"] = fault_of(forward)
    load = "tl.load({}, eviction_policy=KEEP)"
    hint = load.format("tl.max_contiguous(tl.multiple_of(logits_ptr + start + lanes, (16, 16)), (1, VECTOR))")
    with (
        planted(rows.interior, "return first * VECTOR,", "return row,"),
        planted(row_kernels._chunk_statistics, load.format("logits_ptr + start + lanes"), hint),
    ):
        result["hint"] = fault_of(forward)
    result["barriers, statistics"] = without_barriers(forward, "_statistics_kernel")
    result["barriers, over"] = without_barriers(lambda: call_over(9023, known=False), "_backward_kernel")
    result["barriers, scores"] = without_barriers(lambda: call_sequence_score(False, 300), "_forward_kernel")
    with planted(softmax.grad_tile, "scale * inner * 4", "scale * inner * 3.9"), compiled("sm_90"):
        result["constant"] = token_errors(call_token_logprob(torch.randn(1, 2, 4097), softcap=30.0))["gradient"]
    with compiled("sm_90"):
        result["no constant"] = token_errors(call_token_logprob(torch.randn(1, 2, 4097), softcap=30.0))["gradient"]
    return result


class RandomStatistics:
    """In place of the statistics kernel: partial statistics as those of random logits."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(base: Tensor, labels: Tensor, partial: Tensor, *rest: object, **constants: object) -> None:
            m, s, *w = partial.view(-1, 3 if constants["HAS_ENTROPY"] else 2).unbind(1)
            m.normal_(4, 0.3)
            s.uniform_(100, 2000)
            for moment in w:
                moment.uniform_(-5000, -100)

        return launch


def combined(target: str, num_chunks: int, with_entropy: bool, fused: bool) -> str:
    """The fault of the combine kernel on rows of so many chunks, its products fused with sums or not."""
    vocab_size = (num_chunks - 1) * rows.CHUNK_BYTES // 2 + 8
    logits = torch.zeros(1, 1, vocab_size, dtype=torch.bfloat16).expand(1, 512, vocab_size)
    given = LogitRows(logits, torch.zeros(1, 512, dtype=torch.int64), LogitTransform())
    kernel, statistics = token_logprob._combine_kernel, token_logprob._statistics_kernel
    run = kernel.run
    token_logprob._statistics_kernel = RandomStatistics()
    if fused:
        kernel.run = lambda *values, **options: run(*values, **options | {"enable_fp_fusion": True})
    try:
        return fault_of(lambda: token_logprob.forward(given, with_entropy), target)
    finally:
        token_logprob._statistics_kernel, kernel.run = statistics, run


def combines(target: str) -> dict[str, list[str]]:
    """Their faults, as they are launched and with products fused."""
    kinds = [(num_chunks, with_entropy) for num_chunks in (5, 10, 19) for with_entropy in (False, True)]
    return {name: [combined(target, *kind, fused=name == "fused") for kind in kinds] for name in ("launched", "fused")}


def reductions(target: str) -> list[str]:
    """The faults of other kernels that reduce over lanes: groups larger than a tile, rollouts longer than a block."""
    result = []
    for ragged in (False, True):
        rewards = torch.rand(20 * 33).round()
        result.append(fault_of(lambda: call_group_infonce(ragged, 20, 33, 0.1, rewards), target))  # noqa: B023  called here
        result.append(fault_of(lambda: call_sequence_score(ragged, 5001), target))  # noqa: B023
    return result


FAR_LABELS = (2**32, 2**32 + 3, 2**40 + 3, -(2**40))


def far_labels(device: str = "cpu") -> dict[str, Any]:
    """Labels beyond 32 bits, which the public functions refuse on a CPU: log-probabilities that are not NaN, and the
    largest error of the gradient, which has no label's term; of a row less than a tile, more, and more than a chunk."""
    result = {}
    assert obstacle(torch.device(device)) is None  # asked first, as ops do: it mends Triton 3.6's interpreter
    for vocab_size in (1000, 5003, 40_000):
        logits = torch.randn(1, len(FAR_LABELS), vocab_size, dtype=torch.bfloat16, device=device)
        given = LogitRows(logits, torch.tensor([FAR_LABELS], device=device), LogitTransform())
        statistics = token_logprob.forward(given, False)
        grad = torch.empty_like(logits)
        token_logprob.backward(grad, given, statistics.incoming(torch.ones(1, len(FAR_LABELS), device=device)))
        result[str(vocab_size)] = [
            int((~statistics.logprobs.isnan()).sum()), worst(grad, -logits.double().softmax(-1)), grad.max().item(),
        ]  # fmt: skip
    return result


def compiled_before(target: str) -> list[int]:
    """Kernels in Triton's cache that are compiled to machine code, then executed from there, then without it."""
    counts = []
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        for context in (offline(TARGETS[target]), compiled(target, assembled=True), compiled(target)):
            with context:
                call_sequence_score(False, 300)
            forget(*FUNCTIONS)
            counts.append(len(list(Path(folder).rglob("*.ptx"))))
    return counts


def far_labels_executed(target: str) -> dict[str, Any]:
    with compiled(target):
        return far_labels()


# dtype, vocabulary, elements before the first logit, elements between the rows, softcap, entropy, in place
HOSTILE = (
    ("bfloat16", 1, 0, 0, None, False, False), ("float32", 1, 1, 2, 2.0, True, False),
    ("bfloat16", 7, 3, 0, None, True, True), ("float16", 9, 5, 3, None, False, False),
    ("float64", 3, 1, 1, 5.0, True, True), ("float32", 16, 2, 0, None, False, True),
    ("bfloat16", 4095, 1, 1, 30.0, True, True), ("bfloat16", 4113, 7, 12, None, False, False),
    ("float16", 32_768 + 4097, 3, 2, None, True, True), ("float32", 16_384 + 2049, 1, 0, 30.0, False, True),
    ("float64", 8192 + 1025, 1, 4, None, True, False), ("float16", 5000, 0, 8, 3.0, False, True),
)  # fmt: skip


def hostile(target: str) -> list[dict[str, Any]]:
    """Odd sizes, rows that begin off 16 bytes with foreign numbers around them, ignored tokens, masked entries, and no
    tokens at all; approximate instructions are perturbed. Errors are absolute, gradients those of a sum."""
    result = []
    for seed, (dtype, vocab_size, early, gap, softcap, with_entropy, inplace) in enumerate(HOSTILE):
        stride = vocab_size + gap
        buffer = torch.full((early + 6 * stride + early,), torch.nan, dtype=getattr(torch, dtype))
        logits = buffer.as_strided((2, 3, vocab_size), (3 * stride, stride, 1), early)
        logits.copy_(torch.randn(logits.shape) * 3)
        labels = torch.tensor([[0, vocab_size - 1, -1], [vocab_size // 2, -1, 0]])
        if vocab_size > 2:
            logits[0, 0, 1] = logits[1, 0, -1] = -torch.inf
        given = LogitRows(logits, labels, LogitTransform(softcap=softcap))
        before = logits.double().clone()  # of fp64 it would be the logits themselves
        ones = torch.ones(2, 3).to(torch.promote_types(logits.dtype, torch.float32))
        with compiled(target, perturb=seed, seed=seed):
            nothing = LogitRows(logits[:, :0], labels[:, :0].contiguous(), given.transform)
            assert token_logprob.forward(nothing, with_entropy).logprobs.shape == (2, 0)
            statistics = token_logprob.forward(given, with_entropy)
            grad = logits if inplace else torch.empty_like(logits)
            incoming = statistics.incoming(ones, ones.clone() if with_entropy else None)
            token_logprob.backward(grad, given, incoming)
        leaf = before.requires_grad_()
        y = leaf if softcap is None else torch.where(leaf == -torch.inf, leaf, softcap * torch.tanh(leaf / softcap))
        full = y.log_softmax(-1)
        active = labels >= 0
        logprobs = full.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * active
        entropy = -(full.exp() * full.masked_fill(full == -torch.inf, 0)).sum(-1) * active
        (exact,) = torch.autograd.grad((logprobs + (entropy if with_entropy else 0)).sum(), leaf)
        untouched = buffer.isnan().sum().item() == len(buffer) - logits.numel()
        errors = {"logprobs": worst(statistics.logprobs, logprobs), "gradient": worst(grad, exact)}
        if statistics.entropy is not None:
            errors["entropy"] = worst(statistics.entropy, entropy)
        result.append({"dtype": dtype, "vocab_size": vocab_size, "errors": errors, "untouched": untouched})
    return result


def main() -> None:
    name, *arguments = sys.argv[1:]
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
