"""What the machine can do: copy and read bandwidth, and the rate of a large GEMM. Ratios elsewhere are of these.

python -m benchmarks.timing.ceilings --device cuda --out DIR    # environment.json and ceilings.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.timing.measure import Call, environment, interleaved
from benchmarks.timing.rows import Row
from benchmarks.timing.tables import write

# Bytes that are copied, and the sides of the GEMM: larger than any cache, with a warm-up and repeats within seconds.
SIZES = {"cuda": (2 * 2**30, 8192, torch.bfloat16), "cpu": (2**26, 512, torch.float32)}
TINY = (2**16, 32, torch.float32)


def ceilings(device: torch.device, tiny: bool = False, repeats: int = 11) -> dict[str, Row]:
    """Medians of interleaved repeats; bytes count what is read and what is written, operations 2 n^3."""
    size, n, dtype = TINY if tiny else SIZES[device.type]
    source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)  # constants may cost less
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    calls = {
        "copy": Call(lambda: None, lambda _: target.copy_(source)),
        "read": Call(lambda: None, lambda _: source.max()),
        "gemm": Call(lambda: None, lambda _: torch.mm(a, b.t(), out=product)),
    }
    seconds = {name: timing.median for name, timing in interleaved(calls, device, repeats).items()}
    gemm = f"GEMM, {str(dtype).removeprefix('torch.')} {n:,}^3"
    return {
        "copy": {"what": "copy", "seconds": seconds["copy"], "rate": 2 * size / seconds["copy"], "unit": "B/s"},
        "read": {"what": "read", "seconds": seconds["read"], "rate": size / seconds["read"], "unit": "B/s"},
        "gemm": {"what": gemm, "seconds": seconds["gemm"], "rate": 2 * n**3 / seconds["gemm"], "unit": "FLOP/s"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="that it runs, not what it shows")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.out / "environment.json", environment(arguments.device))
    measured = ceilings(arguments.device, arguments.tiny)
    write(arguments.out / "ceilings.json", measured)
    for row in measured.values():
        print(f"{row['what']}: {row['rate'] / 1e9:,.1f} G{row['unit']}")


if __name__ == "__main__":
    main()
