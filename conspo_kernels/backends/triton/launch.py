"""How the kernels that walk rows of logits are launched: a table, so that nothing is timed behind a user's back.

The same inputs give the same bits on every rank. `python -m benchmarks.autotune` times the candidates on a GPU and
prints the row to set.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """lanes: vectors of 16 bytes per tile. A thread has `vectors_per_thread`, and at best waits for all of them."""

    lanes: int
    num_warps: int


# "forward", "backward"; "heavy forward", of 16-bit logits whose tanh is a series; "heavy", a backward of such a tanh,
# or of narrow stores; "forward_backward", below.
# A multiprocessor has to keep bandwidth * latency / multiprocessors bytes in flight: at 0.6 to 0.8 us 11 to 15 KB on an
# A100, 15 to 20 on an H100, 20 to 26 on an H200; half of it for a kernel that writes as much as it reads.
# What is in flight is counted in machine code (`python -m benchmarks.compiled`, "flight"): loads that are issued before
# the first one is used, times the warps that the registers leave room for. Compilers differ: below is the least of
# Triton 3.6.0 to 3.9.0, sm_90 and sm_100. Nothing here is measured yet: where a GPU says otherwise, change its row.
# "forward_backward": one program per row, whose second look at the row is to find it in the caches. 1,024 threads of
# more than 32 registers, which four vectors each need, leave room for one row per multiprocessor. Keep that.
TABLE: dict[str, dict[str, Launch]] = {
    "sm": {
        "forward": Launch(512, 4),  # 72 KB, with a softcap 32
        "heavy forward": Launch(256, 4),  # 28 KB: arithmetic limits it, to what 11 KB feed
        "backward": Launch(512, 4),  # 54 KB, with entropy 40, with a softcap 24
        "heavy": Launch(256, 4),  # 24 KB where arithmetic limits it, else 32
        "forward_backward": Launch(4096, 32),  # 48 KB
    },
    # gfx942: 5.3 TB/s over 304: 11 KB. A wave is 64 lanes: two loads per thread instead of four, and all 32 waves fit.
    "gfx": {
        "forward": Launch(512, 4),
        "heavy forward": Launch(256, 4),
        "backward": Launch(512, 4),
        "heavy": Launch(256, 4),
        "forward_backward": Launch(4096, 16),
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


@functools.lru_cache(maxsize=16)
def _cached_row_bytes(device: torch.device) -> float:
    """The longest row of which one per multiprocessor fits the L2."""
    if device.type != "cuda":
        return L2_SHARE * L2_BYTES / MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return L2_SHARE * properties.L2_cache_size / properties.multi_processor_count


def row_fits_cache(logits: Tensor) -> bool:
    """Whether the L2 holds the rows in flight of kernel "forward_backward", one per multiprocessor.

    It depends on V, the dtype and the device alone, as the order of every sum does.
    """
    return logits.shape[-1] * logits.element_size() <= _cached_row_bytes(logits.device)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` on the host looks for constexprs in its arguments: 8 us."""
    return -(-a // b)


FUSED = {"enable_fp_fusion": True}  # a * b + c as one instruction: from Triton 3.10 on only where asked


def registers(most: int | None, row: str) -> dict[str, int]:
    """The option that lets a thread have so many registers; there is none on an AMD GPU.  row: of the table."""
    return {} if most is None or row == "gfx" else {"maxnreg": most}


# How many registers a thread may have: by kernel, bytes of a logit, whether there is a tanh, and an entropy. By
# itself ptxas would rather have more warps than all loads of a thread under way. With a tanh of 16-bit logits that
# leaves 14 to 24 KB in flight; a gradient of fp32 logits then takes up to 5 % more instructions; a row of fp32 logits
# with known coefficients takes 32 registers, which makes room for two rows.
# None of these limits spills with Triton 3.6.0, 3.7.1, 3.8.0 or 3.9.0 for sm_80, sm_90 or sm_100. Others did, most
# often 8 bytes on sm_100: of a series, forward 56 and 64 (with entropy 72 to 96), backward 48 to 64 (with entropy 64
# and 72); of a short tanh, forward with entropy 56 to 104, backward 64 to 80.
# No other tile will do. For a series (256, 8) and (128, 4) have 24 KB with Triton 3.6.0 and 16 with 3.7.1, more per
# thread has 12 to 16; for a short tanh (256, 4) has 18 KB, with a limit 7 % more to do.
REGISTERS = {
    ("forward", 2, True, False): 96,
    ("forward", 2, True, True): 112,
    ("heavy forward", 2, True, False): 72,
    ("heavy forward", 2, True, True): 64,
    ("backward", 2, True, False): 88,
    ("backward", 2, True, True): 96,
    ("heavy", 2, True, False): 80,
    ("heavy", 2, True, True): 80,
    ("backward", 4, False, False): 64,
    ("forward_backward", 4, False, False): 64,
}


def register_limit(kernel: str, logits: Tensor, tanh: bool, entropy: bool) -> int | None:
    """Of a kernel that walks rows, where ptxas would choose too few registers by itself."""
    return REGISTERS.get((kernel, logits.element_size(), tanh, entropy))


def vectors_per_thread(launch: Launch, row: str) -> int:
    """How many vectors of a tile one thread holds.  row: of the table."""
    threads = launch.num_warps * (64 if row == "gfx" else 32)
    return max(launch.lanes // threads, 1)
