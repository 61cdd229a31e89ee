"""What the tests of TRL train: a Llama of one layer, a tokenizer of letters, and rewards that anybody can recompute."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read on import: nothing is looked up, nothing reported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from conspo_kernels import conspo_loss

SCRATCH = tempfile.TemporaryDirectory()  # for trainers that save nothing; gone with this process
LETTERS = "abcdefghijkl"
SPECIALS = ["<pad>", "<eos>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIALS, *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=TEMPLATE
    )


def model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {"initializer_range": 0.3, "tie_word_embeddings": False, "num_hidden_layers": 1} | settings
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIALS) + len(LETTERS), hidden_size=16, intermediate_size=24, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            **options,
        )
    )  # fmt: skip


def prompts(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(5)
    words = [
        "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (int(n),), generator=generator))
        for n in torch.randint(1, 5, (count,), generator=generator)
    ]
    return Dataset.from_dict({"prompt": words})


def even(completion_ids: list[list[int]], **_columns: Any) -> list[float | None]:
    """1 where the sum of the tokens is even; None, unscorable, where it is a multiple of 7."""
    return [None if sum(ids) % 7 == 0 else float(sum(ids) % 2 == 0) for ids in completion_ids]


class Recorder(TrainerCallback):
    """The gradients of every optimizer step, and the parameters it started from."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({name: p.grad.clone() for name, p in named.items()})
        self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})


def settings(folder: Any, **options: Any) -> dict[str, Any]:
    """Arguments of every trainer's config: fp32 on the CPU, plain SGD, nothing clipped, nothing reported."""
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "optim": "sgd", "lr_scheduler_type": "constant",
        "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    return defaults | options


def trainer(folder: Any, policy: Any = None, **options: Any) -> Any:
    """A `ConSPOTrainer` that keeps its rollouts in `generations` and its steps in `recorder`.

    options: settings, or arguments of the trainer.
    """
    from conspo_kernels.integrations.trl import ConSPOConfig, ConSPOTrainer

    arguments = {"reward_funcs": even, "train_dataset": prompts(48), "peft_config": None, "eval_dataset": None}
    arguments |= {name: options.pop(name) for name in arguments if name in options}
    defaults = {"num_generations": 4, "max_completion_length": 5, "tau": 0.7, "margin": 0.3, "margin_warmup_ratio": 0.0}
    recorder = Recorder()
    result = ConSPOTrainer(
        policy if policy is not None else model(),
        args=ConSPOConfig(**settings(folder, **(defaults | options))),
        processing_class=tokenizer(),
        callbacks=[recorder],
        **arguments,
    )
    result.recorder, result.generations = recorder, []
    generate = result._generate_and_score_completions

    def recorded(inputs: Any) -> Any:
        rollouts = generate(inputs)
        result.generations.append(rollouts)
        return rollouts

    result._generate_and_score_completions = recorded
    return result


CONTRAST = {"tau": 0.7, "margin": 0.3}  # those of `trainer`


def whole_loss(policy: Any, rollouts: list[dict[str, Any]], num_groups: int | None, **options: Any) -> Tensor:
    """`conspo_loss` of all rollouts of a step, from the model's own logits; of several generations, added up."""
    losses = []
    for it in rollouts:
        ids = torch.cat([it["prompt_ids"], it["completion_ids"]], dim=1)
        attended = torch.cat([it["prompt_mask"], it["completion_mask"]], dim=1)
        response = torch.cat([torch.zeros_like(it["prompt_mask"]), it["completion_mask"]], dim=1)
        logits = policy(input_ids=ids, attention_mask=attended).logits
        losses.append(
            conspo_loss(
                logits, ids, it["conspo_rewards"], it["conspo_groups"], response_mask=response, shift=True,
                num_groups=num_groups, **(CONTRAST | options),
            )
        )  # fmt: skip
    return torch.stack(losses).sum()


def gradients_of(policy: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of the parameters that are trained, by name."""
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of gradients as one vector, relative to its length."""
    assert got.keys() == wanted.keys()
    flat = [torch.cat([x[name].double().flatten() for name in wanted]) for x in (got, wanted)]
    assert flat[1].norm() > 1e-3
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """How often a function of a module or a class is called."""
    calls, original = [0], getattr(owner, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return original(*arguments, **options)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, original)
