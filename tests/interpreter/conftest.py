"""The tests of this folder run where Triton interprets kernels: test_interpreter.py starts them."""

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["gluon.py"] if INTERPRETED else ["*.py"]


def patched_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's ``_patch_lang``, which has the language that a function sees interpreted, but until
    a kernel ends only once, not for each call of a function in it."""
    language = importlib.import_module("triton.language")
    inside: list[set[str]] = []  # what is patched while a kernel runs

    def patched(fn: Any) -> Any:
        seen = {x.__name__ for x in fn.__globals__.values() if x is language or x is language.core}
        if inside:
            if seen <= inside[0]:
                return None  # Triton asks a kernel's scope only to restore what was before
            inside[0].update(seen)
            return patch(fn)
        scope = patch(fn)
        restore = scope.restore
        inside.append(seen)

        def end() -> None:
            inside.clear()
            restore()

        scope.restore = end
        return scope

    return patched


def of_scalars(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's ``_get_np_dtype``, which makes a table of all dtypes for each answer: NumPy's dtype
    for one of Triton's, which for a block is that of its numbers."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return found


if INTERPRETED:  # two thirds of the time of these tests would go to what nobody looks at
    interpreter = importlib.import_module("triton.runtime.interpreter")
    # Sums of integers would be computed in int64, too, for a check that is made only with `debug`.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = of_scalars(interpreter._get_np_dtype)
    if hasattr(interpreter, "_LangPatchScope"):  # not before Triton 3.6
        interpreter._patch_lang = patched_once(interpreter._patch_lang)
