"""The model that is trained and its tokenizer: a pretrained one from the hub, or a tiny random one for a small run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TINY = "tiny"


class Tokenizer(Protocol):
    """What the recipe asks of a tokenizer."""

    pad_id: int
    eos_id: int

    def prompt(self, question: str) -> list[int]: ...

    def text(self, ids: Sequence[int]) -> str: ...


class ChatTokenizer:
    """The question is the first turn of a chat in the model's own template."""

    def __init__(self, name: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.eos_id: int = self._tokenizer.eos_token_id
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id

    def prompt(self, question: str) -> list[int]:
        chat = [{"role": "user", "content": question}]
        return list(self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class DigitTokenizer:
    """One token per character of `1+2=3`."""

    pad_id, eos_id = 0, 1
    symbols = ("", "", *"0123456789+=")

    def prompt(self, question: str) -> list[int]:
        return [self.symbols.index(character) for character in question]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in ids)


@dataclass(frozen=True)
class Policy:
    """model: in PEFT's wrapper with LoRA.  dtype: what it computes in, beside weights of another type by autocast."""

    model: Any
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def tiny_model(tokenizer: DigitTokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer.symbols),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_id,
        )
    )


def build_policy(name: str, lora_rank: int, dtype: str, attention: str, checkpointing: bool, device: str) -> Policy:
    """Trained whole (lora_rank 0): weights in fp32, computed in `dtype`. With LoRA: frozen weights lie in `dtype`."""
    compute_dtype: torch.dtype = getattr(torch, dtype)
    weights_dtype = compute_dtype if lora_rank else torch.float32
    tokenizer: Tokenizer
    if name == TINY:
        tokenizer = DigitTokenizer()
        model: Any = torch.nn.Module.to(tiny_model(tokenizer), weights_dtype)
    else:
        tokenizer = ChatTokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=weights_dtype, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if lora_rank:
        # All linear layers but the head, which PEFT leaves out of "all-linear" by itself.
        model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"))
    return Policy(model.to(device), tokenizer, torch.device(device), compute_dtype)


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model as a checkpoint would have them, adapters added in, for the engine that samples.

    The model itself is left alone: merging into bf16 weights and out again at each step would leave rounding behind.
    """
    if not isinstance(model, PeftModel):
        yield from model.state_dict().items()
        return
    base = model.get_base_model()
    adapted = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    for name, value in base.state_dict().items():
        if "lora_" in name:
            continue
        owner, _, kind = name.rpartition(".base_layer.")
        if owner and kind == "weight":
            value = value + adapted[owner].get_delta_weight(model.active_adapter).to(value.dtype)
        yield name.replace(".base_layer.", "."), value
