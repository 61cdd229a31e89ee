"""Makes Triton's interpreter faster: it replaces a GPU in the tests and in the tiny suite."""

from __future__ import annotations

from types import FunctionType


def hasten() -> None:
    """Triton's interpreter looks through triton.language at every call of a device function: 3/4 of its time.

    Where what it would patch is patched already, there is nothing to look for.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn: FunctionType) -> object:
        modules = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        if modules and not any(tl.core.is_builtin(module.arange) for module in modules):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_once
