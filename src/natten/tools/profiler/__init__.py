"""Time neighborhood attention beside dense attention; ``natten profile --help`` has examples.

problem.py   what is computed, and the least work that it needs
dense.py     dense attention, and whether it takes too long to be measured
measure.py   PyTorch's and Triton's clocks
tune.py      tiles: list, force, try and remember them
report.py    the results
machine.py   the machine and the versions they were measured with
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import backends
from ...errors import ArgumentError
from ...functional import WINDOW, neighborhood_attention_generic
from . import measure
from .dense import DENSE, PLAIN_DENSE, call_with_gradients, dense_call, too_much
from .machine import free_memory
from .problem import Problem
from .report import BOTH, FORWARD, Report, Row
from .tune import computed_over_needed

Step = Callable[[str], None]
RECORDED_US = 5e5  # about how long calls are recorded, to say how long their kernels take


def choose_backend(problem: Problem, name: str | None, operation: str = "attention") -> str:
    """The backend that runs a problem.

    Args:
        problem: what to run.
        name: a backend's name, one of upstream's (which are hints), or None.
        operation: "attention", or its "gradient", which another backend may run.

    Raises:
        ArgumentError: the backend is unknown or can not run the problem; the message says why.
    """
    wanted = backends.check_name(name)
    question = problem.question(operation)
    chosen = backends.choose(wanted, question)
    if wanted and operation == "attention" and chosen.name != wanted:
        asked = backends.named(wanted)
        assert asked is not None
        raise ArgumentError(f"`backend` {wanted}: it {asked.unsupported(question)}.")
    return chosen.name


def natten_call(
    problem: Problem, backend: str | None, backward: bool, compiled: bool = False, **hints: Any
) -> Callable[[], Any]:
    """A call of our operator on random inputs; with ``backward`` it also computes gradients."""
    function: Callable[..., Any] = neighborhood_attention_generic
    if compiled:
        function = torch.compile(function, fullgraph=True)
    window = {name: getattr(problem.rule, name) for name in WINDOW}
    options = {**window, **hints, "backend": backend}
    return call_with_gradients(function, problem.inputs(requires_grad=backward), options, backward)


def profile(
    problem: Problem,
    *,
    backend: str | None = None,
    backward: bool = False,
    dense: bool | None = None,
    compiled: bool = False,
    warmup: int = 10,
    step: Step = lambda name: None,
    measured: Callable[[Row], None] = lambda row: None,
    **hints: Any,
) -> Report:
    """Time a problem, and dense attention of the same queries and keys beside it.

    Args:
        problem: what to run.
        backend: a backend's name, one of upstream's, or "cudnn", "fav2" or "xformers". The last
            three time dense attention alone, and the problem must be dense attention.
        backward: also time forward and backward together.
        dense: whether to time dense attention; None does so where it is estimated to take less
            than half a minute and to fit into memory. A note of the report says what was left out.
        compiled: time ours under ``torch.compile``.
        warmup: calls before those that count.
        step: a function that is called with a name before each measurement; :func:`count_steps`
            says how often.
        measured: a function that is called with each row of the report as soon as it is known.
        hints: further arguments of ``na1d``, ``na2d`` and ``na3d``.

    Raises:
        ArgumentError: the backend is unknown or can not run the problem, or memory is too small.

    Example:
        >>> import natten
        >>> rule = natten.Neighborhood.create(1, kernel_size=5)
        >>> report = profile(Problem((32,), rule), warmup=1)
        >>> [(row.attention, row.kind) for row in report.rows]
        [('dense sdpa', 'eager'), ('natten sdpa', 'eager')]
    """
    check_memory(problem, backward)
    dense_only = backend in DENSE
    if dense_only:
        assert backend is not None
        if problem.device.type != "cuda":
            raise ArgumentError(f"`backend` {backend}: it runs on GPUs, not on a CPU.")
        if not problem.is_self_attention:
            raise ArgumentError(
                f"`backend` {backend} is dense attention: each window must be all keys, and not "
                "causal."
            )
        names = [backend]
        report = Report(problem, backend)
    else:
        report = Report(problem, choose_backend(problem, backend))
        names = [] if dense is False else dense_names(problem)
        gradient = choose_backend(problem, backend, "gradient") if backward else None
        report.computed_over_needed = computed_over_needed(problem, report.backend, gradient)
    for pass_name in (FORWARD, BOTH) if backward else (FORWARD,):
        with_gradients = pass_name == BOTH
        times: dict[tuple[str, str], measure.Timing] = {}  # of an attention and a kind
        # Dense attention comes first, so that each row of ours is complete when it is measured.
        for name in names:
            attention = f"dense {name}"
            step(f"{attention}, {pass_name}")
            try:
                if dense is None and not dense_only:
                    reason = too_much(problem, name, with_gradients, warmup)
                    if reason is not None:
                        report.notes.append(f"{attention}, {pass_name}, is left out: it {reason}.")
                        continue
                call = dense_call(problem, name, with_gradients)
                found = _times(call, problem.device, warmup)
            except RuntimeError as error:
                if dense_only:
                    raise
                reason = str(error).strip().partition("\n")[0]
                report.notes.append(f"{attention}, {pass_name}: {reason}")
                continue
            times |= {(attention, kind): timing for kind, timing in found.items()}
            if dense_only:
                _record(report, pass_name, call, found)
        yard = {
            kind: min(timing.median_us for (_, each), timing in times.items() if each == kind)
            for _, kind in times
        }
        for (attention, kind), timing in times.items():
            row = _row(report, attention, pass_name, kind, timing, yard.get(kind))
            report.rows.append(row)
            measured(row)
        if dense_only:
            continue
        ours = attention_name(report.backend, compiled)
        step(f"{ours}, {pass_name}")
        call = natten_call(problem, backend, with_gradients, compiled, **hints)
        found = _times(call, problem.device, warmup)
        for kind, timing in found.items():
            row = _row(report, ours, pass_name, kind, timing, yard.get(kind))
            report.rows.append(row)
            measured(row)
        _record(report, pass_name, call, found)
    return report


def attention_name(backend: str, compiled: bool) -> str:
    """What a report calls ours."""
    return f"natten {backend}" + (", compiled" if compiled else "")


def dense_names(problem: Problem) -> list[str]:
    """The implementations of dense attention that a problem is measured beside."""
    return [*DENSE] if problem.device.type == "cuda" else [PLAIN_DENSE]


def count_steps(problem: Problem, backend: str | None, backward: bool, dense: bool | None) -> int:
    """How often :func:`profile` calls ``step``."""
    implementations = 0 if dense is False else len(dense_names(problem))
    return (1 if backend in DENSE else 1 + implementations) * (2 if backward else 1)


def check_memory(problem: Problem, backward: bool) -> None:
    """Refuse a problem whose tensors do not fit into memory.

    Args:
        problem: what is to run.
        backward: whether gradients are computed, too.

    Raises:
        ArgumentError: they take more than is free.
    """
    needed, free = problem.bytes(backward), free_memory(problem.device)
    if free is not None and needed > free:
        raise ArgumentError(
            f"`shape` {problem.shape} is too much for {problem.device}: the tensors take "
            f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free."
        )


def _times(call: Callable[[], Any], device: torch.device, warmup: int) -> dict[str, measure.Timing]:
    """A call's timings, by kind."""
    found = {}
    if device.type == "cuda":
        found["graph"] = measure.graph_time(call, device, warmup)
    return {**found, "eager": measure.eager_time(call, device, warmup)}


def _record(
    report: Report, pass_name: str, call: Callable[[], Any], found: dict[str, measure.Timing]
) -> None:
    """Add the kernels of a call, the mean of up to ten and of fewer if they are long."""
    calls = min(10, max(1, int(RECORDED_US / found["eager"].median_us)))
    report.kernels[pass_name] = measure.kernel_times(call, report.problem.device, calls)
    report.recorded[pass_name] = calls


def _row(
    report: Report, attention: str, pass_name: str, kind: str, timing: measure.Timing,
    yard: float | None,
) -> Row:  # fmt: skip
    """A row of the report; ``yard`` is the fastest dense attention's time in microseconds."""
    problem = report.problem
    backward, is_dense = pass_name == BOTH, attention.startswith("dense")
    pairs = problem.all_pairs if is_dense else problem.needed_pairs
    return Row(
        attention,
        pass_name,
        kind,
        timing,
        tflops=problem.flops(pairs, backward) / timing.median_us / 1e6,
        gbytes=problem.bytes(backward) / timing.median_us / 1e3,
        speedup=None if yard is None else yard / timing.median_us,
        efficiency=None if yard is None or is_dense else yard * report.kept / timing.median_us,
    )
