"""Packed rollouts of a causal LM, the fused linear loss, flash-attn's layout: the same loss and gradient as padded.

    python examples/transformers_packed.py
    python examples/transformers_packed.py --device cuda --attention flash_attention_2    # with flash-attn

A tiny Qwen 3 with random weights reads rollouts of very different lengths, padded and then packed. The padded batch
goes through the model's own logits and `conspo_loss`; the packed one through hidden states and `conspo_loss_of`, which
computes neither padding nor logits as a whole.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from conspo_kernels import conspo_loss
from conspo_kernels.integrations.transformers import conspo_loss_of, packed

VOCAB, GROUP_SIZE = 32_000, 8
TAU, MARGIN = 0.5, 0.2  # sharper than the paper's 10 and 0.01: an error in a score then shows in the loss


def tiny_qwen3(device: torch.device, attention: str) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    # flash-attn computes in 16 bits only.
    dtype = torch.bfloat16 if attention.startswith("flash") else torch.float32
    model: PreTrainedModel = torch.nn.Module.to(Qwen3ForCausalLM(config), device, dtype)
    model.set_attn_implementation(attention)
    return model


def rollouts(device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch of two groups, most rollouts short and one long in each, and their rewards."""
    lengths = torch.tensor([40, 33, 51, 28, 36, 45, 30, 250] * 2)
    prompts = torch.tensor([12] * GROUP_SIZE + [9] * GROUP_SIZE)
    position = torch.arange(int(lengths.max()))
    attention_mask = (position < lengths[:, None]).long()
    batch = {
        "input_ids": torch.randint(3, VOCAB, attention_mask.shape),
        "attention_mask": attention_mask,
        "response_mask": attention_mask * (position >= prompts[:, None]),
    }
    rewards = (torch.arange(len(lengths)) % 3 == 0).float()
    return {name: value.to(device) for name, value in batch.items()}, rewards


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager, flash_attention_2 ...")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = tiny_qwen3(args.device, args.attention)
    batch, rewards = rollouts(args.device)

    start = time.perf_counter()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    padded_loss = conspo_loss(
        logits,
        batch["input_ids"],
        rewards,
        GROUP_SIZE,
        response_mask=batch["response_mask"],
        shift=True,
        tau=TAU,
        margin=MARGIN,
    )
    padded_gradient = gradient(model, padded_loss)
    padded_time = time.perf_counter() - start

    flat = packed(batch)
    conspo_loss_of(
        model, flat, rewards, GROUP_SIZE, tau=TAU, margin=MARGIN
    )  # the first call checks the model's head and packing
    start = time.perf_counter()
    packed_loss = conspo_loss_of(model, flat, rewards, GROUP_SIZE, workspace_mib=8, tau=TAU, margin=MARGIN)
    packed_gradient = gradient(model, packed_loss)
    packed_time = time.perf_counter() - start

    rows, columns = batch["input_ids"].shape
    print(f"padded  {rows} x {columns} = {rows * columns} tokens, logits {logits.nbytes / 2**20:.0f} MiB whole")
    print(f"packed  {flat['input_ids'].numel()} tokens, tiles of logits of 8 MiB at most, offsets (cu_seq_lens_q)")
    print(f"        {flat['cu_seq_lens_q'].tolist()}")
    print(f"loss    {padded_loss.item():.8f} padded, {packed_loss.item():.8f} packed")
    difference = float((packed_gradient - padded_gradient).norm() / padded_gradient.norm())
    print(f"gradient differs by {difference:.1e} of its norm")
    print(f"forward and backward: {padded_time:.2f} s padded, {packed_time:.2f} s packed, each once")
    allowed = 1e-5 if packed_gradient.dtype == torch.float32 else 5e-2
    if difference > allowed or not torch.allclose(packed_loss, padded_loss, rtol=allowed):
        raise SystemExit(f"packed is not padded: more than {allowed} apart")


if __name__ == "__main__":
    main()
