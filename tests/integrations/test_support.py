"""python -m conspo_kernels info --trainer: what of the installed packages is supported, and what not, and why."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from conspo_kernels.__main__ import main
from conspo_kernels.integrations import support

NEEDS_PYTHON = {"trl": (3, 11)}
installs = pytest.mark.leave_out(where=lambda parameters: sys.version_info < NEEDS_PYTHON.get(parameters["name"], (3,)))


@installs
@pytest.mark.parametrize("name", ["trl", "transformers"])
def test_what_is_installed_here_is_supported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip(name)
    assert main(["info", "--trainer", name]) == 0
    text = capsys.readouterr().out
    assert f"{name:18} {package.__version__}" in text
    assert f"{'supported':18} yes" in text
    assert text.count("what runs") == len(support.FRAMEWORKS[name].paths)
    assert "missing" not in text


@installs
@pytest.mark.parametrize("name", ["trl"])
def test_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(name)
    assert main(["info", "--trainer", name, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["trainer"]
    assert (described["supported"], described["reason"], described["missing"]) == (True, None, {})
    assert described["versions"].keys() > {"trl", "transformers", "peft"}


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    assert main(["info", "--trainer", "verl"]) == 0
    text = capsys.readouterr().out
    assert "no: verl >= 0.9 is needed and cannot be imported" in text
    assert "pip install 'conspo-kernels[verl]'" in text
    assert "what runs" not in text


def test_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="1.15.2"))
    described = support.support("trl")
    assert not described["supported"]
    assert "trl >= 1.16 is needed, got 1.15.2" in described["reason"]


def test_a_version_that_lacks_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one, which has renamed what the integration replaces, says so by its name."""
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="0.10.0", __path__=[]))
    described = support.support("verl")
    assert not described["supported"]
    assert set(described["missing"]) == set(support.FRAMEWORKS["verl"].parts)
    lines = "\n".join(support.lines(described))
    assert "no: this version lacks what the integration calls" in lines
    assert "verl.trainer.ppo.core_algos:register_adv_est: " in lines


def test_another_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--trainer", "liger"])
    assert "invalid choice: 'liger'" in capsys.readouterr().err
