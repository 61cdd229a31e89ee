"""Compiles what the gpu suite launches, without a GPU, so that none of a GPU's minutes are spent on it.

    TRITON_CACHE_DIR=DIR python -m benchmarks.warm --target sm_90         # here, with the Triton of the GPU machine
    TRITON_CACHE_DIR=DIR python -m benchmarks.run --suite gpu --out OUT   # there, with DIR carried along

Triton finds a binary by its source, its options, the target and its own release: nothing of a machine is in that key.
The gradient check is run on CPU tensors, where every launch compiles and does nothing, and so are the cases of
`compiled.py`. What a GPU launches beyond them (a tensor that begins elsewhere, another path for rewards on the device)
is compiled there; the suite counts it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from benchmarks.compiled import CASES, TARGETS, offline
from benchmarks.gpu_suite.triton_cache import binaries


@contextlib.contextmanager
def launching_nothing(target: str) -> Iterator[None]:
    """Within, Triton's kernels are launched on CPU tensors: compiled for the target, and no more."""
    from conspo_kernels.backends import registry
    from conspo_kernels.backends import triton as triton_backend
    from conspo_kernels.ops import label_alignment

    with (
        offline(TARGETS[target]),
        mock.patch.object(triton_backend, "executed", True),
        mock.patch.object(label_alignment, "_raise_bad_label"),  # nobody has aligned them
    ):
        registry.forget_choices()
        try:
            yield
        finally:
            registry.forget_choices()


def gradcheck(arguments: Sequence[str]) -> None:
    """The gradient check of results that nobody has computed; what it says of them is dropped."""
    from conspo_kernels.__main__ import main as command

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        command(["gradcheck", "--device", "cpu", "--implementation", "triton", *arguments])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--op", nargs="+", default=[], help="of the gradient check, only these")
    parsed = parser.parse_args(arguments)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("TRITON_CACHE_DIR has to name the folder to fill")
    os.environ["TRITON_INTERPRET"] = "0"  # read when Triton defines the kernels
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    before, started = binaries(folder), time.monotonic()
    with launching_nothing(parsed.target):
        for call in CASES.values():
            call()
        gradcheck(["--op", *parsed.op] if parsed.op else [])
    number = binaries(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    print(f"{number} binaries in {folder}, {size / 2**20:.0f} MiB; {number - before} compiled in {seconds:.0f} s")


if __name__ == "__main__":
    main()
