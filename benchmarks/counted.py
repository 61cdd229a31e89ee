"""Speed that can be counted without a GPU: instructions per logit, and what rate they allow beside memory's. Run as

    python -m benchmarks.counted [--json | --markdown] [--wheels FOLDER]

The main loops of compiled kernels are read in machine code (`machine_code.py`). A multiprocessor issues 4 warp
instructions per clock, which is 128 lanes, and its pipes take so many lanes per clock: FMA 128, ALU 64, MUFU 16, loads
and stores 32 words. The busiest of them sets the logits per second that arithmetic allows; memory's are its bandwidth
over the bytes of a logit that are loaded and stored. Their ratio says which one limits a kernel: below 1 it is
arithmetic. It is an upper bound and no measurement: latencies, dependences and barriers are not in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compiled import CASES, TARGETS, offline
from benchmarks.compiled_code.machine_code import Pipes, passes
from benchmarks.rivals.counted_peers import NOT_COUNTED, PEERS
from benchmarks.timing.tables import markdown
from benchmarks.timing.wheels import use, versions


class GPU(NamedTuple):
    """clock: Hz under load.  bandwidth: bytes per second of a large copy, not of the data sheet."""

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = {
    "H100": GPU("sm_90", 132, 1.755e9, 3.0e12),
    "H200": GPU("sm_90", 132, 1.755e9, 4.2e12),
    "B200": GPU("sm_100", 148, 1.9e9, 7.2e12),
}
LANES = Pipes(issue=128, fma=128, alu=64, mufu=16, lsu=32)
OURS = "conspo_kernels"


@dataclass(frozen=True)
class Count:
    """One kernel of a package.

    pipes: slots per logit.  ratio: arithmetic's rate over memory's, by GPU.  limit: the busiest pipe.
    """

    package: str
    what: str
    target: str
    logits_per_thread: int
    bytes_per_logit: float
    barriers: int
    pipes: Pipes
    ratio: dict[str, float]
    limit: str


def count(kernel: Any, package: str, what: str, target: str, itemsize: int) -> Count:
    """itemsize: bytes of a logit."""
    walks = passes(kernel)
    logits = walks[0].load_bytes // itemsize
    total = walks[0].pipes
    for walk in walks[1:]:
        total = total.plus(walk.pipes)
    per_logit = total.per(logits)
    clocks = Pipes(*(slots / lanes for slots, lanes in zip(per_logit, LANES, strict=True)))
    size = sum(walk.load_bytes + walk.store_bytes for walk in walks) / logits
    ratio = {
        name: gpu.multiprocessors * gpu.clock / max(clocks) * size / gpu.bandwidth
        for name, gpu in GPUS.items()
        if gpu.target == target
    }
    limit = Pipes._fields[clocks.index(max(clocks))]
    barriers = sum(walk.barriers for walk in walks)
    return Count(package, what, target, logits, size, barriers, per_logit, ratio, limit)


def _compiled(target: str, call: Callable[[], object]) -> list[Any]:
    with offline(TARGETS[target]) as kernels:
        call()
    return kernels


def ours(target: str) -> Iterator[Count]:
    """The kernels that walk rows of logits, in the cases of `compiled.py`."""
    directions = {"_statistics_kernel": "forward", "_backward_kernel": "backward"}
    for case, call in CASES.items():
        if not case.startswith(("bf16, V", "fp32, V")):
            continue
        for kernel in _compiled(target, call):
            if direction := directions.get(kernel.metadata.name):
                yield count(kernel, OURS, f"{direction}: {case}", target, 4 if case.startswith("fp32") else 2)


def peers(target: str) -> Iterator[Count | str]:
    """Those of other packages; a line of text for one that is absent or cannot be counted."""
    for peer in PEERS:
        if importlib.util.find_spec(peer.package) is None:
            yield f"{peer.package}: not installed"
            continue
        kernels = _compiled(target, peer.call)
        assert len(kernels) == len(peer.names), [kernel.metadata.name for kernel in kernels]
        for kernel, what in zip(kernels, peer.names, strict=True):
            yield count(kernel, peer.package, f"{what}: bf16, V 151,936", target, 2)
    for package, reason in NOT_COUNTED.items():
        absent = "" if importlib.util.find_spec(package) else "not installed; "
        yield f"{package}: {absent}{reason}"


def counted(targets: tuple[str, ...] = ("sm_90", "sm_100")) -> tuple[list[Count], list[str]]:
    """All counts, and what could not be counted."""
    counts: list[Count] = []
    notes: list[str] = []
    for target in targets:
        for count_or_note in (*ours(target), *peers(target)):
            if isinstance(count_or_note, Count):
                counts.append(count_or_note)
            elif count_or_note not in notes:
                notes.append(count_or_note)
    return counts, notes


def table(counts: list[Count]) -> str:
    """A line per kernel and target."""
    headers = (
        "package", "kernel: logits", "target", "instructions", "FMA", "ALU", "MUFU", "bytes", "barriers", "limit",
        *GPUS,
    )  # fmt: skip
    lines = [
        (
            it.package, it.what, it.target, *(f"{slots:.1f}" for slots in it.pipes[:4]), f"{it.bytes_per_logit:.0f}",
            it.barriers or "", it.limit, *(f"{it.ratio[gpu]:.2f}" if gpu in it.ratio else "" for gpu in GPUS),
        )
        for it in counts
    ]  # fmt: skip
    return markdown(headers, lines, text_columns=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON rather than a table")
    form.add_argument("--markdown", action="store_true", help="print the page docs/counted.md")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of other packages, for this run")
    arguments = parser.parse_args()
    if arguments.wheels:
        use(arguments.wheels)
    counts, notes = counted()
    if arguments.json:
        print(json.dumps({"counts": [asdict(it) | {"pipes": it.pipes._asdict()} for it in counts], "notes": notes}))
    elif arguments.markdown:
        print(page(counts, notes))
    else:
        print("\n".join([table(counts), *notes]))


def page(counts: list[Count], notes: list[str]) -> str:
    import triton

    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return PAGE.format(
        table=table(counts),
        notes="\n".join(f"- {note}" for note in notes),
        versions=f"Triton {triton.__version__}" + (f", {packages}" if packages else ""),
        gpus="\n".join(
            f"- {name}: {gpu.target}, {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:g} GHz, "
            f"{gpu.bandwidth / 1e12:g} TB/s"
            for name, gpu in GPUS.items()
        ),
    )


PAGE = """\
# Counted, not measured

No GPU has run these kernels. This page is printed by `python -m benchmarks.counted --markdown`: it counts what the main
loops of the compiled kernels spend, and compares the rate that arithmetic allows with the rate that memory allows. The
last three columns are that ratio: above 1 memory limits a kernel, below 1 arithmetic does. It bounds a kernel's speed
from above; latency, dependences and barriers are not in it.

All columns of slots are per logit. "instructions" is what is issued, 4 warp instructions per multiprocessor and clock.
"FMA", "ALU" and "MUFU" are the lanes of three pipes, of which a multiprocessor has 128, 64 and 16. A packed instruction
takes one issue slot and two FMA lanes; an integer multiply-add takes two FMA lanes. "bytes" are loaded and stored; a
kernel that goes over its rows twice counts both. A kernel without a loop is counted whole, addresses and edges too.

{gpus}

Counted with {versions}.

{table}

{notes}
"""


if __name__ == "__main__":
    main()
