"""The three functions, one per rank, that a function of any rank is to users."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from natten.errors import ArgumentError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def of_rank(
    rank: int, name: str, generic: Callable[Parameters, Result], doc: str
) -> Callable[Parameters, Result]:
    """``generic`` for one rank, with its signature."""

    def function(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        query = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(query, Tensor) and not query.is_nested and query.dim() != rank + 3:
            raise ArgumentError(
                f"Expected {rank + 3}-D tensors: the first argument of {name} has {rank} axes of "
                f"tokens, got shape {tuple(query.shape)}."
            )
        return generic(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__module__ = generic.__module__
    function.__doc__ = inspect.cleandoc(doc.format(rank=rank, name=name, **SHAPES[rank]))
    function.__signature__ = inspect.signature(generic)  # type: ignore[attr-defined]
    return function


SHAPES = {
    1: {"space": "length", "sizes": "32", "kernel": "7"},
    2: {"space": "height, width", "sizes": "8, 8", "kernel": "(3, 5)"},
    3: {"space": "depth, height, width", "sizes": "4, 6, 8", "kernel": "(3, 3, 5)"},
}
