"""Compiling the GPU kernels of calls before the first one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any

import torch

from . import compiling
from ._keywords import check_call
from .errors import ArgumentError
from .explaining import checked
from .functional import ATTENTION, check_attention
from .inputs import Inputs
from .operators import Call


def compile_ahead(
    calls: Iterable[Mapping[str, Any]], device: torch.device | str | int | None = None
) -> int:
    """Compile the GPU kernels of calls, several at once, before the first of these calls.

    A service that does so before it answers requests, or a training run before its first step,
    waits once and not at every new kind of call. Threads compile the kernels and load them to the
    GPU. Triton keeps them on disk, where a later process finds them. Calls on a CPU have nothing to
    compile.

    Args:
        calls: for each call of :func:`natten.na1d`, :func:`natten.na2d`, :func:`natten.na3d`,
            :func:`natten.neighborhood_attention_generic` or, without a ``kernel_size``,
            :func:`natten.attention` a mapping of its arguments by name. Of tensors, shapes, strides
            and dtypes are read and no data, so that they may be on the device "meta", where they
            take no memory. If one of them requires a gradient, the kernels of gradients are
            compiled, too; with ``return_lse`` those in which the LSE has one. Under autocast,
            query, key and value have the dtype to which it casts.
        device: where the calls will be. None is the current GPU, or the CPU where there is no GPU.

    Returns:
        How many kernels the calls have. Calls may share some.

    Raises:
        ArgumentError: the device is another one, or a call raises it.
        Exception: the compiler's, of a kernel that it can not compile.

    Example:
        >>> import natten, torch
        >>> q = torch.empty(1, 56, 56, 2, 32, device="meta", requires_grad=True)
        >>> call = {"query": q, "key": q, "value": q, "kernel_size": 7}
        >>> natten.compile_ahead([call], device="cpu")
        0
    """
    where = _device_of(device)
    futures: list[Future[Any]] = []
    with torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext():
        for number, arguments in enumerate(calls):
            if not isinstance(arguments, Mapping):
                raise ArgumentError(
                    f"`calls` must hold mappings of arguments by name, got {type(arguments)} as "
                    f"number {number}."
                )
            call, inputs = _checked(arguments)
            futures += call.compile("attention", inputs, where)
            if any(x is not None and x.requires_grad for x in inputs):
                has_grad_lse = bool(arguments.get("return_lse"))
                futures += call.compile("gradient", inputs, where, has_grad_lse)
    kernels = set(futures)
    wait(kernels)
    compiling.load(where, [each.result() for each in kernels])
    return len(kernels)


def _checked(arguments: Mapping[str, Any]) -> tuple[Call, Inputs]:
    """The call of these arguments, and its tensors.

    Raises:
        ArgumentError: the call raises it, or has packed sequences.
    """
    if not arguments.keys() <= ATTENTION.parameters.keys():
        return checked("compile_ahead", (), arguments)
    options = check_call("compile_ahead", ATTENTION, (), arguments).arguments
    inputs, lengths, call = check_attention(**options)
    if lengths is not None:
        raise ArgumentError("`calls` must not have packed sequences, whose lengths are data.")
    return call, inputs


def _device_of(device: Any) -> torch.device:
    """The device of calls, a GPU with its number.

    Raises:
        ArgumentError: it is neither the CPU nor a GPU that PyTorch sees.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(("cuda" if gpus else "cpu") if device is None else device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type == "cuda" and gpus:
        index = torch.cuda.current_device() if found.index is None else found.index
        if index < gpus:
            return torch.device("cuda", index)
    if found.type == "cpu":
        return found
    raise ArgumentError(f"`device` must be the CPU or one of {gpus} GPUs here, got {device!r}.")
