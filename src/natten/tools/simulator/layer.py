"""The attention layers that are predicted, and the devices that run them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ... import tiling
from ..._numbers import entries, integer
from ...backends import BACKENDS
from ...errors import ArgumentError
from ...neighborhood import Boundary, Neighborhood, group_length, query_range
from ..layouts import query_layout
from .kernels import Hopper, Kernel, Shape, Sized, tile_shapes

_MOST_TOKENS = 1 << 24  # of an axis, to be counted


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know of a device, and how its kernels are tiled.

    Attributes:
        name: what to call it.
        tflops: matrix products, 10^12 operations a second (2 per multiply-add), in half precision.
        bandwidth: of memory, 10^12 bytes a second.
        exponentials: 10^12 a second.
        q_tile: queries in a tile, a power of two.
        kv_tile: keys in a block, a power of two; with 1 a tile takes exactly the keys it needs.
        masking: what masking by comparisons adds to the products of a block, as a fraction.
        backend: "hopper" if that backend's tiles replace those sizes where it can run the layer,
            else "".
    """

    name: str
    tflops: float
    bandwidth: float
    exponentials: float
    q_tile: int = 128
    kv_tile: int = 64
    masking: float = 0.2  # measured on an H100: 0.13 to 0.25
    backend: str = ""

    def __post_init__(self) -> None:
        """Check what a prediction divides by, and what tiles are made of."""
        for name in ("tflops", "bandwidth", "exponentials"):
            rate = getattr(self, name)
            if not 0 < rate < math.inf:
                raise ArgumentError(f"`{name}` must be a number above 0, got {rate!r}.")
        for name in ("q_tile", "kv_tile"):
            size = integer(getattr(self, name))
            if size is None or size < 1 or size & (size - 1):
                raise ArgumentError(
                    f"`{name}` must be a power of two, got {getattr(self, name)!r}."
                )
            object.__setattr__(self, name, size)
        if self.masking < 0:
            raise ArgumentError(f"`masking` must be at least 0, got {self.masking!r}.")
        if self.backend not in ("", Hopper.name):
            raise ArgumentError(f"`backend` must be '' or {Hopper.name!r}, got {self.backend!r}.")


# For GPUs, the rates of dense bf16 products and of memory are those of data sheets, and
# exponentials are 16 per multiprocessor and clock. "cpu" is two cores, with the constants by which
# the tiled backend chooses its tiles.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", tflops=989, bandwidth=3.35, exponentials=3.7, backend="hopper"),
        Device("h200", tflops=989, bandwidth=4.8, exponentials=3.7, backend="hopper"),
        Device("a100", tflops=312, bandwidth=2.04, exponentials=2.4),
        Device(
            "cpu",
            tflops=4e-3 / tiling.PRODUCT_DIM,
            bandwidth=4e-3 / tiling.COPY,
            exponentials=1e-3 / tiling.PRODUCT,
            q_tile=16,
            kv_tile=1,
            masking=0.0,  # the cost of an exponential includes it
        ),
    )
}


@dataclass(frozen=True)
class Layer:
    """An attention layer whose window and stride may vary.

    Build it with :meth:`create`, which checks what it gets.

    Attributes:
        rule: the windows that are asked for; others are predicted beside them.
        shape, queries: token layouts of the keys and of the queries.
        device, batch, heads, head_dim, itemsize, q_tile, kv_tile, aligned: as in :func:`simulate`.
    """

    rule: Neighborhood
    shape: Shape
    queries: Shape
    device: Device
    batch: int
    heads: int
    head_dim: int
    itemsize: int
    q_tile: Shape | None
    kv_tile: Shape | None
    aligned: bool

    @classmethod
    def create(
        cls,
        shape: int | Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        boundary: Boundary = "shift",
        queries_per_key: int | Sequence[int] = 1,
        query_offset: int | Sequence[int] | None = None,
        query_shape: int | Sequence[int] | None = None,
        device: str | Device = "h100",
        batch: int = 1,
        heads: int = 1,
        head_dim: int = 128,
        itemsize: int = 2,
        q_tile: Sequence[int] | None = None,
        kv_tile: Sequence[int] | None = None,
        aligned: bool = False,
    ) -> Layer:
        """A checked layer; arguments are those of :func:`simulate`."""
        if isinstance(device, str):
            if device not in DEVICES:
                raise ArgumentError(
                    f"`device` must be a Device or one of {sorted(DEVICES)}, got {device!r}."
                )
            device = DEVICES[device]
        if not isinstance(device, Device):
            raise ArgumentError(
                f"`device` must be a Device or one of {sorted(DEVICES)}, got {device!r}."
            )
        lengths = _integers("shape", shape)
        rank = len(lengths)
        rule = Neighborhood.create(
            rank, kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
        )
        queries = query_layout(rule, lengths, query_shape)
        if max(*lengths, *queries) > _MOST_TOKENS:
            raise ArgumentError(
                f"`shape` must have at most {_MOST_TOKENS} keys and queries on every axis to be "
                f"counted, got {lengths} keys and {queries} queries."
            )
        if aligned and not (rule.is_self_attention and "circular" not in rule.boundary):
            raise ArgumentError(
                "`aligned` is for kernels that reorder the tokens of queries and keys alike, so "
                "queries must be the whole layout and as fine as keys, and no axis circular; got "
                f"query_offset {rule.query_offset}, queries_per_key {rule.queries_per_key}, "
                f"boundary {rule.boundary}."
            )
        counts = {"batch": batch, "heads": heads, "head_dim": head_dim, "itemsize": itemsize}
        for name, given in counts.items():
            number = integer(given)
            if number is None or number < 1:
                raise ArgumentError(f"`{name}` must be an integer of at least 1, got {given!r}.")
            counts[name] = number
        tiles = (
            None if tile is None else _integers(name, tile, rank)
            for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile))
        )
        return cls(
            rule=rule,
            shape=lengths,
            queries=queries,
            device=device,
            **counts,
            q_tile=next(tiles),
            kv_tile=next(tiles),
            aligned=aligned,
        )

    @property
    def all_pairs(self) -> int:
        """Query-key pairs of dense attention, per head of a batch entry."""
        return math.prod(self.queries) * math.prod(self.shape)

    def kernel(self) -> Kernel:
        """The model of the kernels that run the layer."""
        lengths = [
            max(last - first for first, last, _ in self.groups(axis)) for axis in range(self.rank)
        ]
        device, given = self.device, self.q_tile or self.kv_tile or self.aligned
        if device.backend == Hopper.name and not given and self._suits_hopper():
            return Hopper(lengths, self.head_dim, device.masking)
        queries = [self.q_tile] if self.q_tile else tile_shapes(device.q_tile, lengths)
        keys = [self.kv_tile] if self.kv_tile else tile_shapes(device.kv_tile, lengths)
        return Sized(queries, keys, device.masking)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def groups(self, axis: int) -> dict[tuple[int, int, int], int]:
        """How many dilation groups of an axis look alike, of those with queries.

        They are known by the first and the one-past-last number of their queries, and by how many
        keys they have.
        """
        return _groups(self.rule, axis, self.shape[axis], self.queries[axis])

    def _suits_hopper(self) -> bool:
        """Whether the ``hopper`` backend has kernels for this layer that the model knows: those of
        whole layouts, which dilations divide, and whose windows shift.
        """
        rule = self.rule
        plain = rule.is_self_attention and set(rule.boundary) == {"shift"}
        divides = all(n % d == 0 for n, d in zip(self.shape, rule.dilation))
        dims = next(each.head_dims for each in BACKENDS if each.name == Hopper.name)
        # Heads that 8 does not divide are copied, which the model does not know.
        fits = (dims is None or self.head_dim in dims) and self.head_dim % 8 == 0
        return self.itemsize == 2 and plain and divides and fits

    def time_us(self, pairs: float, overhead: float = 0.0) -> tuple[float, str]:
        """Roofline of ``pairs`` in microseconds, and what bounds it.

        Args:
            pairs: query-key pairs computed per head.
            overhead: the work of masking and of waiting, as a fraction of the products.
        """
        matrices, device = self.batch * self.heads, self.device
        work = matrices * pairs * (1 + overhead)
        rows = 2 * (math.prod(self.queries) + math.prod(self.shape))  # Q, K, V and the output
        moved = matrices * rows * self.head_dim * self.itemsize
        times = {
            "products": 4 * work * self.head_dim / device.tflops,
            "exponentials": matrices * pairs / device.exponentials,
            "memory": moved / device.bandwidth,
        }
        bound_by = max(times, key=lambda kind: times[kind])
        return times[bound_by] / 1e6, bound_by


@lru_cache(maxsize=64)
def _groups(
    rule: Neighborhood, axis: int, length: int, queries: int
) -> dict[tuple[int, int, int], int]:
    d, found = rule.dilation[axis], Counter[tuple[int, int, int]]()
    for group in range(min(d, length)):
        first, last = query_range(rule, axis, queries, group)
        if first < last:
            found[first, last, group_length(length, d, group)] += 1
    return found


def _integers(name: str, value: Any, count: int | None = None) -> Shape:
    """``value`` as integers of at least 1: ``count`` of them, or one to three."""
    given = entries(value)
    numbers = tuple(integer(e) for e in ((value,) if given is None else given))
    known = all(number is not None and number >= 1 for number in numbers)
    if not known or len(numbers) not in ((1, 2, 3) if count is None else (count,)):
        wanted, each = ("one to three", "") if count is None else (count, ", one per axis")
        raise ArgumentError(
            f"`{name}` must be {wanted} integers of at least 1{each}, got {value!r}."
        )
    return numbers
