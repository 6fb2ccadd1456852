"""What to expect of a layout on several ranks, before any of it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from .._numbers import entries, integer, real
from ..errors import ArgumentError
from ..inputs import compute_dtype
from ..neighborhood import Boundary, Causal, Dimension, Neighborhood
from .loads import Layer, Load, fewer_bytes_of, halo_loads, heads_loads
from .shards import Sharding, chunk_sizes


@dataclass(frozen=True)
class Estimate:
    """The time of a pass, in seconds.

    Attributes:
        time: of the slowest rank.
        compute, communication: what it computes and what it moves, each alone.
        hidden: the share of the communication during which it computes.
        efficiency: the time on one rank over the ranks' time together.
    """

    time: float
    compute: float
    communication: float
    hidden: float
    efficiency: float


@dataclass(frozen=True)
class MethodPlan:
    """What every rank does with one method.

    Attributes:
        method: "halo" or "heads".
        loads: of each rank.
        forward, backward: the times to expect, None if no rates were given.
    """

    method: str
    loads: tuple[Load, ...]
    forward: Estimate | None = None
    backward: Estimate | None = None


@dataclass(frozen=True)
class Plan:
    """What to expect of a layout on several ranks; ``plan["halo"]`` is what one method does.

    Printed, it is a table.

    Attributes:
        rule: the windows.
        sizes: for each axis, the keys of each rank along it.
        methods: what each method does; "heads" is there if the ranks divide the heads.
        auto: the method that ``method="auto"`` takes.
        layer: batch, heads, head dims and dtype, in words.
    """

    rule: Neighborhood
    sizes: tuple[tuple[int, ...], ...]
    methods: tuple[MethodPlan, ...]
    auto: str
    layer: str

    def __getitem__(self, method: str) -> MethodPlan:
        for each in self.methods:
            if each.method == method:
                return each
        raise KeyError(method)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ranks, shape = _by(map(len, self.sizes)), _by(map(sum, self.sizes))
        title = f"{shape} keys on {ranks} ranks, window {_by(self.rule.kernel_size)}, {self.layer}"
        names = [f"{m.method} (auto)" if m.method == self.auto else m.method for m in self.methods]
        columns = [("most of a rank", *names)]
        for rows in zip(*map(_rows, self.methods)):
            columns.append((rows[0][0], *(cell for _, cell in rows)))
        return "\n".join([title, "", *_table(columns)])


def plan(
    shape: int | Sequence[int],
    kernel_size: Dimension,
    stride: Dimension = 1,
    dilation: Dimension = 1,
    is_causal: Causal = False,
    *,
    ranks: Mapping[int, int | Sequence[int]],
    boundary: Boundary = "shift",
    queries_per_key: Dimension = 1,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    bandwidth: float | None = None,
    latency: float = 0.0,
    flops: float | None = None,
) -> Plan:
    """Say what each rank would move, compute and hold. Nothing runs, and no ranks are needed.

    Times take a rank for one that computes at one rate, whatever the shapes, and that sends and
    receives at the same time, at one rate. Extra work of smaller tiles is not in them.

    Args:
        shape: token layout of all keys, one to three axis lengths.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key: the windows, as in
            :func:`natten.distributed.neighborhood_attention_generic`.
        ranks: for each axis that is split, the number of ranks, or the keys of each of them. A
            number splits as DTensors do: ``ceil(length / number)`` keys each while they last.
        batch, heads, heads_kv, head_dim, value_dim, dtype: of the tensors. ``heads_kv`` is as
            ``heads`` and ``value_dim`` as ``head_dim`` by default.
        bandwidth: bytes per second that a rank sends, and receives.
        latency: seconds before a message's first byte arrives.
        flops: operations per second that a rank computes: two products of a query and a key
            forward, five backward, and two operations for each multiply-add.

    Raises:
        ArgumentError: an argument has a type or value that is not allowed.

    Example:
        >>> video = plan((30, 48, 80), (18, 24, 24), ranks={1: 2, 2: 2}, heads=24, head_dim=128)
        >>> video["halo"].loads[0].extra_keys, video["heads"].loads[0].extra_keys
        (24750, 86400)
        >>> video.auto
        'halo'
    """
    window = (kernel_size, stride, dilation, is_causal, boundary, queries_per_key)
    sharding = _sharding(shape, window, ranks)
    numbers = {
        "batch": batch, "heads": heads, "heads_kv": heads if heads_kv is None else heads_kv,
        "head_dim": head_dim, "value_dim": head_dim if value_dim is None else value_dim,
    }  # fmt: skip
    for name, given in numbers.items():
        number = integer(given)
        if number is None or number < 1:
            raise ArgumentError(f"`{name}` must be an integer of at least 1, got {given!r}.")
        numbers[name] = number
    if numbers["heads"] % numbers["heads_kv"]:
        raise ArgumentError(
            "`heads` must be a multiple of `heads_kv`, got "
            f"{numbers['heads']} and {numbers['heads_kv']}."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"`dtype` must be a floating-point dtype, got {dtype!r}.")
    rates = _rates(bandwidth, latency, flops)
    layer = Layer(**numbers, itemsize=dtype.itemsize, lse_itemsize=compute_dtype(dtype).itemsize)
    all_ranks = tuple(product(*(range(len(each)) for each in sharding.sizes)))
    methods = [MethodPlan("halo", halo_loads(sharding, all_ranks, layer))]
    if layer.heads_kv % len(all_ranks) == 0:
        methods.append(MethodPlan("heads", heads_loads(sharding, all_ranks, layer)))
    if rates is not None:
        methods = [_with_times(each, layer, *rates) for each in methods]
    words = f"batch {layer.batch}, {layer.heads} heads of {layer.head_dim}"
    if layer.heads_kv != layer.heads:
        words += f", {layer.heads_kv} of keys"
    if layer.value_dim != layer.head_dim:
        words += f", values of {layer.value_dim}"
    words += f", {str(dtype).removeprefix('torch.')}"
    auto = fewer_bytes_of(sharding, all_ranks, layer)
    return Plan(sharding.rule, sharding.sizes, tuple(methods), auto, words)


# --- times ---------------------------------------------------------------------------------------


def _rates(bandwidth: Any, latency: Any, flops: Any) -> tuple[float, float, float] | None:
    """Bandwidth, latency and rate of compute, checked; None if times are not asked for."""
    given = {"bandwidth": bandwidth, "flops": flops}
    for name, rate in given.items():
        number = real(rate)
        if rate is not None and (number is None or not 0 < number < math.inf):
            raise ArgumentError(f"`{name}` must be a number above 0, got {rate!r}.")
    seconds = real(latency)
    if seconds is None or not 0 <= seconds < math.inf:
        raise ArgumentError(f"`latency` must be a number of seconds, got {latency!r}.")
    if (bandwidth is None) != (flops is None):
        raise ArgumentError(
            f"`bandwidth` and `flops` must be given together, got {bandwidth!r} and {flops!r}."
        )
    return None if bandwidth is None else (float(bandwidth), float(seconds), float(real(flops)))


def _with_times(
    method: MethodPlan, layer: Layer, bandwidth: float, latency: float, flops: float
) -> MethodPlan:
    """The plan with the times of forward and backward."""
    messages = 2 if method.method == "heads" else 1  # one after the other

    def estimate(name: str) -> Estimate:
        second = flops / layer.operations[name]  # pairs that a rank computes in it
        found = []
        for load in method.loads:
            most = max(getattr(load, name))
            communication = messages * latency + most / bandwidth if most else 0.0
            hidden = min(load.inner_pairs / second, communication)
            compute = load.pairs / second
            share = hidden / communication if communication else 1.0
            found.append((compute + communication - hidden, compute, communication, share))
        slowest = max(found)
        alone, together = sum(compute for _, compute, *_ in found), len(found) * slowest[0]
        return Estimate(*slowest, efficiency=alone / together if together else 1.0)

    return replace(method, forward=estimate("forward"), backward=estimate("backward"))


# --- arguments, and a table ----------------------------------------------------------------------


def _sharding(shape: Any, window: tuple[Any, ...], ranks: Any) -> Sharding:
    """The layout on its ranks, checked."""
    given = entries(shape)
    lengths = tuple(integer(n) for n in ((shape,) if given is None else given))
    if len(lengths) not in (1, 2, 3) or not all(n is not None and n >= 0 for n in lengths):
        raise ArgumentError(f"`shape` must be one to three axis lengths, got {shape!r}.")
    rule = Neighborhood.create(len(lengths), *window)
    fine = rule.queries_per_key
    rule.check(tuple(r * n for r, n in zip(fine, lengths)), lengths)
    if not isinstance(ranks, Mapping):
        raise ArgumentError(
            "`ranks` must name the axes that are split and the ranks along them, as {0: 4}, got "
            f"{ranks!r}."
        )
    sizes: dict[int, tuple[int, ...]] = {}
    for given_axis, value in ranks.items():
        axis, most = integer(given_axis), len(lengths)
        if axis is None or not -most <= axis < most or axis % most in sizes:
            raise ArgumentError(
                f"`ranks` must have different axes from 0 to {most - 1}, got {dict(ranks)}."
            )
        sizes[axis % most] = _split(lengths[axis], value, axis)
    return Sharding(rule, tuple(sizes.get(i, (n,)) for i, n in enumerate(lengths)))


def _split(length: int, value: Any, axis: int) -> tuple[int, ...]:
    """The keys of each rank along an axis."""
    given, count = entries(value), integer(value)
    if given is None and count is not None and count >= 1:
        return tuple(chunk_sizes(length, count))
    numbers = tuple(map(integer, given or ()))
    if not numbers or None in numbers or min(numbers) < 0 or sum(numbers) != length:
        raise ArgumentError(
            f"`ranks` must have for axis {axis} the number of ranks, or the keys of each rank, "
            f"{length} altogether, got {value!r}."
        )
    return numbers


def _by(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _rows(method: MethodPlan) -> Iterator[tuple[str, str]]:
    """What the table says of a method: of the rank that has most, of the slowest one."""
    loads = method.loads

    def most(of: Callable[[Load], int]) -> str:
        return _bytes(max(map(of, loads)))

    yield "keys of a rank", str(max(load.keys for load in loads))
    yield "keys from others", str(max(load.extra_keys for load in loads))
    yield "sent, forward", most(lambda load: load.forward.sent)
    yield "received, forward", most(lambda load: load.forward.received)
    yield "sent, backward", most(lambda load: load.backward.sent)
    yield "received, backward", most(lambda load: load.backward.received)
    inner = [load.inner_pairs / load.pairs for load in loads if load.pairs]
    yield "pairs computed meanwhile, at least", f"{min(inner, default=0):.0%}"
    yield "memory: own shard", most(lambda load: load.shard)
    yield "memory: of others", most(lambda load: load.halo)
    yield "memory: copies", most(lambda load: load.copies)
    yield "memory: output", most(lambda load: load.output)
    for name in ("forward", "backward"):
        estimate: Estimate | None = getattr(method, name)
        if estimate is not None:
            yield f"time, {name}", _seconds(estimate.time)
            yield f"compute, {name}", _seconds(estimate.compute)
            yield f"communication, {name}", _seconds(estimate.communication)
            yield f"hidden, {name}", f"{estimate.hidden:.0%}"
            yield f"efficiency, {name}", f"{estimate.efficiency:.0%}"


def _seconds(time: float) -> str:
    return f"{1e3 * time:.3g} ms"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table, whose first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for what, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append(f"| {' | '.join([what.ljust(widths[0]), *padded])} |")
    dashes = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return [lines[0], f"|{'|'.join(dashes)}|", *lines[1:]]
