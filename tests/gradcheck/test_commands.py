"""python -m conspo_kernels info and gradcheck: output, exit codes, and that a wrong gradient is found."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

import conspo_kernels
from conspo_kernels import __version__
from conspo_kernels.__main__ import main
from conspo_kernels.backends import native
from conspo_kernels.backends.registry import backend_for
from conspo_kernels.gradcheck import cases as gradcheck_cases
from conspo_kernels.values import LogitRows

FEW = ["--op", "conspo_loss_from_scores", "--dtype", "fp64", "fp32"]
HAS_CUDA = torch.cuda.is_available()


def loads(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def unset() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton compiles or is not asked for."""
    return processes.run("-m", "conspo_kernels", *arguments, environment=unset())


def run_anew(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In one that has to find out for itself that Triton is to be interpreted."""
    return subprocess.run(
        [sys.executable, "-m", "conspo_kernels", *arguments],
        cwd=processes.REPOSITORY, env=unset(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, implementation: str, name: str, wrong: Any) -> None:
    """Replace a function of a backend by wrong(the function)."""
    backend = backend_for(implementation, torch.device("cpu"))
    monkeypatch.setattr(backend, name, wrong(getattr(backend, name)))


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return loads(capsys.readouterr().out)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (__version__, torch.__version__, "Triton interprets", "token_logprob", "native kernels"):
        assert word in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = report(capsys)
    assert info["versions"].keys() == {"conspo_kernels", "python", "torch", "triton", "numpy", "cuda", "hip"}
    assert info["versions"]["conspo_kernels"] == __version__
    assert info["platform"]
    assert info["native_instruction_sets"][-1:] == ([] if native.OBSTACLE else [info["native_instruction_set"]])
    assert info["cpu_threads"] == torch.get_num_threads()
    assert len(info["cuda_devices"]) == torch.cuda.device_count()
    for gpu in info["cuda_devices"]:
        assert gpu.keys() == {"name", "capability", "memory_gib"}
    rows = {(row["op"], row["device"]): row for row in info["implementations"]}
    devices = ["cpu", "cuda"] if HAS_CUDA else ["cpu"]
    ops = ("token_logprob", "sequence_score", "infonce", "linear_logprob")
    ops = (*ops, "token_logprob_forward_backward", "linear_logprob_forward_backward")
    assert rows.keys() == {(op, device) for op in ops for device in devices}
    for (_op, device), row in rows.items():
        on_cpu = "torch" if native.OBSTACLE else "native"
        assert row["auto"] == ("triton" if device == "cuda" else on_cpu)
        assert "torch" in row["runs"]
        assert ("native" in row["runs"]) == (device == "cpu" and native.OBSTACLE is None)
        assert ("triton" in row["runs"]) == (device == "cuda" or info["triton_interprets"])


def test_info_in_a_process() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    info = loads(done.stdout)
    assert info["triton_interprets"] is False  # only asked about, not switched on
    assert "TRITON_INTERPRET=1" in info["implementations"][0]["others"]["triton"]


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OBSTACLE", "this installation has no native extension")


def test_gradcheck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_native(monkeypatch)
    assert main(["gradcheck", *FEW]) == 0
    text = capsys.readouterr().out
    assert "not run: native: this installation has no native extension" in text
    assert ("Triton runs under its interpreter" in text) == (not HAS_CUDA)
    table = [line for line in text.splitlines() if line.startswith("conspo_loss_from_scores ")]
    assert len(table) == 3 * 2 * 2
    assert all(line.endswith(" ok") for line in table)
    assert len({len(line) for line in table}) == 1
    assert "12 checks, 0 failed" in text


def test_gradcheck_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", *FEW, "--json"]) == 0
    result = report(capsys)
    assert result.keys() == {
        "ok", "checks", "failed", "device", "triton_interpreted", "compiled", "not_run", "seconds", "rows",
    }  # fmt: skip
    assert (result["ok"], result["checks"], result["failed"]) == (True, len(result["rows"]), 0)
    assert result["triton_interpreted"] == (not HAS_CUDA)
    runs = {"torch", "triton"} if native.OBSTACLE or HAS_CUDA else {"torch", "triton", "native"}
    assert {row["implementation"] for row in result["rows"]} == runs
    for row in result["rows"]:
        assert row["ok"] is True
        assert row["value_error"] <= row["value_tolerance"]
        assert row["gradient_error"] <= row["gradient_tolerance"]
        assert row["autograd_gradcheck"] is (True if row["dtype"] == "fp64" else None)


def test_gradcheck_in_a_process() -> None:
    done = run_anew("gradcheck", "--op", "infonce", "--dtype", "fp32", "--implementation", "torch", "triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 checks, 0 failed" in done.stdout
    assert ("Triton runs under its interpreter" in done.stdout) == (not HAS_CUDA)
    assert run("gradcheck", "--dtype", "int8").returncode == 2


def test_gradcheck_of_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ("--implementation", "triton", "--dtype", "fp32", "bf16", "--op", "sequence_score", "infonce")
    done = run("gradcheck", "--compiled", "sm_90", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton compiles for sm_90, and the PTX is executed on the CPU: no GPU and no ptxas" in done.stdout
    assert "interpreter" not in done.stdout
    assert " 0 failed" in done.stdout


def test_compiled_needs_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ptx_executor", None)  # as where it cannot be imported
    with pytest.raises(SystemExit, match="2"):
        main(["gradcheck", "--compiled", "sm_90"])
    assert "--compiled needs a checkout" in capsys.readouterr().err


def test_every_public_function_has_cases() -> None:
    functions = {name for name in conspo_kernels.__all__ if inspect.isfunction(getattr(conspo_kernels, name))}
    assert set(gradcheck_cases.GRADED) == functions - {"trust_region"}  # which has no logits and no graph
    assert {case.op for case in gradcheck_cases.CASES} == set(gradcheck_cases.GRADED)


def test_every_function_in_every_dtype(implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Triton in one dtype only: the interpreter takes its time, and the tests of the public functions run the rest."""
    dtypes = ["fp64", "fp32", "bf16", "fp16"] if implementation != "triton" or HAS_CUDA else ["bf16"]
    assert main(["gradcheck", "--implementation", implementation, "--json", "--dtype", *dtypes]) == 0
    result = report(capsys)
    assert {row["op"] for row in result["rows"]} == set(gradcheck_cases.GRADED)
    assert result["checks"] == len(gradcheck_cases.CASES) * len(dtypes)


@pytest.mark.parametrize("shape", ["wide", "model", "long"])
def test_other_shapes(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    ops = ["sequence_scores"] if shape == "long" else ["token_logprobs", "conspo_loss"]
    assert main(["gradcheck", "--shape", shape, "--dtype", "fp32", "--implementation", "torch", "--op", *ops]) == 0
    assert f" {shape} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["benchmark"], "invalid choice"),
        (["gradcheck", "--dtype", "int8"], "invalid choice"),
        (["gradcheck", "--op", "softmax"], "invalid choice"),
        (["gradcheck", "--shape", "huge"], "invalid choice"),
        (["gradcheck", "--implementation", "cuda"], "invalid choice"),
        (["gradcheck", "--implementation", "native"], "native does not run on .*"),
        (["gradcheck", "--device", "cuda:99"], "there is no cuda:99 here"),
        (["gradcheck", "--compiled", "sm_70"], "invalid choice"),
        (["gradcheck", "--compiled", "sm_90", "--implementation", "torch"], "is for the implementation triton"),
        (["gradcheck", "--device", "meta"], "there is no meta here"),
        (["gradcheck", "--device", "toaster"], "not a device: 'toaster'"),
        (["info", "--dtype", "fp32"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_native(monkeypatch)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    capture = capsys.readouterr()
    assert not capture.out
    assert re.search(message, capture.err), capture.err


def without_temperature(backward: Any) -> Any:
    """Forgets the 1/T_s of the chain rule, and so also the T_s of the probabilities."""

    def planted(grad_logits: Tensor, rows: LogitRows, *others: Any) -> None:
        backward(grad_logits, rows._replace(transform=rows.transform._replace(temperature=1.0)), *others)

    return planted


def scaled(factor: float) -> Any:
    """The gradient in the first argument, off by a factor."""

    def wrong(backward: Any) -> Any:
        def planted(grad_logits: Tensor, *arguments: Any) -> None:
            backward(grad_logits, *arguments)
            grad_logits *= factor

        return planted

    return wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_missing_temperature_is_found(
    dtype: str, implementation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, implementation, "token_logprob_backward", without_temperature)
    command = ["gradcheck", "--op", "token_logprobs", "--dtype", dtype, "--json", "--implementation"]
    assert main([*command, implementation]) == 1
    result = report(capsys)
    assert result["ok"] is False
    wrong = {row["case"] for row in result["rows"] if not row["ok"]}
    assert wrong == {
        case.name
        for case in gradcheck_cases.CASES
        if case.op == "token_logprobs" and case.options.get("temperature", 1.0) != 1.0
    }


@pytest.mark.parametrize(("dtype", "factor"), [("fp64", 1 + 1e-9), ("fp32", 1 + 1e-4), ("fp16", 1.05)])
def test_a_gradient_off_by_little_is_found(
    dtype: str, factor: float, implementation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, implementation, "token_logprob_backward", scaled(factor))
    command = ["gradcheck", "--op", "token_logprobs", "--dtype", dtype, "--implementation"]
    assert main([*command, implementation]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_nan_and_errors_are_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gradcheck", "--op", "conspo_scores", "sequence_scores", "--dtype", "fp32", "--json"]
    with monkeypatch.context() as context:
        plant(context, "torch", "token_logprob_forward", lambda forward: lambda *a: (forward(*a)[0] / 0, *[None] * 3))
        assert main([*command, "--implementation", "torch"]) == 1
        rows = [row for row in report(capsys)["rows"] if row["op"] == "conspo_scores"]
        assert all(not row["ok"] and row["note"] for row in rows)
    plant(monkeypatch, "torch", "sequence_score_backward", lambda backward: lambda *a: backward(*a) / 0)
    assert main([*command, "--implementation", "torch"]) == 1
    rows = [row for row in report(capsys)["rows"] if row["op"] == "sequence_scores"]
    assert {row["note"] for row in rows} == {"gradient error: NaN or infinity in the wrong place"}
    assert all(row["gradient_error"] is None for row in rows)


def test_wrong_weights_are_found(
    implementation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(forward: Any) -> Any:
        def planted(*arguments: Any) -> Any:
            loss, weights = forward(*arguments)
            return loss, weights * 1.01

        return planted

    plant(monkeypatch, implementation, "infonce", wrong)
    assert main(["gradcheck", *FEW, "--implementation", implementation]) == 1
    assert "torch.autograd.gradcheck: " in capsys.readouterr().out
