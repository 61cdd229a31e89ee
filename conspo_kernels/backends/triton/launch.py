"""How the kernels that walk rows of logits are launched: a table, so that nothing is timed behind a user's back.

The same inputs give the same bits on every rank. `python -m benchmarks.autotune` times the candidates on a GPU and
prints the row to set.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """lanes: vectors of 16 bytes per tile, `vectors_per_thread` of them in flight per thread."""

    lanes: int
    num_warps: int


# kernel: "forward", "backward", or "heavy", a backward whose slope or narrow stores double the registers per logit.
# Registers, and the warps that fit them, are those of `python -m benchmarks.compiled`, bf16. A multiprocessor has to
# keep bandwidth * latency / multiprocessors bytes in flight, about 600 ns on a GPU; every row has a margin of two.
# Nothing here is measured yet: where a GPU says otherwise, change its row.
# "known": forward and backward of a row in one program, whose second look at the row is to find it in the L2. 1,024
# threads of more than 32 registers leave room for one row per multiprocessor (for fp32 logits two). Do not tune this
# away.
TABLE: dict[str, dict[str, Launch]] = {
    # sm_80: 2 TB/s over 108: 11 KB. sm_90: 3.3 over 132: 15 KB. sm_100: 8 over 148: 32 KB. Forward 56 registers, 36
    # warps, 72 KB; backward 64 registers, 32 warps, 64 KB. With 1024 lanes 72 and 128 registers, 28 and 16 warps: no
    # more in flight, and fewer warps to hide the arithmetic.
    "sm": {
        "forward": Launch(512, 4),
        "backward": Launch(512, 4),
        "heavy": Launch(256, 4),
        "known": Launch(2048, 32),
        "heavy known": Launch(1024, 32),
    },
    # gfx942: 5.3 TB/s over 304: 11 KB. A wave is 64 lanes: two loads per thread instead of four, and all 32 waves fit:
    # 64 KB.
    "gfx": {
        "forward": Launch(512, 4),
        "backward": Launch(512, 4),
        "heavy": Launch(256, 4),
        "known": Launch(2048, 16),
        "heavy known": Launch(1024, 16),
    },
}
DEFAULT = "sm_90"  # the architecture of the interpreter
L2_SHARE = 0.85  # that the rows in flight may take: a row leaves as it is read again, half of them are half read
L2_BYTES, MULTIPROCESSORS = 50 * 2**20, 132  # of an H100, where no GPU says its own


@functools.lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """As compilers call it: "sm_90", "gfx942"."""
    if device.type != "cuda":
        return DEFAULT
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}0"


def family(device: torch.device) -> str:
    """The row of the table: "sm" of NVIDIA, "gfx" of AMD."""
    return "gfx" if architecture(device).startswith("gfx") else "sm"


def launch_of(kernel: str, logits: Tensor) -> Launch:
    """How to launch a kernel on these logits."""
    return TABLE[family(logits.device)][kernel]


@functools.lru_cache(maxsize=16)
def _cached_row_bytes(device: torch.device) -> float:
    """The longest row of which one per multiprocessor fits the L2."""
    if device.type != "cuda":
        return L2_SHARE * L2_BYTES / MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return L2_SHARE * properties.L2_cache_size / properties.multi_processor_count


def row_fits_cache(logits: Tensor) -> bool:
    """Whether the L2 holds the rows in flight of kernel "known".

    It depends on V, the dtype and the device alone, as the order of every sum does.
    """
    rows = 2 if logits.element_size() == 4 else 1
    return rows * logits.shape[-1] * logits.element_size() <= _cached_row_bytes(logits.device)


FUSED = {"enable_fp_fusion": True}  # a * b + c as one instruction: from Triton 3.10 on only where asked


def registers(most: int, device: torch.device) -> dict[str, int]:
    """The option that lets a thread have so many registers; there is none on an AMD GPU."""
    return {} if family(device) == "gfx" else {"maxnreg": most}


def vectors_per_thread(launch: Launch, device: torch.device) -> int:
    """How many vectors of a tile one thread holds."""
    threads = launch.num_warps * (64 if family(device) == "gfx" else 32)
    return max(launch.lanes // threads, 1)
