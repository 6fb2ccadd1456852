"""Public functions of one rank, such as ``na2d``, made from a function of any rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from ._keywords import check_call, signature_of
from ._tracing import unscriptable
from .errors import ArgumentError

Function = TypeVar("Function", bound=Callable[..., Any])


def of_rank(rank: int, name: str, generic: Function, doc: str, nested: bool = False) -> Function:
    """``generic`` for one rank, with its signature and overloads.

    Args:
        rank: axes of tokens.
        name: the name of the new function.
        generic: a function whose first arguments are tensors.
        doc: the docstring, in which the entries of ``SHAPES`` are filled in, and for
            ``{arguments}`` the sections of ``generic`` from ``Args:`` to ``Raises:``.
        nested: whether the function takes nested tensors, too.
    """
    signature = signature_of(generic)
    first = next(iter(signature.parameters))

    def function(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, Tensor) and (nested or not x.is_nested):
            got = x.dim() - x.is_nested  # the rank of each item
            if got != rank + 3:
                raise ArgumentError(
                    f"Expected {rank + 3}-D tensors: `{first}` of {name} has {rank} axes of "
                    f"tokens, got {f'{got}-D items' if x.is_nested else tuple(x.shape)}."
                )
        try:
            return generic(*args, **kwargs)
        except TypeError:
            check_call(name, signature, args, kwargs)
            raise

    function.__name__ = function.__qualname__ = name
    function.__module__ = generic.__module__
    arguments = _sections(generic).replace("*space", SHAPES[rank]["space"])
    function.__doc__ = inspect.cleandoc(doc).format(
        rank=rank, name=name, arguments=arguments, **SHAPES[rank]
    )
    function.__signature__ = signature  # type: ignore[attr-defined]
    return cast(Function, unscriptable(function))


def _sections(function: Callable[..., Any]) -> str:
    """The sections of a docstring from ``Args:`` up to ``Example:``."""
    _, _, rest = (inspect.getdoc(function) or "").partition("Args:\n")
    return "Args:\n" + rest.partition("\n\nExample:")[0]


SHAPES = {
    1: {"space": "length", "sizes": "32", "kernel": "7"},
    2: {"space": "height, width", "sizes": "8, 8", "kernel": "(3, 5)"},
    3: {"space": "depth, height, width", "sizes": "4, 6, 8", "kernel": "(3, 3, 5)"},
}
