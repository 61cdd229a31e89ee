"""The build for the Hugging Face Hub: loaded by the real `kernels` package from a local folder, beside this package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# In a process of its own: the kernel stays loaded, and its Triton kernels are of this process's mode.
CODE = """
import json, sys
from pathlib import Path
import torch
from kernels import get_local_kernel
import conspo_kernels

kernel = get_local_kernel(Path(sys.argv[1]))
assert kernel.__name__ != "conspo_kernels" and Path(kernel.__file__).is_relative_to(sys.argv[1])
logits, labels = torch.randn(4, 5, 300, requires_grad=True), torch.randint(300, (4, 5))
rewards, errors = torch.tensor([1.0, 0, 0, 1]), {}
for implementation in ("torch", "triton"):
    pairs = []
    for package, name in ((kernel, implementation), (conspo_kernels, "torch")):
        logprobs, entropy = package.token_logprobs(logits, labels, return_entropy=True, implementation=name)
        loss = package.conspo_loss(logits, labels, rewards, 2, implementation=name)
        pairs.append([logprobs, entropy, loss, torch.autograd.grad(loss + entropy.sum(), logits)[0]])
    errors[implementation] = max((a - b).abs().max().item() for a, b in zip(*pairs))
of = lambda z: kernel.token_logprobs(z, labels, implementation="torch")
whole = torch.compile(of, fullgraph=True, backend="aot_eager")
errors["compiled"] = (whole(logits) - of(logits)).abs().max().item()
print(json.dumps({"public": sorted(kernel.__all__) == sorted(conspo_kernels.__all__), "errors": errors}))
"""


def test_the_build_is_loaded_by_the_kernels_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed")
    subprocess.run([sys.executable, REPOSITORY / "hub" / "build.py", tmp_path], check=True, capture_output=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["public"]
    assert max(report["errors"].values()) < 1e-5, report["errors"]


def test_the_same_sources_give_the_same_build(tmp_path: Path) -> None:
    builds = []
    for name in ("first", "second"):
        subprocess.run([sys.executable, REPOSITORY / "hub" / "build.py", tmp_path / name], check=True)
        variant = tmp_path / name / "build" / "torch-universal"
        builds.append({p.relative_to(variant): p.read_bytes() for p in variant.rglob("*") if p.is_file()})
    assert builds[0] == builds[1]
    assert not any(path.suffix == ".so" or path.parts[0] in ("ptx_executor", "integrations") for path in builds[0])
