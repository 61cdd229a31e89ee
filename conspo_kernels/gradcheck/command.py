"""The gradient check: values and gradients of every public function and implementation that runs on this machine,
against the fp64 oracle.

Inputs are rounded to the dtype that is checked; then the oracle (`reference.py`, differentiated by autograd) works on
them in fp64. What is allowed, in absolute numbers:

    fp64            1e-10 of the largest number that takes part; and torch.autograd.gradcheck, on a tiny shape
    fp32 and less   2 * the error of eager PyTorch in the same dtype + a floor of a few roundings, and from logits at
                    most 1e-5 for a log-probability, an entropy or a score

Without a GPU Triton's kernels run under its interpreter, which checks their source. With --compiled sm_90 (or sm_80,
sm_100) they are compiled for that GPU, and their PTX is executed on the CPU, instruction by instruction: values,
gradients, bounds, alignment, barriers and races of the compiled code are checked. All cases and dtypes take about
half a minute on one core. It needs a checkout of the repository, which has the executor. It is no run on a GPU: what
`ptxas` makes of the PTX, and any time, are not checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from ..backends import triton as triton_backend
from ..backends.registry import BACKENDS, unavailable
from .cases import CASES, GRADED, SHAPES, build
from .judge import Truth, judge

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

COMPILED = ("sm_80", "sm_90", "sm_100")  # those of `ptx_executor`, which is in no wheel

# The registered ops, and the public function that is one of them and nothing else.
OPS = {
    "token_logprob": "token_logprobs",
    "sequence_score": "sequence_scores",
    "infonce": "conspo_loss_from_scores",
    "token_logprob_forward_backward": "weighted_score_loss",
    "linear_logprob": "linear_token_logprobs",
    "linear_logprob_forward_backward": "linear_weighted_score_loss",
}


@dataclass(frozen=True)
class Row:
    """One line of the table. Errors and tolerances are absolute; an error is None where it is not finite."""

    op: str
    case: str
    shape: str
    implementation: str
    dtype: str
    ok: bool
    value_error: float | None = None
    value_tolerance: float | None = None
    gradient_error: float | None = None
    gradient_tolerance: float | None = None
    autograd_gradcheck: bool | None = None  # None: not run
    note: str = ""


@dataclass(frozen=True)
class Request:
    """What is asked for.  not_run: implementations that cannot run on the device, and why."""

    ops: Sequence[str]
    shapes: Sequence[str]
    dtypes: Sequence[str]
    implementations: Sequence[str]
    not_run: dict[str, str]
    device: torch.device
    interpreted: bool  # Triton's kernels run under its interpreter
    compiled: str | None = None  # or are compiled for this GPU, and their PTX is executed on the CPU


def rows(request: Request) -> Iterator[Row]:
    """Every check that is asked for, one after the other."""
    for shape in request.shapes:
        for case in CASES:
            if case.op not in request.ops:
                continue
            for dtype in request.dtypes:
                truth = Truth(case, build(case, SHAPES[shape], DTYPES[dtype], request.device))
                for implementation in request.implementations:
                    try:
                        with warnings.catch_warnings():  # numpy warns of what a GPU computes in silence: log 0
                            warnings.filterwarnings("ignore", module=r"triton\.runtime\.interpreter")
                            fields = judge(truth, implementation, request.device)
                    except Exception as error:  # one check that cannot run does not hide what the others say
                        fields = {"ok": False, "note": f"{type(error).__name__}: {error}"}
                    yield Row(case.op, case.name, shape, implementation, dtype, **fields)


def printed(table: Iterable[Row]) -> Iterator[Row]:
    """The rows, each printed as its check ends; what went wrong under its line."""
    op, name = (max(len(getattr(case, field)) for case in CASES) for field in ("op", "name"))
    line = f"{{:{op}}}  {{:{name}}}  {{:6}} {{:7}} {{:5}} {{:>9}} {{:>9}} {{:>9}} {{:>9}}  {{:9}} {{}}"
    errors = ("value err", "allowed", "grad err", "allowed")
    print(line.format("op", "case", "shape", "impl", "dtype", *errors, "gradcheck", "verdict"), flush=True)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    for row in table:
        numbers = map(number, (row.value_error, row.value_tolerance, row.gradient_error, row.gradient_tolerance))
        words = {None: "-", True: "ok", False: "FAIL"}
        names = (row.op, row.case, row.shape, row.implementation, row.dtype)
        print(line.format(*names, *numbers, words[row.autograd_gradcheck], words[row.ok]), flush=True)
        if row.note:
            print(f"    {row.note}", flush=True)
        yield row


def print_heading(request: Request) -> None:
    print(f"gradient check on {request.device}, against the fp64 oracle")
    if "triton" in request.implementations and request.interpreted:
        print("Triton runs under its interpreter on the CPU: the kernels' arithmetic is checked, not what a GPU makes")
    if request.compiled:
        print(
            f"Triton compiles for {request.compiled}, and the PTX is executed on the CPU: no GPU and no ptxas take part"
        )
    for name, reason in request.not_run.items():
        print(f"not run: {name}: {reason}")
    print("allowed: fp64 1e-10 of the largest number; others 2 x the error of eager PyTorch in that dtype + rounding,")
    print("         and at most 1e-5 for log-probabilities, entropies and scores of logits")
    print()


def gradcheck(request: Request, as_json: bool) -> bool:
    """Run the checks and print them; whether all hold."""
    start = time.perf_counter()
    if as_json:
        results = list(rows(request))
    else:
        print_heading(request)
        results = list(printed(rows(request)))
    seconds = time.perf_counter() - start
    failed = sum(not row.ok for row in results)
    if as_json:
        report = {
            "ok": failed == 0, "checks": len(results), "failed": failed, "device": str(request.device),
            "triton_interpreted": request.interpreted, "compiled": request.compiled, "not_run": request.not_run,
            "seconds": seconds,
            "rows": [asdict(row) for row in results],
        }  # fmt: skip
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        print(f"\n{len(results)} checks, {failed} failed, {seconds:.1f} s")
    return failed == 0


def device_from(text: str) -> torch.device:
    """For argparse: a device of this machine."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"not a device: {text!r}") from error
    number = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= number:
        raise argparse.ArgumentTypeError(f"there is no {text} here")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device_from, help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--implementation", nargs="+", choices=tuple(BACKENDS), help="default: all that run here")
    parser.add_argument(
        "--compiled",
        choices=COMPILED,
        help="without a GPU: compile Triton's kernels for this one and execute their PTX on the CPU, "
        "with checks of bounds, alignment, barriers and races",
    )
    for option, choices, default in (
        ("--dtype", DTYPES, list(DTYPES)),
        ("--op", [*GRADED, *OPS], list(GRADED)),
        ("--shape", SHAPES, ["small"]),
    ):
        words = f"one or more of {', '.join(choices)}; default: {', '.join(default)}"
        parser.add_argument(option, nargs="+", choices=list(choices), default=default, metavar="NAME", help=words)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The command's exit code: 0, or 1 where a check fails."""
    with contextlib.ExitStack() as stack:
        if arguments.compiled:
            _compile_and_execute(arguments, parser, stack)
        elif not torch.cuda.is_available() and "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton defines the kernels
        return _run(arguments, parser)


def _compile_and_execute(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, stack: contextlib.ExitStack
) -> None:
    """Until the stack is left, Triton's kernels are compiled and executed. What cannot be so is wrong usage."""
    arguments.device = arguments.device or torch.device("cpu")
    if arguments.device.type != "cpu":
        parser.error(f"--compiled executes on the CPU, not on {arguments.device}")
    if "triton" not in (arguments.implementation or ["triton"]):
        parser.error("--compiled is for the implementation triton")
    if not triton_backend.INSTALLED:
        parser.error("--compiled needs Triton, which is not installed")
    try:
        from ptx_executor import compiled
    except ModuleNotFoundError:
        parser.error(
            "--compiled needs a checkout of conspo_kernels: run it in the repository's root, where ptx_executor/ is"
        )
    try:
        stack.enter_context(compiled(arguments.compiled))
    except RuntimeError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device: torch.device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {name: unavailable(name, device) for name in BACKENDS}
    for name in arguments.implementation or ():
        if reasons[name] is not None:
            parser.error(f"implementation {name} does not run on {device}: {reasons[name]}")
    request = Request(
        ops=[OPS.get(op, op) for op in arguments.op],
        shapes=arguments.shape,
        dtypes=arguments.dtype,
        implementations=arguments.implementation or [name for name, reason in reasons.items() if reason is None],
        not_run={name: reason for name, reason in reasons.items() if reason is not None},
        device=device,
        interpreted=not arguments.compiled and unavailable("triton", torch.device("cpu")) is None,
        compiled=arguments.compiled,
    )
    return 0 if gradcheck(request, arguments.json) else 1
