"""Triton kernels, for GPUs. Triton itself is imported when the first of the contract's functions is asked for."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from ..contract import Backend

if TYPE_CHECKING:
    from .functions import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """A function of the contract: asked for the first time, Triton is imported, and then it is here."""
        if name.startswith("_") or not hasattr(Backend, name):
            raise AttributeError(name)
        try:
            from . import functions

            found = getattr(functions, name)
        except AttributeError as error:  # which `hasattr` would take for a function that is not there
            raise ImportError(f"Triton's kernels cannot be imported: {error}") from error
        globals()[name] = found
        return found


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
