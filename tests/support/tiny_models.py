"""Causal LMs of transformers, tiny and random, made from configs: the ten architectures whose heads differ."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

VOCAB = 67
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
MAMBA_SIZES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

# Name of the classes, and what its config has beside the sizes. Those that change logits change them by much.
ARCHITECTURES = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {"eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "FalconH1": {"lm_head_multiplier": 0.3, "mamba_n_groups": 1, **MAMBA_SIZES},
    "HyperCLOVAX": {"logits_scaling": 0.25},
}
STATE_SPACE = ("FalconH1",)  # whose state runs on over the border of packed rollouts


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """A model whose logits are several nats apart, so that a scale or a softcap shows; fp32, in training mode."""
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    sizes = GPT2_SIZES if name == "GPT2" else SIZES
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **ARCHITECTURES.get(name, {}), **changes}))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_()
        if head.bias is not None:
            head.bias.normal_()
    return model.train()


def multimodal(name: str) -> PreTrainedModel:
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 3.0, "model_type": "gemma2"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model", "projection_dim": 32}
    if name == "Gemma3":
        text["model_type"] = "gemma3_text"
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, projection_dim=32)
    config.image_token_id = config.image_token_index = 4
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    return model


def lora(model: PreTrainedModel, targets: list[str], **options: object) -> nn.Module:
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)  # as they come they are zero, and the adapter does nothing
    return peft
