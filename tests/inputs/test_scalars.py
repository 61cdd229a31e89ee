"""Settings that are scalars of NumPy: a schedule or a table of a trainer gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from conspo_kernels import ConSPOLoss, CosineMargin, Parallel, conspo_loss, linear_conspo_loss

torch.manual_seed(0)
LOGITS, HIDDEN, WEIGHT = torch.randn(4, 3, 11), torch.randn(4, 3, 5), torch.randn(11, 5)
LABELS, REWARDS = torch.randint(11, (4, 3)), torch.tensor([1.0, 0, 0, 1])
LABELS[1, 2] = -7
PYTHON = {
    "tau": 0.5, "margin": 0.25, "reward_threshold": 0.5, "num_groups": 2, "temperature": 0.75, "logit_scale": 1.5,
    "softcap": 8.0, "ignore_index": -7,
}  # fmt: skip


def both(groups: object, settings: dict[str, object]) -> list[Tensor]:
    losses = []
    for names in (["logits"], ["hidden", "weight"]):
        leaves = [x.clone().requires_grad_() for x in ((LOGITS,) if names == ["logits"] else (HIDDEN, WEIGHT))]
        function = conspo_loss if names == ["logits"] else linear_conspo_loss
        more = {} if names == ["logits"] else {"workspace_mib": type(settings["tau"])(1)}
        loss = function(*leaves, LABELS, REWARDS, groups, **settings, **more)  # type: ignore[operator]
        losses += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return losses


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("integer", [np.int8, np.int32, np.int64])
def test_scalars_of_numpy(number: type, integer: type) -> None:
    settings = {name: (integer if isinstance(value, int) else number)(value) for name, value in PYTHON.items()}
    for ours, expected in zip(both(integer(2), settings), both(2, PYTHON), strict=True):
        assert torch.equal(ours, expected)


def test_scalars_of_numpy_that_are_no_settings() -> None:
    """A truth value is no number, and an array is none either."""
    for wrong in (np.bool_(True), np.ones(1), np.complex64(1)):
        with pytest.raises(TypeError, match="tau must be a number, got "):
            conspo_loss(LOGITS, LABELS, REWARDS, 2, **PYTHON | {"tau": wrong})
    with pytest.raises(ValueError, match="temperature must be positive"):
        conspo_loss(LOGITS, LABELS, REWARDS, 2, **PYTHON | {"temperature": np.float32(np.nan)})
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        conspo_loss(LOGITS, LABELS, REWARDS, 2, **PYTHON | {"ignore_index": np.float32(1)})


def test_under_torch_compile() -> None:
    """A module keeps numbers of Python; of a function's own arguments torch.compile makes arrays, which are none."""
    torch._dynamo.reset()
    module = ConSPOLoss(tau=np.float32(0.5), margin=np.float64(0.25), ignore_index=np.int64(-7))  # type: ignore[arg-type]
    assert all(type(value) in (int, float) for value in module.settings.values())
    traced = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = conspo_loss(LOGITS, LABELS, REWARDS, 2, tau=0.5, margin=0.25, ignore_index=-7)
    torch.testing.assert_close(traced(LOGITS, LABELS, REWARDS, 2), expected)


def test_elsewhere() -> None:
    assert CosineMargin(np.int64(100), np.float32(0.5), np.float32(0.25))(np.int64(25)) == 0.5
    assert type(Parallel(vocab_start=np.int64(0)).vocab_start) is int
