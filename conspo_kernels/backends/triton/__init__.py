"""Triton kernels, for GPUs. Triton itself is imported by the module that has the first function asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from . import group_infonce, label_alignment, scale, sequence_score, token_logprob

    align = label_alignment.align
    token_logprob_forward = token_logprob.forward
    token_logprob_backward = token_logprob.backward
    token_logprob_forward_backward = token_logprob.forward_backward
    sequence_score_forward = sequence_score.forward
    sequence_score_backward = sequence_score.backward
    token_coefficients = sequence_score.coefficients
    masked_coefficients = sequence_score.masked
    weighted_sum = sequence_score.weighted_sum
    infonce = group_infonce.infonce
    scale_ = scale.scale_
else:

    def __getattr__(name: str) -> Any:
        """What the contract asks for, from its module, which imports Triton. It is asked for once, then it is here."""
        if name not in FUNCTIONS:
            raise AttributeError(name)
        module, _, function = FUNCTIONS[name].partition(".")
        globals()[name] = found = getattr(importlib.import_module(f".{module}", __name__), function)
        return found


FUNCTIONS = {
    "align": "label_alignment.align",
    "token_logprob_forward": "token_logprob.forward",
    "token_logprob_backward": "token_logprob.backward",
    "token_logprob_forward_backward": "token_logprob.forward_backward",
    "sequence_score_forward": "sequence_score.forward",
    "sequence_score_backward": "sequence_score.backward",
    "token_coefficients": "sequence_score.coefficients",
    "masked_coefficients": "sequence_score.masked",
    "weighted_sum": "sequence_score.weighted_sum",
    "infonce": "group_infonce.infonce",
    "scale_": "scale.scale_",
}
executed = False  # the kernels run on CPU tensors as compiled PTX: set by `ptx_executor`
INSTALLED = importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """Whether Triton's kernels run on the CPU: decided when Triton defines them, by the environment."""
    wanted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if wanted and INSTALLED:
        _mend_interpreter()
    return wanted


@functools.cache
def _mend_interpreter() -> None:
    """Numbers in Triton 3.6's interpreter are arrays [1], of which numpy 2.4 makes no bound of a `range`."""
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index


def obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not _interpreting() and not executed:
        return f"Triton runs on CUDA tensors (or, for tests, with TRITON_INTERPRET=1), the tensors are on {device}"
    return None
