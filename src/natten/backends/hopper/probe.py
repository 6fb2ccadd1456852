"""Whether the kernels are right with a release of Triton that nobody checked them with.

A new release may compile them wrongly, or not at all. So small problems are computed and compared
in another process, once for each release and kind of GPU. What was found is kept beside tuned
tiles; as long as nothing is known, the backend does not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...inputs import Gradients, Inputs
from ...neighborhood import Dense, Neighborhood, Rule, outer, window_mask
from ..interface import Backend

_RIGHT = "right"
_SECONDS = 600
_started: dict[str, Any] = {}  # processes, which Python would complain of if nobody held them


def _key(version: str) -> str:
    return f"hopper with Triton {version}"


def verdict(version: str, device: torch.device) -> str | None:
    """None if the kernels are right with a release of Triton, otherwise why they do not run."""
    found = tuning.lookup(_key(version))
    if found == _RIGHT:
        return None
    if found is not None:
        return f"does not work with Triton {version}: {found}"
    if version not in _started and not torch.cuda.is_current_stream_capturing():
        _started[version] = _start(version, device)
    return f"is being tried with Triton {version}, which it does not know; it may run the next time"


def _start(version: str, device: torch.device) -> Any:
    index = torch.cuda.current_device() if device.index is None else device.index
    return subprocess.Popen(_command(f"keep({version!r}, {index})"), **_quiet())


def _command(call: str) -> list[str]:
    """A call of a function of this file in another process."""
    return [sys.executable, "-c", f"from {__package__} import Hopper, probe; probe.{call}"]


def _quiet() -> dict[str, Any]:
    paths = os.pathsep.join(filter(None, sys.path))
    nothing = subprocess.DEVNULL
    environment = {**os.environ, "PYTHONPATH": paths}
    return {"env": environment, "stdin": nothing, "stdout": nothing, "stderr": nothing}


# --- the other process, and one below it, which may crash ---------------------------------------


def keep(version: str, index: int) -> None:
    """Let a process try the kernels on a GPU, and write down what came of it."""
    options = _quiet() | {"stderr": subprocess.PIPE, "text": True, "timeout": _SECONDS}
    try:
        done = subprocess.run(_command(f"attempt(Hopper(), {index})"), **options)
    except subprocess.TimeoutExpired:
        found = f"nothing after {_SECONDS} seconds"
    else:
        errors = re.findall(r"^\w[\w.]*: .*", done.stderr, re.MULTILINE)
        failed = [f"exit code {done.returncode}", *errors][-1]
        found = failed if done.returncode else _RIGHT
    tuning.remember(_key(version), found)


def attempt(backend: Backend, index: int) -> None:
    """Raise an error unless the kernels are right on a GPU."""
    gpu = torch.device("cuda", index)
    with torch.cuda.device(gpu):
        compare(backend, gpu, torch.bfloat16)


def compare(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ArithmeticError unless small problems have the right output, LSE and gradients.

    The backend has circular axes.
    """
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(200,), (24, 40), (18, 8, 10)]
    problems: list[tuple[tuple[int, ...], Rule]] = []
    for space in shapes:
        rank = len(space)
        for causal, boundary in ((False, "shift"), (True, "shift"), (False, "circular")):
            if rank == 3 and boundary == "circular":  # too short for its windows
                continue
            window, dilation = (9, 7, 5)[-rank:], (2, 1, 2)[-rank:]
            problems.append(
                (space, Neighborhood.create(rank, window, 1, dilation, causal, boundary))
            )
    problems += [((200,), Dense(causal)) for causal in (False, True)]
    of_masks = [problems[0], ((200,), Dense())]
    every = [(*each, False) for each in problems] + [(*each, True) for each in of_masks]
    for space, rule, is_masked in every:
        query, key, value = (
            torch.randn(1, *space, heads, 64, device=device, dtype=dtype) for heads in (2, 1, 1)
        )
        inputs = read = Inputs(query, key, value, _bias(rule, device, dtype))
        if is_masked:
            mask = torch.arange(200, device=device)[None] % 3 > 0
            inputs = inputs._replace(key_mask=mask)
            key, value = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (key, value))
            read = inputs._replace(key=key, value=value)
        grads = torch.randn_like(query), torch.randn(query.shape[:-1], device=device)
        wanted = _dense(inputs, rule, grads)
        for _ in range(3):  # the first launches compile and compare
            out, lse = backend.forward(read, rule, 0.125)
            found = backend.backward(*grads, read, out, lse, rule, 0.125)
            _check((out, lse, *found[: len(wanted) - 2]), wanted, f"{space}, {rule}")


def _dense(inputs: Inputs, rule: Rule, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Output, LSE and gradients in float64, over all pairs of tokens."""
    leaves = [x.double().requires_grad_() for x in inputs[:4] if x is not None]
    space, heads = inputs.query.shape[1:-2], inputs.query.shape[-2]
    # [batch, heads, tokens, channels]
    query, key, value = (
        x.flatten(1, -3).transpose(1, 2).repeat_interleave(heads // x.shape[-2], 1)
        for x in leaves[:3]
    )
    scores = 0.125 * query @ key.transpose(-1, -2)
    if isinstance(rule, Neighborhood) and inputs.rpb is not None:
        scores = scores + leaves[3].flatten(1)[:, _bias_index(rule, space, query.device)]
    scores = scores.masked_fill(~window_mask(rule, space, space, query.device), -torch.inf)
    if inputs.key_mask is not None:  # of each query, it leaves some keys
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2).unflatten(1, space)
    lse = scores.logsumexp(-1).transpose(1, 2).unflatten(1, space)
    found = torch.autograd.grad((out, lse), leaves, [x.double() for x in grads])
    return [out.detach(), lse.detach(), *found]


def _bias(rule: Rule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """A random bias of two heads for a rule that is neither causal nor circular."""
    if isinstance(rule, Dense) or any(rule.is_causal) or set(rule.boundary) != {"shift"}:
        return None
    return torch.randn(2, *(2 * k - 1 for k in rule.kernel_size), device=device, dtype=dtype)


def _bias_index(rule: Neighborhood, space: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the bias of each pair is, which attend each other, ``[queries, keys]``."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for n, k, d in zip(space, rule.kernel_size, rule.dilation):
        position = torch.arange(n, device=device) // d
        offset = (position - position[:, None] + k - 1).clamp(0, 2 * k - 2)
        index = outer(index * (2 * k - 1), offset, torch.add)
    return index


def _check(found: tuple[Tensor | None, ...], wanted: list[Tensor], problem: str) -> None:
    for name, a, b in zip(("output", "LSE", *Gradients._fields), found, wanted):
        error = (b - a).norm() / b.norm() if a is not None else torch.inf
        if not error < 0.02:
            raise ArithmeticError(f"{name} of {problem} is off by {float(error):.2g} of itself")
