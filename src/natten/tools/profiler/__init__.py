"""Time neighborhood attention beside dense attention; ``natten profile --help`` has examples.

problem.py   what is computed, and the least work that it needs
measure.py   PyTorch's and Triton's clocks
tune.py      tiles: list, force, try and remember them
report.py    the results
machine.py   the machine and the versions they were measured with
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import backends
from ...errors import ArgumentError
from ...functional import WINDOW, neighborhood_attention_generic
from . import measure
from .problem import Problem
from .report import BOTH, FORWARD, Report, Row
from .tune import computed_over_needed

Step = Callable[[str], None]

# The keys are the names that NATTEN's profiler has for them. All of them need a GPU.
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fav2": SDPBackend.FLASH_ATTENTION,
    "xformers": SDPBackend.EFFICIENT_ATTENTION,
}
PLAIN_DENSE = "sdpa"  # PyTorch's own choice, on CPUs


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
    return _call(function, problem.inputs(requires_grad=backward), options, backward)


def dense_call(problem: Problem, name: str, backward: bool) -> Callable[[], Any]:
    """A call of ``scaled_dot_product_attention`` of all queries and keys."""
    options = {"enable_gqa": True} if problem.heads != problem.kv_heads else {}
    call = _call(
        F.scaled_dot_product_attention, problem.dense_inputs(requires_grad=backward), options,
        backward,
    )  # fmt: skip

    def chosen() -> Any:
        with sdpa_kernel(DENSE[name]) if name in DENSE else nullcontext(), _quiet():
            return call()

    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch, which warns of every reason why it can not run before it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _call(
    function: Callable[..., Any], inputs: dict[str, torch.Tensor], options: dict[str, Any],
    backward: bool,
) -> Callable[[], Any]:  # fmt: skip
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(**inputs, **options)

        return forward
    leaves = list(inputs.values())
    query, value = inputs["query"], inputs["value"]
    grad = query.new_ones(1).expand(*query.shape[:-1], value.shape[-1]).contiguous()

    def both() -> Any:
        return torch.autograd.grad(function(**inputs, **options), leaves, grad)

    return both


def profile(
    problem: Problem,
    *,
    backend: str | None = None,
    backward: bool = False,
    dense: bool = True,
    compiled: bool = False,
    warmup: int = 10,
    step: Step = lambda name: None,
    **hints: Any,
) -> Report:
    """Time a problem, and dense attention of the same queries and keys beside it.

    Args:
        problem: what to run.
        backend: a backend's name, one of upstream's, or "cudnn", "fav2" or "xformers". The last
            three time dense attention alone, and the problem must be dense attention.
        backward: also time forward and backward together.
        dense: whether to time dense attention.
        compiled: time ours under ``torch.compile``.
        warmup: calls before those that count.
        step: a function that is called with a name before each measurement; :func:`count_steps`
            says how often.
        hints: further arguments of ``na1d``, ``na2d`` and ``na3d``.

    Raises:
        ArgumentError: the backend is unknown or can not run the problem.

    Example:
        >>> import natten
        >>> rule = natten.Neighborhood.create(1, kernel_size=5)
        >>> report = profile(Problem((32,), rule), warmup=1)
        >>> [(row.attention, row.kind) for row in report.rows]
        [('natten sdpa', 'eager'), ('dense sdpa', 'eager')]
    """
    on_gpu = problem.device.type == "cuda"
    dense_only = backend in DENSE
    if dense_only:
        assert backend is not None
        if not on_gpu:
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
        names = ([*DENSE] if on_gpu else [PLAIN_DENSE]) if dense else []
        gradient = choose_backend(problem, backend, "gradient") if backward else None
        report.computed_over_needed = computed_over_needed(problem, report.backend, gradient)
    kinds = ("graph", "eager") if on_gpu else ("eager",)
    times: dict[tuple[str, str, str], measure.Timing] = {}
    for pass_name in (FORWARD, BOTH) if backward else (FORWARD,):
        with_gradients = pass_name == BOTH
        calls: dict[str, Callable[[], Callable[[], Any]]] = {}
        if not dense_only:
            ours = f"natten {report.backend}" + (", compiled" if compiled else "")
            calls[ours] = partial(natten_call, problem, backend, with_gradients, compiled, **hints)
        for name in names:
            calls[f"dense {name}"] = partial(dense_call, problem, name, with_gradients)
        for number, (attention, make) in enumerate(calls.items()):
            step(f"{attention}, {pass_name}")
            try:
                call = make()
                for kind in kinds:
                    if kind == "graph":
                        timing = measure.graph_time(call, problem.device, warmup)
                    else:
                        timing = measure.eager_time(call, problem.device, warmup)
                    times[attention, pass_name, kind] = timing
                if number == 0:
                    report.kernels[pass_name] = measure.kernel_times(call, problem.device)
            except RuntimeError as error:
                if number == 0:
                    raise
                reason = str(error).strip().partition("\n")[0]
                report.notes.append(f"{attention}, {pass_name}: {reason}")
    report.rows = [
        _row(report, attention, pass_name, kind, times) for attention, pass_name, kind in times
    ]
    return report


def count_steps(problem: Problem, backend: str | None, backward: bool, dense: bool) -> int:
    """How often :func:`profile` calls ``step``."""
    implementations = len(DENSE) if problem.device.type == "cuda" else 1
    each = 1 if backend in DENSE else 1 + (implementations if dense else 0)
    return each * (2 if backward else 1)


def _row(
    report: Report, attention: str, pass_name: str, kind: str,
    times: dict[tuple[str, str, str], measure.Timing],
) -> Row:  # fmt: skip
    problem, timing = report.problem, times[attention, pass_name, kind]
    backward, is_dense = pass_name == BOTH, attention.startswith("dense")
    yard = min(
        (
            each.median_us
            for (name, *rest), each in times.items()
            if name.startswith("dense") and rest == [pass_name, kind]
        ),
        default=None,
    )
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
