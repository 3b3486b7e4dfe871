"""Makes Triton's interpreter quicker, by which kernels are tested without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any


def quicken() -> None:
    """Spares the interpreter what takes most of its time; see the functions that it calls."""
    if importlib.util.find_spec("triton") is not None:
        patch_once_per_launch()
        leave_out_overflow()
        share_shapes()


def patch_once_per_launch() -> None:
    """Spares the interpreter a search through `triton.language` in each call of a device function.

    A launch replaces the functions of `triton.language` by interpreted ones and puts them back at
    its end. Every call of a `@triton.jit` function inside it does the first half again, mostly
    finds nothing left to replace, and takes a third of the interpreter's time for it. Here only the
    first call does so of functions that see the same modules of the language.
    """
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


def leave_out_overflow() -> None:
    """Leaves out ten operations beside each addition, which look for overflow.

    What they find is asserted in the interpreter's debug mode alone, in which it is not.
    """
    from triton.runtime.interpreter import interpreter_builder

    if not interpreter_builder.options.debug:
        sparing = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        interpreter_builder.options = sparing


def share_shapes() -> None:
    """Makes the shape of a tensor, which is a tuple of constants of the language, once per shape.

    Every operation makes a tensor, of which the shape takes nearly all of the time.
    """
    from triton.language import tensor

    made: dict[tuple[int, ...], dict[str, Any]] = {}
    plain = tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        found = made.get(shape)
        if found is None:
            plain(self, handle, type)
            made[shape] = dict(self.__dict__)
        else:
            self.__dict__.update(found)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    tensor.__init__ = init
