"""Makes Triton's interpreter quicker, by which kernels are tested without a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any


def patch_once_per_launch() -> None:
    """Spares the interpreter a search through `triton.language` in each call of a device function.

    A launch replaces the functions of `triton.language` by interpreted ones and puts them back at
    its end. Every call of a `@triton.jit` function inside it does the first half again, mostly
    finds nothing left to replace, and takes a third of the interpreter's time for it. Here only the
    first call does so of functions that see the same modules of the language.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = self.fn.__globals__.values()
        modules = [m for m in (language, language.core) if any(value is m for value in seen)]
        key = frozenset(module.__name__ for module in modules)
        if key not in patched:
            patch(self.fn)
            patched.add(key)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
