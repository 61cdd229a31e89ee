"""A loss from a model's hidden states against the same model's own logits, on the architectures whose heads differ."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import ARCHITECTURES, STATE_SPACE, VOCAB, tiny_model
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel
from transformers.modeling_flash_attention_utils import _get_unpad_data

from benchmarks.measure import allocations
from conspo_kernels import (
    conspo_loss,
    conspo_weights,
    linear_conspo_scores,
    linear_token_logprobs,
    linear_weighted_score_loss,
    sequence_scores,
)
from conspo_kernels.integrations import transformers_check
from conspo_kernels.integrations.required import required
from conspo_kernels.integrations.transformers import (
    causal_lm_head,
    check_head,
    check_packing,
    conspo_loss_of,
    from_unpadded,
    head_inputs,
    packed,
)

LENGTHS, PROMPTS = (9, 4, 12, 7), (3, 1, 4, 6)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0])
OPTIONS = {"tau": 0.5, "margin": 0.2, "temperature": 0.8}


def padded_batch(side: str = "right") -> dict[str, Tensor]:
    """Four rollouts; padding holds nonsense in its labels, as `input_ids.clone()` would."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    attention, response = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        start = shape[1] - length if side == "left" else 0
        attention[row, start : start + length] = 1
        response[row, start + prompt : start + length] = 1
    labels = ids.masked_fill((response == 0) & (attention == 1), -100)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def own_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """From the model's own logits, which hold its scale and softcap already."""
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return conspo_loss(own_logits(model, batch), labels, REWARDS, 2, shift=True, **OPTIONS)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to the largest gradient's norm: one parameter's may be rounding alone (a bias before a norm)."""
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    assert largest > 0
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * largest, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_are_those_of_the_models_own_logits(name: str, side: str) -> None:
    model, batch = tiny_model(name), padded_batch(side)
    logprobs = linear_token_logprobs(**head_inputs(model, batch))
    everything = own_logits(model, batch).detach().double().log_softmax(-1)
    response = (batch["labels"] != -100) & (batch["attention_mask"] == 1)
    expected = everything[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * response[:, 1:]
    assert expected.min() < -5, "flat logits would hide a scale"
    torch.testing.assert_close(logprobs[:, :-1].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model, batch = tiny_model(name), padded_batch()
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(model, loss), gradients(model, expected))


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


def test_a_multimodal_models_transform_is_in_its_text_config() -> None:
    model, batch = multimodal("PaliGemma"), padded_batch()
    batch["input_ids"] = batch["input_ids"].clamp(min=7)
    assert causal_lm_head(model).softcap == 3.0
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    torch.testing.assert_close(loss, own_loss(model, batch), rtol=1e-5, atol=1e-6)


def test_a_softcap_that_the_config_has_and_the_model_does_not_apply_raises() -> None:
    """Gemma 3 with vision: its config takes one, its forward does not look at it."""
    with pytest.raises(ValueError, match=r"other logits than its config says \(logit_scale=1.0, softcap=3.0\)"):
        conspo_loss_of(multimodal("Gemma3"), padded_batch(), REWARDS, 2)


def test_a_head_with_a_bias() -> None:
    model, batch = tiny_model("Phi"), padded_batch()
    loss = conspo_loss_of(model.eval(), batch, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(model, loss), gradients(model, expected))


def test_a_bf16_model() -> None:
    model, batch = tiny_model("Gemma2").bfloat16(), padded_batch()
    logprobs = linear_token_logprobs(**head_inputs(model, batch), logits_dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = 5.0 * torch.tanh(hidden.double() @ model.lm_head.weight.double().T / 5.0)
    response = (batch["labels"] != -100) & (batch["attention_mask"] == 1)
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * response[:, 1:]
    torch.testing.assert_close(logprobs[:, :-1].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", [dict, packed], ids=["padded", "packed"])
def test_under_autocast(layout) -> None:
    model, batch = tiny_model("Qwen3"), padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = conspo_loss_of(model, layout(batch), REWARDS, 2, **OPTIONS)
        expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)


def test_autocast_around_the_models_forward_alone_raises() -> None:
    """As Accelerate has it: its base model, called from outside, would compute in another precision."""
    model = tiny_model("Llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(ValueError, match=r"inside of accelerator.autocast\(\)"):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)
    with torch.autocast("cpu", torch.bfloat16):
        conspo_loss_of(model, padded_batch(), REWARDS, 2)


def test_two_phases_give_the_gradient_of_the_whole_batch() -> None:
    model, batch = tiny_model("Granite"), padded_batch()
    parts = [{name: value[i::2] for name, value in batch.items()} for i in range(2)]  # groups come apart
    with torch.no_grad():
        scores = torch.cat([linear_conspo_scores(**head_inputs(model, part), temperature=0.8) for part in parts])
    ids = torch.tensor([0, 1, 0, 1])
    weights = conspo_weights(scores, REWARDS[[0, 2, 1, 3]], ids, tau=0.5, margin=0.2).weights
    model.zero_grad()
    for part, some in zip(parts, weights.split(2), strict=True):
        linear_weighted_score_loss(**head_inputs(model, part), weights=some, temperature=0.8).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_gradients_equal(found, gradients(model, own_loss(model, batch)))


def test_logits_are_never_whole() -> None:
    """The allocator's largest single request, beside that of the model's own logits, which it sees."""
    torch.use_deterministic_algorithms(False)
    model = tiny_model("Llama", vocab_size=20_000, max_position_embeddings=512)
    ids = torch.randint(3, 20_000, (4, 256))
    batch = {"input_ids": ids, "response_mask": torch.ones_like(ids)}
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    logits_bytes = ids.numel() * 20_000 * 4
    conspo_loss_of(model, batch, rewards, 2)  # the check of the head is done
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head ran"))
    step = allocations(lambda: conspo_loss_of(model, batch, rewards, 2, workspace_mib=4).backward())
    assert max(step) <= 4 * 2**20 + 2**16 < logits_bytes / 16
    other = tiny_model("Llama", vocab_size=20_000, max_position_embeddings=512)
    assert max(allocations(lambda: other(input_ids=ids).logits)) >= logits_bytes


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in STATE_SPACE])
def test_packed_is_padded(name: str) -> None:
    model, batch = tiny_model(name), padded_batch()
    flat = packed(batch)
    assert flat["input_ids"].shape == (1, sum(LENGTHS))
    loss = conspo_loss_of(model, flat, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(model, loss), gradients(model, expected))


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


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {}, {"return_seq_idx": True}], ids=str)
def test_a_flattening_collators_batch(options: dict[str, bool]) -> None:
    """With cu_seq_lens_q, and without, from position_ids that begin anew."""
    batch = padded_batch()
    features = []
    for row, attended in enumerate(batch["attention_mask"].bool()):
        values = {name: batch[name][row][attended].tolist() for name in ("input_ids", "labels")}
        features.append(values)
    flat = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    model = tiny_model("Qwen3")
    assert head_inputs(model, flat)["cu_seqlens"].tolist() == [0, 9, 13, 25, 32]
    loss = conspo_loss_of(model, flat, REWARDS, 2, **OPTIONS)
    torch.testing.assert_close(loss, own_loss(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_is_the_layout_of_flash_attn(side: str) -> None:
    """Indices and offsets as transformers makes them for flash-attn, whose own function needs a GPU's package."""
    batch = padded_batch(side)
    indices, cu_seqlens, longest = _get_unpad_data(batch["attention_mask"])
    ids, labels = (batch[name].flatten()[indices] for name in ("input_ids", "labels"))
    flat = packed(batch)
    assert flat["input_ids"][0].equal(ids)
    assert flat["labels"][0].equal(labels)
    assert flat["cu_seq_lens_q"].equal(cu_seqlens)
    assert flat["cu_seq_lens_q"].dtype == torch.int32
    assert flat["max_length_q"] == longest
    again = from_unpadded(ids[:, None], cu_seqlens, labels=labels)
    assert all(torch.equal(torch.as_tensor(again[name]), torch.as_tensor(flat[name])) for name in flat)


def test_offsets_without_positions_get_them() -> None:
    model, flat = tiny_model("Llama"), packed(padded_batch())
    expected = conspo_loss_of(model, flat, REWARDS, 2)
    del flat["position_ids"]
    torch.testing.assert_close(conspo_loss_of(model, flat, REWARDS, 2), expected, rtol=0, atol=0)


def lora(model: PreTrainedModel, targets: list[str], **options: object) -> nn.Module:
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)  # as they come they are zero, and the adapter does nothing
    return peft


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_lora(name: str) -> None:
    """In PEFT's wrapper: only adapters get gradients; switched off, the model's own log-probabilities."""
    model, batch = lora(tiny_model(name), ["q_proj", "down_proj"]), padded_batch()
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients(model, loss)
    assert found
    assert all("lora_" in name for name in found)
    assert_gradients_equal(found, gradients(model, expected))
    with model.disable_adapter(), torch.no_grad():
        reference = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
        torch.testing.assert_close(reference, own_loss(model, batch), rtol=1e-5, atol=1e-6)
    assert abs(reference - loss) > 1e-3


def test_a_head_that_peft_trains_whole() -> None:
    """`modules_to_save` puts a copy in the head's place: that one is used and gets the gradient, or is switched off."""
    model, batch = lora(tiny_model("Llama"), ["q_proj"], modules_to_save=["lm_head"]), padded_batch()
    copy = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.add_(torch.randn(copy.weight.shape))
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients(model, loss)
    assert any("lm_head.modules_to_save" in name for name in found)
    assert_gradients_equal(found, gradients(model, expected))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS), own_loss(model, batch), rtol=1e-5, atol=1e-6
        )


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
        (torch.empty(0), r"empty here: if it is sharded \(ZeRO-3\), gather it"),
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
        ({"cu_seq_lens_q": torch.tensor([0, 12]), "attention_mask": None}, r"must have input_ids \[1, N\]"),
    ],
)
def test_batches_that_do_not_go_together(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conspo_loss_of(tiny_model("Llama"), padded_batch() | change, REWARDS, 2)


def test_packing_what_is_not_per_token_raises() -> None:
    with pytest.raises(ValueError, match=r"batch\['rewards'\] must be \[4, 12\], as attention_mask"):
        packed(padded_batch() | {"rewards": REWARDS})


def test_scores_of_packed_and_padded_rollouts() -> None:
    """The layout serves the parts too."""
    model, flat = tiny_model("Llama"), packed(padded_batch())
    inputs = head_inputs(model, flat)
    logprobs = linear_token_logprobs(**inputs)
    scores = sequence_scores(logprobs, flat["labels"], cu_seqlens=flat["cu_seq_lens_q"], shift=True)
    torch.testing.assert_close(scores, linear_conspo_scores(**head_inputs(model, padded_batch())), rtol=0, atol=1e-5)


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
        assert required("transformers", "5.0", extra="transformers") is old
        return
    with pytest.raises(ImportError, match=rf"got {version}: pip install 'conspo-kernels\[transformers\]'"):
        required("transformers", "5.0", extra="transformers")
