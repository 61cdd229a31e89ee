"""A loss from a model's hidden states against the same model's own logits, on the architectures whose heads differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from rollouts import (
    LENGTHS,
    OPTIONS,
    REWARDS,
    assert_gradients_equal,
    gradients,
    own_logits,
    own_loss,
    padded_batch,
)
from tiny_models import ARCHITECTURES, STATE_SPACE, lora, multimodal, tiny_model
from torch import nn
from transformers import DataCollatorWithFlattening
from transformers.modeling_flash_attention_utils import _get_unpad_data

from benchmarks.timing.measure import allocations
from conspo_kernels import (
    conspo_weights,
    linear_conspo_scores,
    linear_token_logprobs,
    linear_weighted_score_loss,
    sequence_scores,
)
from conspo_kernels.integrations.transformers import (
    causal_lm_head,
    conspo_loss_of,
    from_unpadded,
    head_inputs,
    packed,
)


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


def test_a_multimodal_models_transform_is_in_its_text_config() -> None:
    model, batch = multimodal("PaliGemma"), padded_batch()
    batch["input_ids"] = batch["input_ids"].clamp(min=7)
    assert causal_lm_head(model).softcap == 3.0
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # its forward leaves the softcap out there
        with pytest.raises(ValueError, match="makes other logits than its config says"):
            conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
        return
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    torch.testing.assert_close(loss, own_loss(model, batch), rtol=1e-5, atol=1e-6)


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


def cast_by_a_hook(head: nn.Linear) -> None:
    head.float().register_forward_pre_hook(lambda _module, args: (args[0].float(),))


def cast_by_another_forward(head: nn.Linear) -> None:
    """As TRL's `cast_lm_head_to_fp32` does."""
    head.float()
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight, head.bias)


@pytest.mark.parametrize("layout", [dict, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("cast", [cast_by_a_hook, cast_by_another_forward])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_head_in_fp32_over_a_bf16_model(name: str, cast: Callable[[nn.Linear], None], layout) -> None:
    model, batch = tiny_model(name, tie_word_embeddings=False, attn_implementation="eager").bfloat16(), padded_batch()
    cast(model.lm_head)
    expected = own_loss(model, batch)
    assert own_logits(model, batch).dtype == torch.float32
    exact = gradients(model, expected)
    loss = conspo_loss_of(model, layout(batch), REWARDS, 2, **OPTIONS)
    padded = layout is dict
    torch.testing.assert_close(loss, expected, rtol=1e-5 if padded else 1e-2, atol=1e-6 if padded else 1e-3)
    result = gradients(model, loss)
    assert result["lm_head.weight"].dtype == torch.float32
    for key, value in exact.items():  # those of the layers are rounded to bf16
        tolerance = 1e-5 if padded and key == "lm_head.weight" else 1e-2 if padded else 5e-2
        assert (result[key] - value).float().norm() <= tolerance * value.float().norm(), key


@pytest.mark.parametrize("layout", [dict, packed], ids=["padded", "packed"])
def test_under_autocast(layout) -> None:
    model, batch = tiny_model("Qwen3"), padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = conspo_loss_of(model, layout(batch), REWARDS, 2, **OPTIONS)
        expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)


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
    result = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_gradients_equal(result, gradients(model, own_loss(model, batch)))


def test_logits_are_never_whole() -> None:
    """The allocator's largest single request, beside that of the model's own logits, which it sees."""
    torch.use_deterministic_algorithms(False)
    model = tiny_model("Llama", vocab_size=20_000, max_position_embeddings=512)
    ids = torch.randint(3, 20_000, (4, 256))
    batch = {"input_ids": ids, "response_mask": torch.ones_like(ids)}
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    logits_bytes = ids.numel() * 20_000 * 4
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("of the head"))
    conspo_loss_of(model, batch, rewards, 2)  # the check of the head is done
    assert calls == ["of the head"]
    step = allocations(lambda: conspo_loss_of(model, batch, rewards, 2, workspace_mib=4).backward())
    assert calls == ["of the head"]
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_first_token_is_no_response(side: str, masked: bool) -> None:
    """Without a prompt, or with all tokens labelled: nothing predicts a rollout's first token, padding neither."""
    model, batch = tiny_model("Llama"), padded_batch(side)
    batch["labels"] = batch["input_ids"]
    if masked:
        batch["response_mask"] = torch.ones_like(batch["input_ids"])
    loss, expected = (conspo_loss_of(model, layout, REWARDS, 2, **OPTIONS) for layout in (batch, packed(batch)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(model, loss), gradients(model, expected))


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


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_lora(name: str) -> None:
    """In PEFT's wrapper: only adapters get gradients; switched off, the model's own log-probabilities."""
    model, batch = lora(tiny_model(name), ["q_proj", "down_proj"]), padded_batch()
    loss = conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS)
    expected = own_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    result = gradients(model, loss)
    assert result
    assert all("lora_" in name for name in result)
    assert_gradients_equal(result, gradients(model, expected))
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
    result = gradients(model, loss)
    assert any("lm_head.modules_to_save" in name for name in result)
    assert_gradients_equal(result, gradients(model, expected))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            conspo_loss_of(model, batch, REWARDS, 2, **OPTIONS), own_loss(model, batch), rtol=1e-5, atol=1e-6
        )


def test_scores_of_packed_and_padded_rollouts() -> None:
    """The layout serves the parts too."""
    model, flat = tiny_model("Llama"), packed(padded_batch())
    inputs = head_inputs(model, flat)
    logprobs = linear_token_logprobs(**inputs)
    scores = sequence_scores(logprobs, flat["labels"], cu_seqlens=flat["cu_seq_lens_q"], shift=True)
    torch.testing.assert_close(scores, linear_conspo_scores(**head_inputs(model, padded_batch())), rtol=0, atol=1e-5)
