"""Kernels in Triton's interpreter, where there is no GPU."""

import os
from importlib.util import find_spec
from typing import Any


def interpret() -> None:
    """Make Triton interpret kernels; to be called before triton is imported.

    At each call from a kernel to another function the interpreter replaces all of `triton.language`, which
    takes longer than what is called. The launch has replaced it already, but for `triton.language.core`,
    which Triton's own functions name and which stays replaced: once for each module does the same.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    if not find_spec("triton"):  # it has wheels for Linux only
        return
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function.fn.__module__ not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(function.fn.__module__)
        try:
            return function.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
