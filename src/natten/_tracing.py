"""Tracers that know our operators under other names, or not at all.

torch.compile, torch.export, make_fx and torch.jit.trace know the operators. The others get plain
PyTorch operators, one node, or an error that says what to do. They never get a wrong graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch

from ._torch import is_transformed
from .errors import UnsupportedError


def is_traced() -> bool:
    """Whether ``torch.jit``'s tracer records calls; transforms of ``torch.func`` act before it."""
    return torch.jit.is_tracing() and not is_transformed()


def is_for_onnx() -> bool:
    """Whether ``torch.onnx.export`` records calls; it knows PyTorch's own operators only.

    If the exporter captures by Dynamo, nothing tells it from others. Such a program needs
    ``natten.export.decompositions`` afterwards.

    Raises:
        UnsupportedError: the exporter records by ``torch.jit.trace``.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    onnx = sys.modules.get("torch.onnx")  # asking torch itself would import it
    if onnx is None or not onnx.is_in_onnx_export():
        return False
    if torch.jit.is_tracing():
        raise UnsupportedError(
            "torch.onnx.export(dynamo=False) does not know natten's operators. Pass dynamo=True, "
            "or export a program that knows none of them: torch.onnx.export(torch.export.export("
            "module, inputs).run_decompositions(natten.export.decompositions()))."
        )
    return True


def call_as_node(layer: Any, x: torch.fx.Proxy, hints: dict[str, Any]) -> Any:
    """A call of ``layer`` as one node of a symbolic trace, like calls of layers of ``torch.nn``.

    Raises:
        UnsupportedError: the layer itself is traced.
    """
    tracer: Any = x.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise UnsupportedError(
            "torch.fx.symbolic_trace can not look into natten's layers, which ask for shapes. "
            "Trace a module that holds the layer, which becomes one node: "
            "torch.nn.Sequential(layer), say; or use torch.export.export."
        )
    return tracer.create_proxy("call_module", path, (x,), hints)


Function = TypeVar("Function", bound=Callable[..., Any])


def unscriptable(function: Function) -> Function:
    """Let ``torch.jit.script`` raise an error that says what to do, as it can not compile us."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function


def refuse_script() -> NoReturn:
    """Raise the error for ``torch.jit.script``."""
    raise UnsupportedError(
        "torch.jit.script can not compile natten's functions and layers. torch.jit.trace records "
        "them; what it returns can be saved, and called by scripted code."
    )


def refuse_gradients() -> None:
    """Raise if ``torch.jit.trace`` would record tensors of the forward pass as constants."""
    if torch.jit.is_tracing():
        raise UnsupportedError(
            "torch.jit.trace can not record gradients; record them with "
            "torch.fx.experimental.proxy_tensor.make_fx or torch.compile, or trace the forward "
            "pass only and differentiate what torch.jit.trace returns."
        )


# Our operators' names, and the names of the autograd.Functions of NATTEN 0.15 to 0.17.
_FUNCTIONS = {
    "qk": "NeighborhoodAttention{rank}DQKAutogradFunction",
    "av": "NeighborhoodAttention{rank}DAVAutogradFunction",
    "attention": "FusedNeighborhoodAttention{rank}D",
}


def record(operator: Any, rank: int, *args: Any) -> Any:
    """Call ``operator``. For fvcore, call a Function around it that has the old name.

    User code registers handlers for those names with fvcore. For all others a traced graph holds
    the operator, because a graph that holds a Function can not be saved.
    """
    name = function_name(operator.__name__, rank)
    if name is None or not (torch.jit.is_tracing() and _fvcore_counts()):
        return operator(*args)
    return _function(operator, name).apply(*args)


def function_name(operator: str, rank: int) -> str | None:
    """The old name of an operator's Function; None if there was none, as for rank 0."""
    name = _FUNCTIONS.get(operator)
    return None if name is None or rank == 0 else name.format(rank=rank)


@cache
def _function(operator: Callable[..., Any], name: str) -> Any:
    return type(name, (torch.autograd.Function,), {"forward": lambda ctx, *args: operator(*args)})


def _fvcore_counts() -> bool:
    """Whether fvcore is among the callers, because its tracing looks like any other."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("fvcore."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
