"""Dense attention, which a problem is measured beside, and what that would cost."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...neighborhood import Neighborhood
from . import measure
from .machine import free_memory
from .problem import Problem

# The keys are the names that NATTEN's profiler has for them. All of them need a GPU.
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "fav2": SDPBackend.FLASH_ATTENTION,
    "xformers": SDPBackend.EFFICIENT_ATTENTION,
}
PLAIN_DENSE = "sdpa"  # PyTorch's own choice, on CPUs
LIMIT_SECONDS = 30.0
# A part of a problem that keeps a device busy; its time grows in proportion to its pairs.
CPU_QUERIES, GPU_QUERIES, KEYS = 128, 16384, 4096


def call_with_gradients(
    function: Callable[..., Any], inputs: dict[str, torch.Tensor], options: dict[str, Any],
    backward: bool,
) -> Callable[[], Any]:  # fmt: skip
    """A call of an attention function; with ``backward`` it also computes gradients."""
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


def dense_call(problem: Problem, name: str, backward: bool) -> Callable[[], Any]:
    """A call of ``scaled_dot_product_attention`` of all queries and keys."""
    options = {"enable_gqa": True} if problem.heads != problem.kv_heads else {}
    inputs = problem.dense_inputs(requires_grad=backward)
    call = call_with_gradients(F.scaled_dot_product_attention, inputs, options, backward)

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


class Cost(NamedTuple):
    """What a call of dense attention is estimated to take: seconds, and bytes of memory."""

    seconds: float
    bytes: int


def cost(problem: Problem, name: str, backward: bool) -> Cost:
    """Estimate dense attention from the time and the kernels of a part of it.

    Args:
        problem: what is asked for.
        name: the implementation.
        backward: whether gradients are computed, too.

    Raises:
        RuntimeError: the implementation can not run the problem.
    """
    keys = problem.num_keys + problem.num_additional
    on_gpu = problem.device.type == "cuda"
    part_keys = min(keys, KEYS)
    part_queries = min(problem.num_queries, GPU_QUERIES if on_gpu else CPU_QUERIES)
    part = replace(
        problem, shape=(part_keys,), query_shape=(part_queries,), batch=1, num_additional=0,
        rule=Neighborhood.create(1, 1, queries_per_key=part_queries, query_offset=0),
    )  # fmt: skip
    call = dense_call(part, name, backward)
    kernels = measure.kernel_times(call, problem.device)  # which also calls it a first time
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(problem.device)
    seconds = time.perf_counter() - start
    pairs = problem.batch * problem.all_pairs / (part_queries * part_keys)
    memory = problem.bytes(backward)
    if any("attention_math" in kernel.name for kernel in kernels):  # scores and weights in memory
        scores = problem.batch * problem.heads * problem.all_pairs * problem.dtype.itemsize
        memory += scores * (4 if backward else 2)
    return Cost(seconds * pairs, memory)


def too_much(problem: Problem, name: str, backward: bool, warmup: int) -> str | None:
    """Why dense attention had better not be measured, or None.

    Args:
        problem, name, backward: as in :func:`cost`.
        warmup: calls before those that count.

    Raises:
        RuntimeError: the implementation can not run the problem.
    """
    seconds, needed = cost(problem, name, backward)
    calls = 2 * (warmup + 10) if problem.device.type == "cuda" else warmup + 3
    free = free_memory(problem.device) or math.inf
    if needed > free:
        return f"would need {needed / 1e9:.3g} GB of memory, of which {free / 1e9:.3g} are free"
    if seconds * calls > LIMIT_SECONDS:
        return f"would take about {seconds:,.0f} s a call"
    return None
