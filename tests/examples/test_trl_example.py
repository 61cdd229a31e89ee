"""examples/trl_conspo.py, for a few steps: it runs to its end and leaves what it promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
SHORT = "--steps 2 --warmup-steps 50 --warmup-accuracy 0.02 --held-out 16 --eval-samples 1 --threads 1"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for a script of that folder; its modules are forgotten afterwards, because their names are common ones."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(EXAMPLES):
            del sys.modules[name]


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trl_conspo

    summary = trl_conspo.main([*SHORT.split(), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert summary["steps"] == 2
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert f"{summary['accuracy_after']:.1%} after" in capsys.readouterr().out


def test_the_tokenizer_reads_as_the_characters_do() -> None:
    import trl_conspo
    from demo.policy import CharTokenizer

    characters = CharTokenizer()
    tokenizer = trl_conspo.fast_tokenizer(characters)
    assert tokenizer("spell9>")["input_ids"] == characters.encode_prompt("spell9")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (characters.pad_id, characters.eos_id)
