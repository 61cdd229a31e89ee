"""TRL's loss head on this library's ops: the numbers of TRL's own functions, in every trainer, and it undoes itself.

On a CPU TRL's `ChunkedLogProbFunction` folds its tiles with PyTorch, and `selective_log_softmax_and_entropy` is eager
PyTorch: these are what ours is compared with. TRL's Triton kernel of log-probabilities and entropies is compared too,
under Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.kernels
import trl.trainer.utils
import trl_parts as parts
from datasets import Dataset
from tolerance import assert_accurate, value_floor
from torch import Tensor

from conspo_kernels.integrations.trl import (
    disable_fused_loss_head,
    enable_fused_loss_head,
    fused_loss_head,
    loss_head,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_place(name: str) -> Any:
    """What TRL's modules call by this name now."""
    return getattr(trl.trainer.utils, name)


def exact_logprobs(
    logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In fp64: log-probabilities and entropies of logits before the temperature."""
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, index[..., None])[..., 0]
    keep = torch.ones_like(chosen) if mask is None else mask.to(chosen)
    return chosen * keep, entropy * keep


def differentiated(function: Callable[..., Any], leaves: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    """Values and the gradients by the leaves of their sum weighted by seeds, of one function."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    values = function(*leaves)
    total = sum((value * seed.to(value)).sum() for value, seed in zip(values, seeds, strict=True))
    return [*(value.detach() for value in values), *torch.autograd.grad(total, leaves)]


def compare(dtype: torch.dtype, ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], values: int) -> None:
    for i, (got, eager, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        scale = torch.float32 if i < values else dtype
        floor = (
            value_floor(right, torch.float32) if i < values else 8 * torch.finfo(scale).eps * right.abs().max().item()
        )
        assert_accurate(got, eager, right, floor, f"number {i}")


@pytest.mark.parametrize("seed", range(100))
def test_chunked_logprobs_equal_trls(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(DTYPES)
    # Logits of 16 bits are rounded in one way or another: of many tokens the largest errors are alike, of few by luck.
    tokens = rng.randint(1 if dtype == torch.float32 else 32, 64)
    hidden, vocabulary = rng.randint(1, 24), rng.choice((1, 7, 64, 257, 1500))
    temperature, scale = rng.choice((1.0, 0.6, 1.7)), rng.choice((1.0, 0.25, 3.0))
    softcap, with_entropy = rng.choice((None, 5.0, 30.0)), rng.random() < 0.7
    leaves = [torch.randn(tokens, hidden, generator=generator), torch.randn(vocabulary, hidden, generator=generator)]
    leaves += [torch.randn(vocabulary, generator=generator)] if rng.random() < 0.4 else []
    leaves = [x.to(DEVICE, dtype) for x in leaves]
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    seeds = [torch.randn(tokens, generator=generator).to(DEVICE) for _ in range(1 + with_entropy)]
    others = tuple(name for name in ("log_sum_sq_probs", "mean_logits", "is_top1") if rng.random() < 0.3)
    outputs = ("log_probs", *(("entropy",) if with_entropy else ()), *others)
    statistics: list[list[Tensor]] = []

    def chunked(*leaves: Tensor) -> list[Tensor]:
        bias = leaves[2] if len(leaves) > 2 else None
        result = in_place("_ChunkedLogProbFunction").apply(
            leaves[0], leaves[1], bias, targets, temperature, rng_chunk, softcap, scale, outputs
        )
        assert [x is not None for x in result[1:]] == [name in outputs for name in loss_head.ALL_STATISTICS]
        statistics.append([x for x in result[2:] if x is not None])
        assert not any(x.requires_grad for x in statistics[-1])
        return [x for x in result[:2] if x is not None]

    def exact(*leaves: Tensor) -> list[Tensor]:
        logits = torch.nn.functional.linear(*leaves[:2], leaves[2] if len(leaves) > 2 else None) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return list(exact_logprobs(logits, targets, temperature))[: len(seeds)]

    rng_chunk = rng.choice((16, 100, 4096))
    theirs = differentiated(chunked, leaves, seeds)
    with fused_loss_head(), parts.counted(loss_head, "linear_token_logprobs") as calls:
        ours = differentiated(chunked, leaves, seeds)
    assert calls == [1]
    right = differentiated(exact, [x.double() for x in leaves], seeds)
    compare(dtype, ours, theirs, right, len(seeds))
    assert all(torch.equal(a, b) for a, b in zip(*statistics, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_mixed_precision(seed: int) -> None:
    """Weights in fp32, GEMMs in bf16, TRL's default: the gradient of the weight is as good as TRL's, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((64, 16), (300, 16))]
    targets = torch.randint(300, (64,), generator=generator).to(DEVICE)
    seeds = [torch.rand(64, generator=generator).to(DEVICE) for _ in range(2)]

    def chunked(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            result = in_place("_ChunkedLogProbFunction").apply(hidden, weight, None, targets, 1.0, 128)
        return list(result[:2])

    theirs = differentiated(chunked, leaves, seeds)
    with fused_loss_head():
        ours = differentiated(chunked, leaves, seeds)
    wide = [x.double() for x in leaves]
    right = differentiated(lambda h, w: list(exact_logprobs(h @ w.T, targets, 1.0)), wide, seeds)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32] * 4
    compare(torch.bfloat16, ours[:3], theirs[:3], right[:3], 2)
    compare(torch.float32, ours[3:], theirs[3:], right[3:], 0)
    assert DEVICE == "cpu" or (ours[3] != ours[3].bfloat16().float()).any()  # a CPU rounds each product of tiles
    with fused_loss_head():
        logprobs = chunked(leaves[0], leaves[1].requires_grad_())[0].sum()
    logprobs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        logprobs.backward()


@pytest.mark.parametrize("seed", range(100))
def test_selected_logprobs_and_entropies_equal_trls(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, temperature = rng.choice(DTYPES), rng.choice((1.0, 0.6, 1.7))
    vocabulary = rng.choice((1, 7, 64, 257, 1500))
    shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 2)))
    logits = (4 * torch.randn(*shape, vocabulary, generator=generator)).to(DEVICE, dtype)
    if len(shape) == 2 and rng.random() < 0.5:  # as `logits[:, :-1]` is
        logits = torch.cat([logits, logits[:, :1]], dim=1)[:, :-1]
    index = torch.randint(vocabulary, shape, generator=generator).to(DEVICE)
    mask = (torch.rand(*shape, generator=generator) < 0.7).to(DEVICE) if rng.random() < 0.5 else None
    entropy_requires_grad = rng.random() < 0.7
    seeds = [torch.randn(*shape, generator=generator).to(DEVICE) for _ in range(3)]

    def selected(x: Tensor) -> list[Tensor]:
        both = in_place("selective_log_softmax_and_entropy")(
            x, index, entropy_requires_grad, temperature=temperature, row_mask=mask
        )
        assert both[1].requires_grad == entropy_requires_grad
        return [*both, in_place("selective_log_softmax")(x, index, temperature, mask)]

    def exact(x: Tensor) -> list[Tensor]:
        logprobs, entropy = exact_logprobs(x, index, temperature, mask)
        return [logprobs, entropy if entropy_requires_grad else entropy.detach(), logprobs]

    theirs = differentiated(selected, [logits], seeds)
    with fused_loss_head(), parts.counted(loss_head, "token_logprobs") as calls:
        ours = differentiated(selected, [logits], seeds)
    assert calls == [2]
    compare(dtype, ours, theirs, differentiated(exact, [logits.double()], seeds), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trls_kernel(dtype: torch.dtype) -> None:
    """TRL's own Triton kernel, which on a GPU is what the functions above call."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 3, 1500, generator=generator)).to(DEVICE, dtype)
    index = torch.randint(1500, (2, 3), generator=generator).to(DEVICE)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=DEVICE)
    seeds = [torch.randn(2, 3, generator=generator).to(DEVICE) for _ in range(2)]

    def kernel(x: Tensor) -> list[Tensor]:
        return list(trl.kernels.selective_log_softmax_and_entropy(x, index, temperature=0.6, row_mask=mask))

    theirs = differentiated(kernel, [logits], seeds)
    with fused_loss_head(), parts.counted(loss_head, "token_logprobs") as calls:
        ours = differentiated(kernel, [logits], seeds)
        assert trl.trainer.utils._fused_logprob_entropy is trl.kernels.selective_log_softmax_and_entropy
    assert calls == [1]
    right = differentiated(lambda x: list(exact_logprobs(x, index, 0.6, mask)), [logits.double()], seeds)
    compare(dtype, ours, theirs, right, 2)


def test_other_shapes() -> None:
    logits, index = torch.randn(2, 3, 2, 11), torch.randint(11, (2, 3, 2))
    several = torch.randint(11, (2, 3, 4))
    whole = in_place("selective_log_softmax_and_entropy")(logits, index)
    of_several = in_place("selective_log_softmax")(logits[:, :, 0], several)
    with fused_loss_head():
        for got, wanted in zip(in_place("selective_log_softmax_and_entropy")(logits, index), whole, strict=True):
            torch.testing.assert_close(got, wanted)
        one = in_place("selective_log_softmax_and_entropy")(logits[0, 0, 0], index[0, 0, 0])
        torch.testing.assert_close(one[0], whole[0][0, 0, 0])
        assert torch.equal(in_place("selective_log_softmax")(logits[:, :, 0], several), of_several)  # TRL's own
        none = in_place("_ChunkedLogProbFunction").apply(
            torch.randn(0, 4, requires_grad=True), torch.randn(5, 4), None, torch.zeros(0, dtype=torch.long), 1.0, 8
        )
        assert [x.shape for x in none] == [(0,)] * 5
        none[0].sum().backward()


def test_errors() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.ds_id = 3
    arguments = (torch.randn(2, 4), weight, None, torch.zeros(2, dtype=torch.long))
    with fused_loss_head():
        with pytest.raises(ValueError, match="does not run under ZeRO-3"):
            in_place("_ChunkedLogProbFunction").apply(*arguments, 1.0, 8)
        with pytest.raises(ValueError, match="temperature must be positive"):
            in_place("selective_log_softmax")(torch.randn(2, 4), torch.zeros(2, dtype=torch.long), 0.0)


def references() -> dict[str, dict[str, Any]]:
    """What every name of TRL's modules refers to, by the module."""
    modules = {name: it for name, it in sys.modules.items() if name.partition(".")[0] == "trl" and it is not None}
    return {name: dict(vars(it)) for name, it in modules.items()}


NAMES = {
    "trl.kernels": ("ChunkedLogProbFunction", "selective_log_softmax_and_entropy"),
    "trl.kernels.chunked_logprob": ("ChunkedLogProbFunction",),
    "trl.kernels.logprob_entropy": ("selective_log_softmax_and_entropy",),
    "trl.trainer.utils": (
        "_ChunkedLogProbFunction", "_fused_logprob_entropy", "selective_log_softmax",
        "selective_log_softmax_and_entropy",
    ),
    "trl.experimental.cpo.cpo_trainer": ("selective_log_softmax",),  # which imported it by `from`
}  # fmt: skip


def test_all_references_change_and_come_back() -> None:
    importlib.import_module("trl.experimental.cpo.cpo_trainer")
    before = references()
    with fused_loss_head():
        inside = references()
    changed = {
        (module, name)
        for module, names in inside.items()
        for name, value in names.items()
        if name in before[module] and value is not before[module][name]
    }
    assert {(module, name) for module, names in NAMES.items() for name in names} <= changed
    after = references()
    assert all(after[module][name] is value for module, names in before.items() for name, value in names.items())


def test_a_module_imported_in_the_meantime_is_given_back_too() -> None:
    sys.modules.pop("trl.experimental.orpo.orpo_trainer", None)
    original = trl.trainer.utils.selective_log_softmax
    with fused_loss_head():
        later = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        assert later.selective_log_softmax is not original
    assert later.selective_log_softmax is original


def test_it_undoes_itself() -> None:
    original = in_place("selective_log_softmax")

    def on() -> bool:
        return in_place("selective_log_softmax") is not original

    with contextlib.suppress(RuntimeError), fused_loss_head():
        assert on()
        raise RuntimeError
    assert not on()
    with fused_loss_head():
        with fused_loss_head():
            assert on()
        assert on()
        with fused_loss_head():
            disable_fused_loss_head()
            assert not on()
        assert on()
    assert not on()
    disable_fused_loss_head()  # of nothing
    enable_fused_loss_head()
    enable_fused_loss_head()
    with fused_loss_head():
        assert on()
    assert on()
    disable_fused_loss_head()
    assert not on()


PAIRS = {"prompt": ["ab", "cd", "ef", "gh"], "chosen": ["ab", "ccc", "d", "ea"], "rejected": ["b", "ace", "dd", "f"]}
MARKED = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False, True, False]}
RL = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}


def one_step(name: str, folder: Path) -> tuple[list[Tensor], dict[str, float]]:
    """Parameters after one step of one of TRL's trainers, and what it logged of it."""
    config, trainer = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    options: dict[str, Any] = {"processing_class": parts.tokenizer()}
    settings = parts.settings(folder, learning_rate=0.5)
    if name in ("GRPO", "RLOO"):
        settings |= RL | {"beta": 0.0}
        options |= {"reward_funcs": parts.even, "train_dataset": parts.prompts(8)}
    else:
        settings |= {"per_device_train_batch_size": 4}
        columns = {"SFT": {"text": PAIRS["chosen"]}, "DPO": PAIRS, "KTO": MARKED}[name]
        options["train_dataset"] = Dataset.from_dict(columns)
        if name != "SFT":
            options["ref_model"] = parts.model(seed=1)
    running = trainer(parts.model(), args=config(**settings), **options)
    running.train()
    return [p.detach().clone() for p in running.model.parameters()], running.state.log_history[0]


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "DPO", "KTO", "SFT"])
def test_a_step_of_every_trainer(name: str, tmp_path: Path) -> None:
    theirs, their_log = one_step(name, tmp_path)
    with fused_loss_head(), parts.counted(loss_head, "linear_token_logprobs") as calls:
        ours, our_log = one_step(name, tmp_path)
    assert calls[0] > 0
    start = list(parts.model().parameters())
    moves, wanted = (torch.cat([(a - b).flatten() for a, b in zip(x, start, strict=True)]) for x in (ours, theirs))
    assert wanted.norm() > 1e-3
    assert (moves - wanted).norm() < 1e-5 * wanted.norm()  # parameters of size 0.3 to 1 in fp32
    assert our_log.keys() == their_log.keys()
    timed = {"train_runtime", "step_time"}
    for key in our_log.keys() - timed:
        assert our_log[key] == pytest.approx(their_log[key], rel=1e-5, abs=1e-6), key


def test_a_conspo_step(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_head": "trl"}
    theirs = parts.trainer(tmp_path, **options)
    theirs.train()
    with fused_loss_head(), parts.counted(loss_head, "linear_token_logprobs") as calls:
        ours = parts.trainer(tmp_path, **options)
        ours.train()
    assert calls == [4]
    for name, gradient in theirs.recorder.gradients[0].items():
        torch.testing.assert_close(ours.recorder.gradients[0][name], gradient, rtol=1e-5, atol=1e-7)
