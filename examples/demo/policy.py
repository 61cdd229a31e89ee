"""The demo's policies, and the default one: a Llama of half a million parameters with a tokenizer of characters.

Everything else in the demo reaches the model through `Policy` alone: another model needs another `Policy`, as
smollm2.py makes one.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .sequences import Batch, Forward, read_rows


class Tokenizer(Protocol):
    """What the demo asks of a tokenizer."""

    pad_id: int
    eos_id: int

    def encode_prompt(self, text: str) -> list[int]: ...

    def encode_response(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class CharTokenizer:
    """One token per lower-case letter, digit or sign. `>` ends the prompt; no verifier accepts what specials decode to.

    signs: further symbols, one token each.
    """

    specials = ("<pad>", "<eos>", ">")
    pad_id, eos_id, prompt_end_id = range(3)

    def __init__(self, signs: str = "") -> None:
        self.symbols = [*self.specials, *string.ascii_lowercase, *string.digits, *signs]
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode_prompt(self, text: str) -> list[int]:
        return [*(self._ids[symbol] for symbol in text), self.prompt_end_id]

    def encode_response(self, text: str) -> list[int]:
        return [*(self._ids[symbol] for symbol in text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end-of-sequence token."""
        text = []
        for index in ids:
            if index == self.eos_id:
                break
            text.append(self.symbols[index])
        return "".join(text)


@dataclass(frozen=True)
class Policy:
    """A causal language model with the tokenizer it was built for."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    read: Callable[[Forward, Batch], torch.Tensor] = read_rows
    compute_dtype: torch.dtype = torch.float32  # the weights are in fp32 whatever this is

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> torch.Tensor:
        """The lm_head's weight, [v, h]."""
        return self.model.get_output_embeddings().weight

    def autocast(self) -> torch.autocast:
        """The precision that the model computes in, and the fused-linear loss beside it."""
        mixed = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype if mixed else None, enabled=mixed)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The model's logits, from its own keyword arguments."""
        with self.autocast():
            return self.model(**inputs).logits

    def forward_hidden(self, **inputs: Any) -> torch.Tensor:
        """What the model hands to its lm_head, from the same arguments."""
        inputs.pop("logits_to_keep", None)
        with self.autocast():
            return self.model.base_model(**inputs).last_hidden_state

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the batch's last columns, at least of all that predict a response token."""
        return self.read(self.forward, batch)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the same columns, [b, t, h]."""
        return self.read(self.forward_hidden, batch)


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device: `to` of transformers is wrapped in a way that a type checker misreads."""
    torch.nn.Module.to(model, device)
    return model


def build_char_policy(device: torch.device, signs: str = "") -> Policy:
    """A freshly initialised policy; its weights follow from torch's global seed.  signs: as of CharTokenizer."""
    tokenizer = CharTokenizer(signs)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    # Built on the CPU, then moved: the weights depend on the seed and not on the device.
    return Policy("llama-3x128-char", moved(LlamaForCausalLM(config), device), tokenizer)
