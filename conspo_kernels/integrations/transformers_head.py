"""The head of a causal LM of transformers: its weight and bias, what the model does to its logits, and a check of both.

    logits = f(hidden @ weight.T + bias),   f(z) = softcap * tanh(z * logit_scale / softcap), or z * logit_scale

`f` is read from the model's text config. A config may say what a model does not do, and a model may do what no config
says: `transformers_check` runs the model and compares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .required import required

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISOR = "logits_scaling"  # Granite
DIVISOR_MULTIPLIES = ("hyperclovax",)  # model types whose `logits_scaling` is a factor
SOFTCAP = "final_logit_softcapping"  # Gemma


class CausalLMHead(NamedTuple):
    """What makes logits of the last hidden states.

    weight: [V, H].  bias: [V] or None.  logit_scale: factor > 0.  softcap: > 0, applied after the factor, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def transformed(self, logits: Tensor) -> Tensor:
        """f of the logits, in their dtype."""
        scaled: Tensor = logits * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def causal_lm_of(model: Any) -> Any:
    """The `PreTrainedModel` itself, out of PEFT's wrapper.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError: not a model of transformers.
        ValueError: a wrapper whose hooks (DDP, FSDP, DeepSpeed, torch.compile) a call of the model's parts would pass
            by; a PEFT method that changes the input (prompts, activated LoRA); an encoder-decoder model.
    """
    transformers = required("transformers")
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        config = model.active_peft_config
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"PEFT's {config.peft_type} changes what the model is given, which hidden states taken from its base "
                "model would miss: use the model's logits and conspo_loss"
            )
        model = model.get_base_model()
    for name in ("module", "_orig_mod"):
        if isinstance(getattr(model, name, None), nn.Module):
            raise ValueError(
                f"model must not be wrapped, got {type(model).__name__}: its hooks would not see a call of the model's "
                "parts. Wrap InForward(model) instead, and call that: wrapped(conspo_loss_of, batch, ...)"
            )
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel of transformers or PEFT's, got {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder, got the encoder-decoder {type(model).__name__}")
    return model


def causal_lm_head(model: nn.Module) -> CausalLMHead:
    """The head's weight, bias and logit transform, as the model's modules and config have them; not yet checked.

    Args:
        model: a causal LM of transformers, or one in PEFT's wrapper. Tied embeddings stay one
            parameter, which gets both gradients.

    Raises:
        ImportError, TypeError, ValueError: as `causal_lm_of`; ValueError also where the head is not a plain linear
            layer: an adapter on it, quantised, sharded.
    """
    lm = causal_lm_of(model)
    module = head_module(lm)
    scale, softcap = _transform_of(lm.config)
    return CausalLMHead(module.weight, module.bias, scale, softcap)


def head_module(lm: Any) -> nn.Linear:
    """The linear layer that runs as the head."""
    name = type(lm).__name__
    module: Any = lm.get_output_embeddings()
    if module is None:
        raise ValueError(f"model must have a head that makes logits, got {name}")
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):  # PEFT trains a copy of the layer
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if hasattr(module, "base_layer") or hasattr(module, "token_adapter"):
        raise ValueError(
            f"the head of {name} carries an adapter ({type(module).__name__}), which its weight does not contain: "
            "leave lm_head out of target_modules, train it whole (modules_to_save) or merge the adapter; or use "
            "conspo_loss on the model's logits"
        )
    if not isinstance(module, nn.Linear):
        raise ValueError(f"the head of {name} must be a torch.nn.Linear, got {type(module).__name__}")
    deepspeed = hasattr(module.weight, "ds_id")  # whose own hooks gather and partition parameters
    if (module._backward_hooks or module._backward_pre_hooks) and not deepspeed:
        raise ValueError(
            f"the head of {name} has a backward hook, which would not run, as the head is not called: use conspo_loss "
            "on the model's logits, or hooks of its parameters"
        )
    if hasattr(module.weight, "full_tensor"):
        raise ValueError(
            f"the head of {name} is sharded (DTensor): shard InForward(model) instead of the model, and call the loss "
            "through it, where the weight is whole"
        )
    if module.weight.numel() == 0:
        raise ValueError(f"the head of {name} must not be empty: if it is sharded (ZeRO-3), gather it around the call")
    if not module.weight.is_floating_point():
        raise ValueError(f"the head of {name} must be floating point, got {module.weight.dtype}: do not quantise it")
    return module


def as_weight(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states in the dtype of the head: one in fp32 over a model in 16 bits casts what it is given.

    Under autocast they stay, as the product casts both.
    """
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)


def _transform_of(config: Any) -> tuple[float, float | None]:
    """logit_scale and softcap of a model's config; of a multimodal model's text config."""
    text = config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        value = getattr(text, name, None)
        scale *= 1.0 if value is None else float(value)
    scaling = getattr(text, DIVISOR, None)
    if scaling is not None:
        scale *= float(scaling) if text.model_type in DIVISOR_MULTIPLIES else 1.0 / float(scaling)
    softcap = getattr(text, SOFTCAP, None)
    return scale, None if softcap is None else float(softcap)


def last_hidden_states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """[B, T, H], what the model hands to its head, from the model's own keyword arguments; its head does not run."""
    lm = causal_lm_of(model)
    base = lm.base_model
    if base is lm:  # Llama 4's text model is under another name than its base_model_prefix
        base = getattr(lm, "model", None)
    if base is None:
        raise ValueError(f"{type(lm).__name__} has no base model without a head: use conspo_loss on its logits")
    output = base(**{"use_cache": False, **inputs, "return_dict": True})
    hidden: Tensor = output.last_hidden_state
    return hidden
