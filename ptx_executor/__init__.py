"""Triton's kernels without a GPU: the PTX that they compile to, executed thread by thread on CPU tensors.

    from ptx_executor import compiled

    with compiled("sm_90"):  # or sm_80, sm_100
        logprobs = token_logprobs(logits, labels, implementation="triton")

compiles each kernel as Triton would for that GPU, and runs the PTX in numpy (`execute.py`). The launchers and ops run
unchanged. What it computes is what the compiled code says, with the rounding of every instruction; approximate
instructions are correctly rounded, or with `compiled("sm_90", perturb=seed)` as wrong as the PTX ISA allows. A kernel
that reads or writes outside of the storages it was passed, at an address that is not aligned, in a race or at a barrier
or a shuffle that not all threads reach raises `Fault`; an instruction that is not known raises NotImplementedError.

It is not a GPU: `ptxas` may still contract a multiplication and an addition that carry no rounding modifier, and
caches, time and the memory model are not there. TRITON_INTERPRET must not be set when Triton's kernels are imported.
"""

from .memory import Fault
from .session import compiled

__all__ = ["Fault", "compiled"]
