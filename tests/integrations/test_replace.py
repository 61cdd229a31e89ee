"""Functions of another package are replaced under every name that a loaded module has for them, and come back."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from conspo_kernels.integrations.replace import Replacement


def original() -> str:
    return "original"


def new() -> str:
    return "new"


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: object) -> ModuleType:
    loaded = ModuleType(name)
    vars(loaded).update(names)
    monkeypatch.setitem(sys.modules, name, loaded)
    return loaded


def test_every_name_in_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    function, replaced = (lambda: "original"), (lambda: "new")
    home = module(monkeypatch, "framework", compute=function, other=original)
    user = module(monkeypatch, "user", own_name_of_it=function)
    replacement = Replacement([(function, replaced)])
    assert home.compute is user.own_name_of_it is replaced
    assert home.other is original
    later = module(monkeypatch, "later", compute=home.compute)
    replacement.undo()
    replacement.undo()
    assert home.compute is user.own_name_of_it is later.compute is function


def test_within_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    below = module(monkeypatch, "framework.below", f=original, g=new)
    outside = module(monkeypatch, "framework_of_another", f=original)
    fresh = [lambda: "f", lambda: "g"]
    with Replacement(zip((original, new), fresh, strict=True), within="framework"):
        assert [below.f, below.g, outside.f] == [*fresh, original]
    assert (below.f, below.g) == (original, new)
