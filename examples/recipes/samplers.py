"""Who samples the rollouts: vLLM on the training GPU, or `generate` of transformers. The setting says which; neither
stands in for the other in silence.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from math_policy import Policy, merged_weights

Prompts = list[list[int]]
Responses = list[list[list[int]]]  # [prompts][rollouts][tokens], an end of sequence among them where it came


class Sampler(Protocol):
    def sample(self, prompts: Prompts, copies: int, max_new_tokens: int, temperature: float) -> Responses:
        """`copies` responses to each prompt, from the whole distribution at `temperature`."""
        ...

    def update(self) -> None:
        """Sample from the policy's weights of now."""
        ...


class GenerateSampler:
    """`generate` of transformers: slow, and it runs everywhere."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def update(self) -> None:
        """It samples from the model that is trained."""

    @torch.no_grad()
    def sample(self, prompts: Prompts, copies: int, max_new_tokens: int, temperature: float) -> Responses:
        policy, tokenizer = self._policy, self._policy.tokenizer
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), tokenizer.pad_id)
        attended = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attended[row, longest - len(prompt) :] = 1
        policy.model.eval()
        with policy.autocast():
            # Without truncation or penalties, a pretrained model's own among them: the loss is of this distribution.
            output = policy.model.generate(
                input_ids=ids.to(policy.device), attention_mask=attended.to(policy.device),
                do_sample=True, temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
                max_new_tokens=max_new_tokens, num_return_sequences=copies, pad_token_id=tokenizer.pad_id,
            )  # fmt: skip
        policy.model.train()
        rows = [self._until_end(row) for row in output[:, longest:].tolist()]
        return [rows[i : i + copies] for i in range(0, len(rows), copies)]

    def _until_end(self, row: list[int]) -> list[int]:
        eos_id = self._policy.tokenizer.eos_id
        return row[: row.index(eos_id) + 1] if eos_id in row else row


class VLLMSampler:
    """vLLM in this process and on this GPU, which it shares with the training. One GPU; written for vLLM 0.22 to 0.31.

    memory: the fraction of the GPU that vLLM takes, for its copy of the weights and its cache.
    """

    def __init__(self, policy: Policy, model_name: str, memory: float, longest: int, seed: int) -> None:
        from vllm import LLM

        # The engine runs in this process, where its weights can be reached, and as the only rank of its group.
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
        }.items():  # fmt: skip
            os.environ.setdefault(name, value)

        self._policy = policy
        self._llm: Any = LLM(
            model=model_name, dtype="bfloat16", gpu_memory_utilization=memory, max_model_len=longest, seed=seed,
            distributed_executor_backend="external_launcher",
        )  # fmt: skip

    def update(self) -> None:
        """Copy the policy's weights, adapters merged, and forget what was cached under the old ones."""
        engine = self._llm.llm_engine.model_executor.driver_worker.model_runner.model
        engine.load_weights(merged_weights(self._policy.model))
        self._llm.reset_prefix_cache()

    def sample(self, prompts: Prompts, copies: int, max_new_tokens: int, temperature: float) -> Responses:
        from vllm import SamplingParams

        params = SamplingParams(n=copies, temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [[list(response.token_ids) for response in output.outputs] for output in outputs]
