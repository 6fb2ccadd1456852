"""The three functions, one per rank, that a function of any rank is to users."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from natten._keywords import check_call, signature_of
from natten.errors import ArgumentError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def of_rank(
    rank: int, name: str, generic: Callable[Parameters, Result], doc: str, nested: bool = False
) -> Callable[Parameters, Result]:
    """``generic`` for one rank, with its signature; ``nested``: it takes nested tensors, too."""
    signature = signature_of(generic)
    first = next(iter(signature.parameters))

    def function(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        x = args[0] if args else kwargs.get(first)
        if isinstance(x, Tensor) and (nested or not x.is_nested):
            got = x.dim() - x.is_nested  # of each item
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
    function.__doc__ = inspect.cleandoc(doc.format(rank=rank, name=name, **SHAPES[rank]))
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


SHAPES = {
    1: {"space": "length", "sizes": "32", "kernel": "7"},
    2: {"space": "height, width", "sizes": "8, 8", "kernel": "(3, 5)"},
    3: {"space": "depth, height, width", "sizes": "4, 6, 8", "kernel": "(3, 3, 5)"},
}
