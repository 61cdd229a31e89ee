"""What would be wrong in silence raises: heads, packing, batches and packages that are not what they should be."""

from __future__ import annotations

import gc
import subprocess
import sys
import types
import weakref

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from rollouts import (
    OPTIONS,
    REWARDS,
    own_loss,
    padded_batch,
)
from tiny_models import STATE_SPACE, VOCAB, lora, multimodal, tiny_model
from torch import Tensor, nn

from conspo_kernels import conspo_weights, linear_conspo_scores, linear_token_logprobs
from conspo_kernels.integrations import transformers_check
from conspo_kernels.integrations.required import required
from conspo_kernels.integrations.transformers import (
    check_head,
    check_packing,
    conspo_loss_of,
    head_inputs,
    packed,
)


def test_a_softcap_that_the_config_has_and_the_model_does_not_apply_raises() -> None:
    """Gemma 3 with vision: its config takes one, its forward does not look at it."""
    with pytest.raises(ValueError, match=r"other logits than its config says \(logit_scale=1.0, softcap=3.0\)"):
        conspo_loss_of(multimodal("Gemma3"), padded_batch(), REWARDS, 2)


@pytest.mark.parametrize("name", [*STATE_SPACE, "GptOss", "OPT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rollouts_that_see_one_another_raise(name: str, dtype: torch.dtype) -> None:
    """A state runs on; GPT-OSS and OPT do not tell their attention masks of positions."""
    changes = {"GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}}
    changes["OPT"] = {"word_embed_proj_dim": 32, "ffn_dim": 48}
    model = tiny_model(name, **changes.get(name, {})).to(dtype)
    batch = padded_batch()
    torch.testing.assert_close(  # padded they are right
        conspo_loss_of(model.eval(), batch, REWARDS, 2, **OPTIONS, logits_dtype=torch.float32),
        own_loss(model, batch),
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="lets packed rollouts see one another"):
        conspo_loss_of(model, packed(padded_batch()), REWARDS, 2)


def test_autocast_around_the_models_forward_alone_raises() -> None:
    """As Accelerate has it: its base model, called from outside, would compute in another precision."""
    model = tiny_model("Llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(ValueError, match=r"inside of accelerator.autocast\(\)"):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)
    with torch.autocast("cpu", torch.bfloat16):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: lora(m, ["lm_head"]), "the head of LlamaForCausalLM carries an adapter"),
        (lambda m: lora(m, ["q_proj"], trainable_token_indices={"lm_head": [3]}), "carries an adapter"),
        (lambda m: get_peft_model(m, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)), "PROMPT_TUNING changes"),
        (lambda m: nn.DataParallel(m), "must not be wrapped, got DataParallel"),
        (lambda m: torch.compile(m), "must not be wrapped, got OptimizedModule"),
    ],
)
def test_what_would_be_wrong_in_silence_raises(wrap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conspo_loss_of(wrap(tiny_model("Llama")), padded_batch(), REWARDS, 2)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(0), r"must not be empty: if it is sharded \(ZeRO-3\), gather it"),
        (torch.zeros(VOCAB, 32, dtype=torch.int8), "must be floating point, got torch.int8"),
    ],
)
def test_a_weight_that_is_not_there_or_quantised_raises(weight: Tensor, message: str) -> None:
    model = tiny_model("Llama")
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


def test_what_is_no_causal_lm_raises() -> None:
    batch = padded_batch()
    with pytest.raises(TypeError, match="must be a PreTrainedModel of transformers or PEFT's, got Linear"):
        conspo_loss_of(nn.Linear(2, 2), batch, REWARDS, 2)
    sizes = {"vocab_size": VOCAB, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8}
    with pytest.raises(ValueError, match="encoder-decoder"):
        conspo_loss_of(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), batch, REWARDS, 2)
    with pytest.raises(ValueError, match="must have a head"):
        conspo_loss_of(tiny_model("Llama").model, batch, REWARDS, 2)


class Scaled(transformers.LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 0.9,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z.index_fill(-1, torch.tensor([5]), -torch.inf),
        lambda z: z + torch.linspace(0, 1, VOCAB),
        lambda z: z[..., :-1],
    ],
    ids=["scale", "softcap", "a token masked", "a bias", "fewer tokens"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transform_that_no_config_tells_raises(change, dtype: torch.dtype) -> None:
    model = Scaled(tiny_model("Llama").config).to(dtype)
    model.change = lambda z: z
    check_head(model)
    model.change = change
    with pytest.raises(ValueError, match="use conspo_loss"):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


def test_hidden_states_changed_on_the_way_to_the_head_raise() -> None:
    model = tiny_model("Llama")
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * 1.1,))
    with pytest.raises(ValueError, match="does not give its last hidden states to its head as they are"):
        check_head(model)


def test_a_head_that_is_not_linear_raises() -> None:
    model = tiny_model("Llama")
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 1.1)
    with pytest.raises(ValueError, match="is not hidden @ weight"):
        check_head(model)


def test_a_config_that_says_what_the_model_does_not_do_raises() -> None:
    with pytest.raises(ValueError, match=r"other logits than its config says \(logit_scale=0.5"):
        conspo_loss_of(tiny_model("Llama", logit_scale=0.5), padded_batch(), REWARDS, 2)


def test_checks_run_once_and_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("Llama"), packed(padded_batch())
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    for name in ("check_head", "check_packing"):
        check = getattr(transformers_check, name)
        monkeypatch.setattr(
            transformers_check, name, lambda *a, check=check, name=name, **k: (calls.append(name), check(*a, **k))
        )
    for _ in range(3):
        conspo_loss_of(model, batch, REWARDS, 2).backward()
    assert calls == ["check_head", "check_packing"]
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_hooks
    model.config.final_logit_softcapping = 7.0  # which Llama does not have
    with pytest.raises(ValueError, match=r"softcap=7\.0"):
        conspo_loss_of(model, batch, REWARDS, 2)


def scale(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 1.1


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OtherLinear(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 1.1 * super().forward(hidden)


def another_class(model: transformers.PreTrainedModel) -> None:
    model.lm_head.__class__ = OtherLinear


def another_forward(model: transformers.PreTrainedModel) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.1 * plain(hidden)


def another_forward_of_the_model(model: transformers.PreTrainedModel) -> None:
    plain = model.forward

    def forward(*args, **inputs):
        output = plain(*args, **inputs)
        output.logits = output.logits * 1.1
        return output

    model.forward = forward


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.register_forward_hook(scale),
        lambda model: model.lm_head.register_forward_pre_hook(lambda _module, args: (1.1 * args[0],)),
        another_class,
        another_forward,
        another_forward_of_the_model,
    ],
    ids=["hook", "pre-hook", "class", "forward", "forward of the model"],
)
def test_a_head_that_was_changed_after_the_first_call_raises(change) -> None:
    model, batch = tiny_model("Llama"), padded_batch()
    conspo_loss_of(model, batch, REWARDS, 2)
    change(model)
    with pytest.raises(ValueError, match="use conspo_loss"):
        conspo_loss_of(model, batch, REWARDS, 2)


def test_a_changed_head_that_peft_trains_whole_raises() -> None:
    model, batch = lora(tiny_model("Llama"), ["q_proj"], modules_to_save=["lm_head"]), padded_batch()
    conspo_loss_of(model, batch, REWARDS, 2)
    model.get_base_model().lm_head.modules_to_save["default"].register_forward_hook(scale)
    with pytest.raises(ValueError, match="is not hidden @ weight"):
        conspo_loss_of(model, batch, REWARDS, 2)


def test_a_parametrization_after_the_first_call_is_used() -> None:
    """It makes the weight; the check compares it again."""
    model, batch = tiny_model("Llama"), padded_batch()
    conspo_loss_of(model, batch, REWARDS, 2)
    for _ in range(2):
        nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Twice())
        torch.testing.assert_close(
            conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS), own_loss(model, batch), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_the_head_raises(register: str) -> None:
    """It could change the gradient, and the head is not called."""
    model = tiny_model("Llama")
    conspo_loss_of(model, padded_batch(), REWARDS, 2)
    getattr(model.lm_head, register)(lambda *_: None)
    with pytest.raises(ValueError, match="has a backward hook, which would not run"):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


def test_a_model_that_was_checked_is_not_kept_alive() -> None:
    model = tiny_model("Llama")
    model.forward = types.MethodType(type(model).forward, model)  # as trainers put their own there
    conspo_loss_of(model, padded_batch(), REWARDS, 2)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("asked", ["by the config", "by the batch"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "JetMoe"])
def test_a_routers_loss_is_not_dropped_in_silence(name: str, asked: str) -> None:
    """A model's own forward adds it, where router logits are asked for and its coefficient is not zero."""
    sizes: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    coefficient = "aux_loss_coef" if name == "JetMoe" else "router_aux_loss_coef"
    if name == "Qwen3Moe":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    if name == "JetMoe":
        sizes |= {"kv_channels": 8, "num_key_value_heads": 4, "num_attention_heads": 8}
    batch = padded_batch()
    if asked == "by the config":
        sizes["output_router_logits"] = True
    else:
        batch["output_router_logits"] = True  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"adds a router's load-balancing loss .*coefficient 10.*output_router_logits=False"
    ):
        conspo_loss_of(tiny_model(name, **sizes, **{coefficient: 10.0}), batch, REWARDS, 2)
    without = conspo_loss_of(tiny_model(name, **sizes, **{coefficient: 0.0}), batch, REWARDS, 2)
    sizes["output_router_logits"] = False
    never = conspo_loss_of(tiny_model(name, **sizes, **{coefficient: 10.0}), padded_batch(), REWARDS, 2)
    torch.testing.assert_close(without, never, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_in_another_dtype_than_the_hidden_states_says_what_to_do(name: str) -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    head = {"weight": torch.randn(9, 4, dtype=torch.bfloat16), "bias": torch.randn(9, dtype=torch.bfloat16)}
    head[name] = head[name].float()
    with pytest.raises(ValueError, match=rf"{name} must have the dtype of hidden, .*: cast one of them"):
        linear_token_logprobs(hidden, labels=torch.zeros(2, 3, dtype=torch.int64), **head)


def test_a_head_whose_logits_are_wider_than_its_weight_raises() -> None:
    model = tiny_model("Llama").bfloat16()
    head = model.lm_head
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight.float())
    with pytest.raises(ValueError, match=r"makes logits in torch\.float32, and here they would be in torch\.bfloat16"):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


def test_packing_is_checked_for_the_attention_in_use() -> None:
    model = tiny_model("Llama")
    check_packing(model)
    model.set_attn_implementation("eager")
    conspo_loss_of(model, packed(padded_batch()), REWARDS, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "batch must say which tokens are responses"),
        ({"input_ids": None}, "batch must have 'input_ids'"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, r"batch\['labels'\] must be \[4, 12\], as input_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 12])}, "leave attention_mask out"),
        ({"attention_mask": torch.ones(4, 11)}, r"batch\['attention_mask'\] must be \[4, 12\], as input_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 12]), "attention_mask": None}, r"must have input_ids \[1, N\]"),
    ],
)
def test_batches_that_do_not_go_together(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conspo_loss_of(tiny_model("Llama"), padded_batch() | change, REWARDS, 2)


@pytest.mark.parametrize("padding", [1, 5])
def test_a_packed_tail_of_padding_says_so(padding: int) -> None:
    """Its positions are 0, so that each of its tokens seems to begin a rollout."""
    model, flat = tiny_model("Llama"), packed(padded_batch())
    expected = conspo_loss_of(model, flat, REWARDS, 2)
    tail = {
        name: torch.nn.functional.pad(flat[name], (0, padding), value=-100 if name == "labels" else 0)
        for name in ("input_ids", "labels", "position_ids")
    }
    message = (
        rf"rewards must have shape \[{4 + padding}\] .* got \[4\]. If .* padding .* cu_seq_lens_q .* attention_mask"
    )
    with pytest.raises(ValueError, match=message):
        conspo_loss_of(model, tail, REWARDS, 2)
    with pytest.raises(ValueError, match="padding at the end of packed tokens"):
        conspo_weights(linear_conspo_scores(**head_inputs(model, tail)), REWARDS, 2)
    cure = tail | {"cu_seq_lens_q": flat["cu_seq_lens_q"]}
    torch.testing.assert_close(conspo_loss_of(model, cure, REWARDS, 2), expected, rtol=1e-6, atol=1e-7)


def test_packing_what_is_not_per_token_raises() -> None:
    with pytest.raises(ValueError, match=r"batch\['rewards'\] must be \[4, 12\], as attention_mask"):
        packed(padded_batch() | {"rewards": REWARDS})


def test_importing_imports_none_of_the_packages() -> None:
    code = (
        "import sys, conspo_kernels, conspo_kernels.integrations.transformers\n"
        "print(*(name for name in ('transformers', 'peft', 'trl', 'verl', 'accelerate') if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"transformers >= 5.0 is needed .* pip install 'conspo-kernels\[transformers\]'"
    ):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


@pytest.mark.parametrize(
    ("version", "good"),
    [("4.57.1", False), ("5.0.0rc1", True), ("5.0", True), ("5.0.0", True), ("10.1", True), ("0.9", False)],
)
def test_a_package_that_is_too_old_names_the_extra(monkeypatch: pytest.MonkeyPatch, version: str, good: bool) -> None:
    old = types.ModuleType("transformers")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", old)
    if good:
        assert required("transformers") is old
        return
    with pytest.raises(ImportError, match=rf"got {version}: pip install 'conspo-kernels\[transformers\]'"):
        required("transformers")
