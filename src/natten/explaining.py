"""Which backend runs a call, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import backends, operators
from ._checks import autocast_tensors
from ._keywords import check_call
from .functional import ATTENTION, GENERIC, WINDOW, check_attention, check_call_of
from .inputs import Inputs
from .neighborhood import Dimension
from .operators import Call


def explain(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    kernel_size: Dimension | None = None,
    *args: Any,
    **kwargs: Any,
) -> str:
    """Say which backend a call runs, and why the others do not.

    The backends of forward and backward are chosen separately. If they differ, each is named. A
    backend without circular axes runs them with keys and values that are padded around. If the call
    raises an error, this raises it, too.

    Args:
        query, key, value, kernel_size, args, kwargs: the arguments of a fused operator. Without a
            ``kernel_size`` they are those of :func:`natten.attention`, and all but the tensors are
            given by keyword. ``key`` and ``value`` may be left out if they are like ``query``. If
            packed sequences run one after another, the answer is about the longest.

    Returns:
        One line per backend.

    Raises:
        ArgumentError: the call raises it.

    Example:
        >>> import torch
        >>> print(explain(torch.zeros(1, 16, 1, 8), kernel_size=3))
        hopper: runs on GPUs, not on cpu
        sdpa: runs
        triton: runs on GPUs, not on cpu
        tiled: can run, comes later in the order of preference
        reference: can run, comes later in the order of preference
    """
    key = query if key is None else key
    value = key if value is None else value
    if kernel_size is None and not args:
        return _explain_attention(query, key, value, kwargs)
    return _lines_of(*checked("explain", (query, key, value, kernel_size, *args), kwargs))


def checked(name: str, given: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, Inputs]:
    """The call and the tensors of a fused operator's arguments, for a function called ``name``.

    Raises:
        ArgumentError: the call raises it.
    """
    options = dict(check_call(name, GENERIC, given, kwargs).arguments)
    names = "query", "key", "value", "additional_keys", "additional_values"
    q, k, v, *additional = autocast_tensors(*(options.pop(name, None) for name in names))
    masks = (options.pop(name, None) for name in ("key_mask", "additional_mask"))
    inputs = Inputs(q, k, v, options.pop("rpb", None), *additional, *masks)
    window = tuple(options.pop(name, GENERIC.parameters[name].default) for name in WINDOW)
    return check_call_of(inputs, window, **options), inputs


def _explain_attention(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> str:
    options = check_call("explain", ATTENTION, (query, key, value), kwargs).arguments
    inputs, lengths, call = check_attention(**options)
    if lengths is not None:
        ours, _ = lengths.read(inputs.query, inputs.key)
        rule, scale, name = call.rule, call.scale, call.choice.backend
        if operators.backend_for(*inputs[:3], rule, scale, name) is not None:
            problem = operators.problem_of(inputs.query, inputs.value, rule, scale)
            return _lines(name, problem, problem)
        inputs = inputs._replace(query=inputs.query[:, : max(ours, default=0)])
    return _lines_of(call, inputs)


def _lines_of(call: Call, inputs: Inputs) -> str:
    inputs = inputs.without_idle_masks()
    forward, gradient = (
        backends.Problem.of(operation, inputs, call.rule, call.scale)
        for operation in ("attention", "gradient")
    )
    return _lines(call.choice.backend, forward, gradient)


def _lines(name: str, problem: backends.Problem, gradient: backends.Problem) -> str:
    """What every backend has to do with a problem and its gradient."""
    forward, backward = backends.choose(name, problem), backends.choose(name, gradient)
    lines = []
    for candidate in backends.BACKENDS:
        reason = candidate.unsupported(problem)
        declined = candidate.unsupported if candidate.name == name else candidate.declined
        if candidate is forward and candidate is backward:
            what = f"runs{_how(candidate, problem)}"
        elif candidate is forward:
            what = f"runs forward{_how(candidate, problem)}, but {declined(gradient)}"
        elif candidate is backward:
            what = f"runs backward{_how(candidate, gradient)}"
        elif reason is not None:
            what = reason
        elif name:
            what = f"can run{_how(candidate, problem)}, `backend` asks for {name}"
        else:
            later = declined(problem) or "comes later in the order of preference"
            what = f"can run{_how(candidate, problem)}, {later}"
        lines.append(f"{candidate.name}: {what}")
    return "\n".join(lines)


def _how(backend: backends.Backend, problem: backends.Problem) -> str:
    """How a backend runs circular axes that it does not have."""
    return " with keys padded around" if backend.pads(problem) else ""
