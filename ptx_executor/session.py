"""The ops of this package, run by the executor: `compiled`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from triton import knobs

from conspo_kernels.backends import registry
from conspo_kernels.backends import triton as backend
from conspo_kernels.backends.triton import launch

from .arithmetic import Perturbation
from .driver import TARGETS, Settings, executing


@contextlib.contextmanager
def compiled(
    target: str = "sm_90", *, perturb: int | str | None = None, seed: int = 0, races: bool = True,
    assembled: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Within, `implementation="triton"` runs on CPU tensors: kernels compiled for `target`, their PTX executed.

    Args:
        target: "sm_80", "sm_90" or "sm_100".
        perturb: None: approximate instructions (ex2.approx, div.full ...) are correctly rounded. A number: the seed of
            errors up to what the PTX ISA allows. "up", "down": that whole error in one direction.
        seed: of the order in which CTAs run.
        races: look for races, which costs time and memory where kernels store.
        assembled: compile to machine code too, as for a GPU: in Triton's own cache, where who needs the machine code
            finds it, and who has compiled it has left the PTX.

    Raises:
        ValueError: another target.
        RuntimeError: Triton interprets; TRITON_INTERPRET is read when its kernels are defined.
        Fault: at a launch, a kernel that does what it must not.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("Triton interprets its kernels (TRITON_INTERPRET), so there is nothing compiled to execute")
    perturbation = None if perturb is None else Perturbation(perturb)
    architecture, executed = launch.architecture, backend.executed
    launch.architecture = lambda _: target  # type: ignore[assignment]
    backend.executed = True
    registry.forget_choices()
    try:
        with executing(Settings(target, perturbation, np.random.default_rng(seed), races, assembled)):
            yield
    finally:
        launch.architecture, backend.executed = architecture, executed
        registry.forget_choices()
