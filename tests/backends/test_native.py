"""The C++ path: every instruction set, any number of threads, exp to its last digits, memory, what is built when."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import processes
import pytest
import torch
from torch import Tensor

from benchmarks.timing.measure import allocations
from conspo_kernels import conspo_loss, token_logprobs
from conspo_kernels.backends import eager, native, registry
from conspo_kernels.values import IGNORED, Incoming, LogitRows, LogitTransform, Statistics

pytestmark = pytest.mark.skipif(native.OBSTACLE is not None, reason=str(native.OBSTACLE))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = LogitTransform()


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs with each of those that this CPU has."""
    best = native.instruction_set()
    native._C.set_instruction_set(request.param)
    yield request.param
    native._C.set_instruction_set(best)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of the type of `actual` at the exact value, subnormal ones included."""
    return np.abs(actual.astype(np.longdouble) - exact) / np.spacing(np.abs(exact).astype(actual.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("negative", [False, True], ids=["everywhere", "negative"])
def test_exp(dtype: torch.dtype, negative: bool, instruction_set: str) -> None:
    """Within 2 ulp over the whole range; the one for x <= 0 down to the smallest normal result, and 0 below."""
    low, high = (-103.9, 88.7) if dtype == torch.float32 else (-745.0, 709.7)
    normal = -87.33 if dtype == torch.float32 else -708.3
    x = torch.cat(
        [torch.linspace(low, 0 if negative else high, 400_001, dtype=dtype), torch.randn(10_000, dtype=dtype)]
    )
    x = torch.cat([x.clamp(max=0) if negative else x, -torch.logspace(-40, 1, 1000, dtype=torch.float64).to(dtype)])
    result = native._C.exp(x, negative).numpy()
    # numpy's extended precision is 64 bits where the platform has them, else that of a double: enough for fp32.
    exact = np.exp(x.numpy().astype(np.longdouble))
    checked = (x >= normal).numpy() if negative else np.ones(len(x), dtype=bool)
    assert ulps(result[checked], exact[checked]).max() <= 2
    if negative:
        assert (np.abs(result - exact)[~checked] <= torch.finfo(dtype).tiny).all()


def test_exp_of_what_is_no_number(instruction_set: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(
            [0.0, -0.0, -torch.inf, torch.nan, -1e30, -200.0 if dtype == torch.float32 else -800.0], dtype=dtype
        )
        expected = torch.tensor([1, 1, 0, torch.nan, 0, 0], dtype=dtype)
        for negative in (False, True):
            assert torch.equal(native._C.exp(x, negative).nan_to_num(nan=7), expected.nan_to_num(nan=7))
        assert native._C.exp(torch.tensor([710.0, 1e30, torch.inf], dtype=dtype), False).isinf().all()


def run(logits: Tensor, labels: Tensor, transform: LogitTransform, entropy: bool) -> list[Tensor]:
    rows = LogitRows(logits, labels, transform)
    result = native.token_logprob_forward(rows, entropy)
    grads = torch.rand(labels.shape, dtype=result[0].dtype, generator=torch.Generator().manual_seed(1))
    grad = torch.empty_like(logits)
    native.token_logprob_backward(grad, rows, result.incoming(grads, grads * 0.3 if entropy else None))
    return [x for x in (*result, grad) if x is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 3, 37, 4096, 5003, 100_003])
def test_instruction_sets_agree(dtype: torch.dtype, vocab_size: int, instruction_set: str) -> None:
    """With PyTorch's own, so with each other: every length of a tail, softcap and entropy, -inf and NaN."""
    torch.use_deterministic_algorithms(False)
    logits = (torch.randn(1, 4, vocab_size, dtype=torch.float64) * 4).to(dtype)
    logits[0, 1, : vocab_size // 2] = -torch.inf
    logits[0, 2, vocab_size // 2] = torch.nan
    labels = torch.full((1, 4), vocab_size - 1)
    labels[0, 3] = IGNORED
    for transform in (PLAIN, LogitTransform(0.7, 1.5, 20.0), LogitTransform(1.0, 1.0, 1e4)):
        for entropy in (False, True):
            *result, grad = run(logits, labels, transform, entropy)
            rows = LogitRows(logits, labels, transform)
            expected = eager.token_logprob_forward(rows, entropy)
            tolerance = 1e-13 if dtype == torch.float64 else 3e-6
            for ours, other in zip(result, [x for x in expected if x is not None], strict=True):
                ours[0, 2], other[0, 2] = ours[0, 2] * torch.nan, other[0, 2] * torch.nan  # whose maximum is nobody's
                torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert result[0][0, 2].isnan()
            grads = torch.rand(labels.shape, dtype=result[0].dtype, generator=torch.Generator().manual_seed(1))
            other = torch.empty_like(grad)
            eager.token_logprob_backward(other, rows, expected.incoming(grads, grads * 0.3 if entropy else None))
            rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5 if dtype == torch.float32 else 1e-11)
            atol = 1e-7 if dtype == torch.float16 else rtol * 1e-3
            torch.testing.assert_close(grad, other, rtol=rtol, atol=atol, equal_nan=True)
            assert not grad[0, 3].any()
            masked = grad[0, 1, : vocab_size // 2]
            assert not masked.any(), "a masked entry of the vocabulary has no gradient, exactly"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_as_pytorch_rounds(dtype: torch.dtype, instruction_set: str) -> None:
    """With two logits, one of them the label's and far above, the other's gradient is -c * p: any number one likes."""
    c = torch.cat([torch.logspace(-9, 4.8, 3001), torch.tensor([65504.0, 65519.0, 65520.0, 1e6, 2.0**-24, 2.0**-25])])
    logits = torch.zeros(1, len(c), 2, dtype=dtype)
    labels = torch.zeros(1, len(c), dtype=torch.int64)
    grad = torch.empty_like(logits)
    zero = torch.zeros(1, len(c))
    native.token_logprob_backward(grad, LogitRows(logits, labels, PLAIN), Incoming(zero, zero, c[None]))  # p = 1
    assert torch.equal(grad[0, :, 1], (-c).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_at_a_quarter_million(dtype: torch.dtype, instruction_set: str) -> None:
    """logp within 1e-5 of fp64 at |logits| <= 50, also where all terms of the sum are alike and roundings add up."""
    vocab_size = 262_144
    logits = (torch.rand(1, 4, vocab_size) * 100 - 50).to(dtype)
    logits[0, 1] = 0.1
    logits[0, 2] = torch.randn(vocab_size).to(dtype)
    logits[0, 3] = torch.linspace(-50, 50, vocab_size).to(dtype)
    labels = torch.tensor([[0, 5, vocab_size - 1, 17]])
    logprobs = native.token_logprob_forward(LogitRows(logits, labels, PLAIN), False)[0]
    exact = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert (logprobs - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_is_not_seen(rows: int, dtype: torch.dtype, threads: None) -> None:
    """Bit for bit, whether rows are shared between threads or not; nor is the batch around a row."""
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(1, rows, 70_001, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 70_001, (1, rows))
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(run(logits, labels, PLAIN, True))
        coefficients = torch.ones(1, rows, dtype=results[0][0].dtype)
        grad = torch.empty_like(logits)
        logprobs = native.token_logprob_forward_backward(grad, LogitRows(logits, labels, PLAIN), coefficients)
        results[-1] += [logprobs, grad]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    alone = run(logits[:, -1:].clone(), labels[:, -1:], PLAIN, True)
    assert torch.equal(alone[0], results[0][0][:, -1:])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_coefficients(dtype: torch.dtype, rows: int, inplace: bool, threads: None) -> None:
    """Forward and gradient in one go are forward and backward."""
    torch.set_num_threads(2)
    logits = torch.randn(1, rows, 40_000, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 40_000, (1, rows))
    labels[0, rows // 2 :: 3] = IGNORED
    coefficients = torch.rand(1, rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    coefficients[0, 0] = 0
    statistics = native.token_logprob_forward(LogitRows(logits, labels, PLAIN), False)
    expected = torch.empty_like(logits)
    native.token_logprob_backward(expected, LogitRows(logits, labels, PLAIN), statistics.incoming(coefficients))
    grad = logits if inplace else torch.empty_like(logits)
    result = native.token_logprob_forward_backward(grad, LogitRows(logits, labels, PLAIN), coefficients)
    assert torch.equal(result, statistics.logprobs)
    assert torch.equal(grad, expected)


def test_memory() -> None:
    """Forward allocates O(N), backward in place nothing that grows with N; the whole loss the same."""
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(4, 64, 20_000)
    labels = torch.randint(0, 20_000, (4, 64))
    num_tokens = labels.numel()
    assert sum(n for n in allocations(lambda: run_forward(logits, labels)) if n > 0) <= 3 * 4 * num_tokens + 64
    statistics = run_forward(logits, labels)

    def backward() -> None:
        native.token_logprob_backward(
            logits, LogitRows(logits, labels, PLAIN), statistics.incoming(statistics.logprobs)
        )

    assert sum(n for n in allocations(backward) if n > 0) <= 64
    leaf = torch.randn(4, 64, 20_000, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    copy = leaf * 1

    def step() -> None:
        loss = conspo_loss(copy, labels, rewards, 2, inplace_backward=True, implementation="native")
        torch.autograd.grad(loss, copy)  # type: ignore[arg-type]

    assert max(allocations(step)) <= 16 * num_tokens


def run_forward(logits: Tensor, labels: Tensor) -> Statistics:
    return native.token_logprob_forward(LogitRows(logits, labels, PLAIN), False)


def test_auto_is_native_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    registry.forget_choices()
    with caplog.at_level(logging.INFO, logger="conspo_kernels"):
        token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    assert "on cpu: implementation='native'" in caplog.text


def test_an_extension_that_does_not_load_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not silently slower: a warning once, and an error for who asked for it."""
    monkeypatch.setattr(native, "OBSTACLE", "the native extension does not load (undefined symbol)")
    registry.forget_choices()
    with caplog.at_level(logging.WARNING, logger="conspo_kernels"):
        assert registry.choose("auto", torch.device("cpu")) == "torch"
    assert "undefined symbol" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="conspo_kernels"):
        token_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    assert caplog.records == []  # every op of the device
    with pytest.raises(ValueError, match="implementation='native' cannot run here: the native extension"):
        registry.choose("native", torch.device("cpu"))
    registry.forget_choices()


def test_wrong_instruction_set() -> None:
    with pytest.raises(ValueError, match="does not have the instruction set sse9"):
        native._C.set_instruction_set("sse9")


def setup(build: str | None, **environment: str) -> CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "CONSPO_BUILD"} | environment
    if build is not None:
        variables["CONSPO_BUILD"] = build
    return processes.run("setup.py", "--name", environment=variables)


def test_what_is_built() -> None:
    """CONSPO_BUILD that cannot be met fails; "auto" says why it builds nothing."""
    nowhere = {"PATH": "/nonexistent", "CXX": "no-such-compiler"}
    assert setup("none", **nowhere).returncode == 0
    automatic = setup(None, **nowhere)
    assert automatic.returncode == 0
    assert "the CPU extension is NOT built: no C++ compiler: no-such-compiler" in automatic.stderr
    explicit = setup("cpu", **nowhere)
    assert explicit.returncode != 0
    assert "CONSPO_BUILD=cpu: the CPU extension cannot be built: no C++ compiler" in explicit.stderr
    wrong = setup("gpu")
    assert wrong.returncode != 0
    assert "CONSPO_BUILD must be one of auto, cpu, none, got 'gpu'" in wrong.stderr


@pytest.mark.parametrize("name", ["CXX", "CONSPO_BUILD"])
@pytest.mark.parametrize("blank", ["", " "])
def test_a_variable_that_is_set_to_nothing_is_not_set(name: str, blank: str) -> None:
    result = setup(None, **{name: blank})
    assert result.returncode == 0, result.stderr
    assert "NOT built" not in result.stderr
    assert result.stdout.strip() == "conspo-kernels"


@pytest.mark.parametrize("words", [[], ["-O1"]], ids=["a name", "a name and a flag"])
def test_a_compiler_that_cxx_names_and_that_is_not_there(words: list[str]) -> None:
    """Whether another one is there or not: it is the named one that torch would run."""
    result = setup(None, CXX=" ".join(["no-such-compiler", *words]))
    assert result.returncode == 0
    assert "the CPU extension is NOT built: no C++ compiler: no-such-compiler, which CXX names" in result.stderr


def test_a_compiler_with_a_launcher_and_flags() -> None:
    result = setup(None, CXX="env c++ -O1")
    assert result.returncode == 0, result.stderr
    assert "NOT built" not in result.stderr


def compiler_without(header: str, folder: Path) -> str:
    """A C++ compiler that does not find a header, in the words of this machine's own."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\nsed 's|<{header}>|<no-such-folder/{header}>|' | exec c++ \"$@\"\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("header", "package"), [("Python.h", "python3-dev"), ("omp.h", "libomp-dev"), ("vector", r"in g\+\+")]
)
def test_a_compiler_without_headers_says_which_package_has_them(tmp_path: Path, header: str, package: str) -> None:
    """ "auto" builds nothing and says why; CONSPO_BUILD=cpu fails before it compiles anything."""
    compiler = compiler_without(header, tmp_path)
    automatic = setup(None, CXX=compiler)
    assert automatic.returncode == 0
    assert "the CPU extension is NOT built" in automatic.stderr
    explicit = setup("cpu", CXX=compiler)
    assert explicit.returncode != 0
    for result in (automatic, explicit):
        assert re.search(rf"{package}.*\({header}\)", result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_compiler_that_compiles_nothing_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'error: no licence' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = setup(None, CXX=str(compiler))
    assert result.returncode == 0
    assert "does not compile three lines: error: no licence" in result.stderr


def test_an_installation_without_the_kernels_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built without a compiler, and what `info` prints of it."""
    command = ("setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    environment = {**os.environ, "CONSPO_BUILD": "auto", "PATH": "/nonexistent", "CXX": "no-such-compiler"}
    processes.run(*command, environment=environment).check_returncode()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "conspo_kernels" / "backends" / "native.py"))
    monkeypatch.setattr(native, "BUILT", False)
    said = (
        "this installation has no native extension: no C++ compiler: no-such-compiler, which CXX names, is not on the "
    )
    assert native._load() == said + "path"


def test_sources_that_hide_an_installed_package_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python started inside of a clone."""
    sources, installed = tmp_path / "clone", tmp_path / "site-packages"
    for folder in (sources, installed):
        (folder / "conspo_kernels" / "backends").mkdir(parents=True)
    monkeypatch.setattr(native, "__file__", str(sources / "conspo_kernels" / "backends" / "native.py"))
    monkeypatch.setattr(native, "BUILT", False)
    monkeypatch.setattr(sys, "path", ["", str(sources)])
    assert (native._load() or "").endswith("the package is used as it lies, it was not installed")
    monkeypatch.setattr(sys, "path", ["", str(sources), str(installed)])
    hidden = f"Python takes the sources in {sources}, not the package installed in {installed}: start elsewhere"
    assert (native._load() or "").endswith(hidden)
