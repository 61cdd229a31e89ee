"""The command line: python -m conspo_kernels info, and python -m conspo_kernels gradcheck.

info prints versions, devices and the implementation of each op; with --trainer also what of the installed TRL, verl or
transformers is supported and which path would run.  gradcheck compares values and gradients with fp64.

Exit codes: 0; 1 where a gradient check fails; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from . import __version__
from .backends import native
from .backends import triton as triton_backend
from .backends.registry import BACKENDS, choose, unavailable
from .gradcheck import command as gradcheck
from .gradcheck.command import OPS
from .integrations import support


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, under its interpreter."""
    return unavailable("triton", torch.device("cpu")) is None


def triton_version() -> str | None:
    if not triton_backend.INSTALLED:
        return None
    import triton

    return triton.__version__


def information() -> dict[str, Any]:
    """Versions, devices, and which implementation of each op runs where."""
    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    choices = []
    for device in map(torch.device, ["cpu", *(["cuda"] if cuda else [])]):
        for op in OPS:
            reasons = {name: unavailable(name, device) for name in BACKENDS}
            choices.append(
                {
                    "op": op,
                    "device": device.type,
                    "auto": choose("auto", device),
                    "runs": [name for name, reason in reasons.items() if reason is None],
                    "others": {name: reason for name, reason in reasons.items() if reason is not None},
                }
            )
    return {
        "versions": {
            "conspo_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton_version(),
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
            for p in cuda
        ],
        "native_instruction_set": native.instruction_set(),
        "native_instruction_sets": native.instruction_sets(),
        "triton_interprets": interpreting(),
        "implementations": choices,
    }


def print_information(info: dict[str, Any]) -> None:
    lines = [(name, value or "absent") for name, value in info["versions"].items()]
    lines += [("platform", info["platform"]), ("cpu", f"{info['cpu_threads']} threads")]
    for i, gpu in enumerate(info["cuda_devices"]):
        lines.append((f"cuda:{i}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"))
    if not info["cuda_devices"]:
        lines.append(("cuda devices", "none"))
    lines.append(("native kernels", info["native_instruction_set"] or native.OBSTACLE))
    lines.append(("Triton interprets", "yes" if info["triton_interprets"] else "no"))
    for name, value in lines:
        print(f"{name:18} {value}")
    print(f"\n{'op':32} {'device':7} {'auto':7} {'runs':15} others")
    for row in info["implementations"]:
        runs = ", ".join(row["runs"])
        print(f"{row['op']:32} {row['device']:7} {row['auto']:7} {runs:15} {', '.join(row['others']) or '-'}")
    reasons = [(row["device"], *pair) for row in info["implementations"] for pair in row["others"].items()]
    print()
    for device, name, reason in dict.fromkeys(reasons):
        print(f"{name} does not run on {device}: {reason}")
    if "trainer" in info:
        print("", *support.lines(info["trainer"]), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m conspo_kernels", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and which implementation of each op runs where")
    check = commands.add_parser(
        "gradcheck",
        help="values and gradients of every public function against the fp64 oracle",
        description=gradcheck.__doc__,
        formatter_class=formatter,
    )
    gradcheck.add_arguments(check)
    info.add_argument("--trainer", choices=support.FRAMEWORKS, help="what of it is supported, and what would run")
    for command in (info, check):
        command.add_argument("--json", action="store_true", help="print JSON rather than a table")
    arguments = parser.parse_args(argv)
    if arguments.command == "gradcheck":
        return gradcheck.run(arguments, check)
    described = information()
    if arguments.trainer:
        described["trainer"] = support.support(arguments.trainer)
    if arguments.json:
        print(json.dumps(described, indent=1))
    else:
        print_information(described)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does; the null device takes the flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
