"""What neighborhood attention can gain over dense attention, before any of it runs.

There are three numbers, each below the one before it:

* by FLOPs: all pairs of a query and a key over the pairs that attend each other;
* by tiling: all pairs over the pairs that a kernel computes, because it works in whole tiles of
  queries and whole blocks of keys (:func:`natten.tiling.count_blocks`);
* by roofline: the predicted time of dense attention over the predicted time. Each of these times is
  the longest of three: the matrix products, the exponentials, and reading the inputs and writing
  the output once.

Times are of the forward pass. They are lower bounds, because a device's rates are the peaks of its
data sheet.

Source of the idea: "Generalized Neighborhood Attention" (arXiv 2504.16922).
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import tiling
from ..._numbers import entries, integer, real
from ...backends import BACKENDS
from ...errors import ArgumentError
from ...neighborhood import (
    Boundary,
    Neighborhood,
    fit_window,
    group_length,
    query_range,
    window_bounds,
)
from ..layouts import query_layout
from .kernels import Axis, Hopper, Kernel, Sized, Tiling, outer, tile_shapes

Shape = tuple[int, ...]

_SAME = 1e-9  # relative difference below which two times are one
_LATER = (
    1e-12  # a tiling's position adds this to its cost, so that the first of equal ones is taken
)
_AT_A_TIME = 1 << 17  # how many tiles or positions, times windows, are counted at a time
# What takes about half a minute on one core.
MOST_COMBINATIONS = 1 << 20  # of strides, or of windows, that are predicted at once
_MOST_COUNTED = 1 << 28  # tiles of an axis, for each of its strides or windows
_MOST_TOKENS = 1 << 24  # of an axis

Step = Callable[[str], None]


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
class Prediction:
    """What to expect of one window and stride.

    Attributes:
        kernel_size, stride: the window.
        kept: fraction of all pairs of a query and a key that attend each other.
        backend: the backend whose tiles these are, "hopper", or "" if only their sizes were given.
        q_tile, kv_tile: the cheapest tile of queries and block of keys.
        computed_over_needed: pairs computed per pair needed; 1 means that nothing is wasted.
        full_blocks: fraction of the visited blocks that are full, so that they need no mask.
        flop_bound: the largest speed-up over dense attention that the kept pairs allow.
        tile_bound: the largest speed-up that the computed pairs allow.
        interior_bound: the largest speed-up of a single tile, the one that visits the most blocks.
            It lies away from the borders, where windows stop moving.
        time_us, dense_us: rooflines of this problem and of dense attention, microseconds.
        bound_by: what takes longest: "products", "exponentials" or "memory".
    """

    kernel_size: Shape
    stride: Shape
    kept: float
    backend: str
    q_tile: Shape
    kv_tile: Shape
    computed_over_needed: float
    full_blocks: float
    flop_bound: float
    tile_bound: float
    interior_bound: float
    time_us: float
    dense_us: float
    bound_by: str

    @property
    def is_full(self) -> bool:
        """Whether no visited block needs a mask."""
        return self.full_blocks == 1

    @property
    def speedup(self) -> float:
        """Predicted speed-up over dense attention."""
        return self.dense_us / self.time_us

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, for JSON."""
        return {**asdict(self), "is_full": self.is_full, "speedup": self.speedup}


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
        fits = dims is None or self.head_dim in dims
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


def simulate(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Any,
) -> Prediction:
    """Predict one problem.

    Args:
        shape: token layout of the keys, one to three axis lengths.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
            ``na1d``, ``na2d`` and ``na3d``.
        query_shape: token layout of the queries; None means all from ``query_offset`` on.
        device: a :class:`Device`, or the name of one of ``DEVICES``: "h100", "h200", "a100", "cpu".
        batch, heads, head_dim: of the attention layer.
        itemsize: bytes of a number, 2 for half precision.
        q_tile, kv_tile: tile of queries and block of keys, one size per axis. Without them, these
            are what the device's backend chooses. If the device has no backend that can run the
            layer, they are the cheapest powers of two that multiply to the device's numbers.
        aligned: whether blocks lie on a fixed grid, as in kernels that reorder tokens first.
            In our kernels the blocks start where a tile's first window starts. Such kernels have no
            parts, no finer queries and no circular axes.

    Raises:
        ArgumentError: an argument has a type or value that is not allowed.

    Example:
        >>> video = simulate((30, 48, 80), (18, 24, 24), heads=24)
        >>> f"{video.flop_bound:.1f} by FLOPs, {video.tile_bound:.1f} by tiling"
        '11.1 by FLOPs, 7.5 by tiling'
        >>> simulate((30, 48, 80), (18, 24, 24), (16, 8, 8), heads=24).is_full
        True
    """
    layer = Layer.create(shape, kernel_size, stride, dilation, is_causal, **options)
    windows = zip(layer.rule.kernel_size, layer.rule.stride)
    return _predict(layer, [[[window]] for window in windows], lambda name: None)[0]


simulate.__signature__ = inspect.signature(Layer.create).replace(  # type: ignore[attr-defined]
    return_annotation="Prediction"
)


def simulate_strides(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    step: Step = lambda name: None,
    **options: Any,
) -> list[Prediction]:
    """Predict every stride, finest first: the fewer queries share a window, the finer.

    Windows that have more than a million strides, or axes so long that counting them for every
    stride takes minutes, have only those that are powers of two or the whole window, along as many
    axes as that takes. A circular axis has only strides that divide it.

    Args:
        shape, kernel_size, options: as in :func:`simulate`, without ``stride``.
        step: a function that is called with what is being done, now and then.

    Example:
        >>> len(simulate_strides((16, 44, 80), (16, 8, 12)))
        1536
    """
    layer = Layer.create(shape, kernel_size, **options)
    sizes = layer.rule.kernel_size
    every: list[Sequence[int]] = [range(1, k + 1) for k in sizes]
    tried = _affordable(layer, every, lambda axis: _powers(sizes[axis]))
    strides = [
        [[(k, s)] for s in strides if _fitted(layer, axis, k, s) == s]
        for axis, (k, strides) in enumerate(zip(sizes, tried))
    ]
    return sorted(_predict(layer, strides, step), key=lambda p: (math.prod(p.stride), p.time_us))


def _powers(most: int) -> list[int]:
    """The powers of two up to ``most``, and ``most``."""
    return sorted({*(1 << i for i in range(most.bit_length())), most})


def _affordable(
    layer: Layer,
    choices: list[Sequence[int]],
    fewer: Callable[[int], Sequence[int]],
    alternatives: int = 1,
) -> list[Sequence[int]]:
    """The choices of each axis, or fewer of them along axes that have too many.

    Args:
        layer: what is predicted.
        choices: strides, or windows, of each axis.
        fewer: some of the choices of an axis, which is given by its number.
        alternatives: how often each choice is counted.
    """
    tilings = layer.kernel().tilings
    found = []
    for axis, each in enumerate(choices):
        cuts = {(tiling.q_block[axis], tiling.kv_block[axis]) for tiling in tilings}
        tiles = sum(layer.queries[axis] / q for q, _ in cuts)
        tiles += layer.queries[axis] if _sums_positions(layer, axis) else 0
        found.append(fewer(axis) if len(each) * alternatives * tiles > _MOST_COUNTED else each)
    for axis in sorted(range(layer.rank), key=lambda axis: -len(found[axis])):
        if math.prod(map(len, found)) > MOST_COMBINATIONS:
            found[axis] = fewer(axis)
    return found


def recommended_strides(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Keep the predictions that are faster than every finer stride.

    Args:
        predictions: of one window, finest stride first, as :func:`simulate_strides` returns them.

    Example:
        >>> best = recommended_strides(simulate_strides((32768,), 2048))
        >>> [(each.stride, round(each.tile_bound, 1)) for each in best]
        [((1,), 15.1), ((64,), 15.5), ((128,), 16.0)]
    """
    kept: list[Prediction] = []
    for prediction in predictions:
        if not kept or prediction.time_us < kept[-1].time_us * (1 - _SAME):
            kept.append(prediction)
    return kept


def recommend(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    near: float = 0.25,
    step: Step = lambda name: None,
    **options: Any,
) -> list[Prediction]:
    """Windows and strides near a wish that are Pareto-best in kept pairs and predicted time.

    Windows differ from the wish by at most the fraction ``near`` on each axis. The strides tried
    are the wish, powers of two, and the sizes of given tiles. None exceeds the wish or half the
    window, whichever is larger. Where there are more than a million windows, 32 sizes are tried
    along as many axes as that takes.

    Args:
        near: how far from ``kernel_size`` a window may be, as a fraction.
        step: a function that is called with what is being done, now and then.
        shape, kernel_size, stride, dilation, is_causal, options: as in :func:`simulate`.

    Returns:
        Predictions, fastest first. Each keeps more pairs than all before it, and no candidate that
        keeps as many is predicted to be faster.

    Example:
        >>> front = recommend((256, 256), 80, 16, near=0.1, heads=24)
        >>> front[0].kept < front[-1].kept and front[0].time_us < front[-1].time_us
        True
    """
    fraction = real(near)
    if fraction is None or not 0 <= fraction < 1:
        raise ArgumentError(f"`near` must be a number of at least 0 and below 1, got {near!r}.")
    layer = Layer.create(shape, kernel_size, stride, dilation, is_causal, **options)
    rule, windows = layer.rule, []
    for length, d, k, boundary in zip(layer.shape, rule.dilation, rule.kernel_size, rule.boundary):
        low, high = math.ceil(k * (1 - fraction)), int(k * (1 + fraction))
        windows.append(range(low, (high if boundary == "truncate" else min(high, length // d)) + 1))

    def fewer(axis: int) -> Sequence[int]:
        every = windows[axis]
        return sorted({*every[:: math.ceil(len(every) / 32)], rule.kernel_size[axis]})

    options_per_axis = []
    most = max(k.bit_length() for k in rule.kernel_size) + 1  # strides of a window, about
    for axis, sizes in enumerate(_affordable(layer, [*windows], fewer, most)):
        wish, k = rule.stride[axis], rule.kernel_size[axis]
        tiles = {tile[axis] for tile in (layer.q_tile, layer.kv_tile) if tile is not None}
        strides = sorted({wish, *(1 << i for i in range(k.bit_length())), *tiles})
        options_per_axis.append(
            [
                [
                    (window, _fitted(layer, axis, window, min(s, window, max(wish, window // 2))))
                    for s in strides
                ]
                for window in sizes
            ]
        )
    front: list[Prediction] = []
    found = _predict(layer, options_per_axis, step)
    for prediction in sorted(found, key=lambda p: (p.time_us, -p.kept)):
        if not front or prediction.kept > front[-1].kept * (1 + _SAME):
            front.append(prediction)
    return front


def _fitted(layer: Layer, axis: int, kernel_size: int, stride: int) -> int:
    """The largest stride up to ``stride`` that the axis allows."""
    if layer.rule.boundary[axis] != "circular":
        return stride
    length, d = layer.shape[axis : axis + 1], layer.rule.dilation[axis]
    return fit_window(length, kernel_size, stride, d, boundary="circular")[1][0]


# --- counting ---


def _sums_positions(layer: Layer, axis: int) -> bool:
    """Whether the windows of an axis differ in size, so that each query is looked at."""
    return layer.rule.is_causal[axis] or layer.rule.boundary[axis] == "truncate"


def _needed(layer: Layer, axis: int, windows: Sequence[tuple[int, int]]) -> Tensor:
    """Pairs of a query and a key that attend each other, for every ``(kernel_size, stride)``."""
    rule = layer.rule
    kernel, stride = torch.tensor(windows, device="cpu")[:, :, None].unbind(1)
    needed = torch.zeros(len(windows), dtype=torch.float64, device="cpu")
    for (begin, end, n), groups in layer.groups(axis).items():
        if not _sums_positions(layer, axis):
            needed += groups * (end - begin) * kernel[:, 0]
            continue
        position = torch.arange(begin, end, device="cpu") // rule.queries_per_key[axis]
        most = max(1, _AT_A_TIME // len(position))
        sums = []
        for k, s in zip(kernel.split(most), stride.split(most)):
            first, last = window_bounds(
                position, n, k, s, rule.is_causal[axis], rule.boundary[axis]
            )  # fmt: skip
            sums.append((last - first).sum(-1))
        needed += groups * torch.cat(sums)
    return needed


def _bounds(
    position: Tensor, n: int, kernel: Tensor, stride: Tensor, rule: Neighborhood, axis: int
) -> tuple[Tensor, Tensor]:
    """What kernels take for the first and one-past-last key of queries ``[windows, queries]``.

    A window that fills a ring is all of it, wherever it begins.
    """
    causal, boundary = rule.is_causal[axis], rule.boundary[axis]
    start, end = window_bounds(position, n, kernel, stride, causal, boundary)
    if boundary == "circular":
        start, end = start.where(kernel != n, 0), end.where(kernel != n, n)
    return start, end


def _count(
    layer: Layer,
    axis: int,
    windows: Sequence[tuple[int, int]],
    needed: Tensor,
    q_block: int,
    kv_block: int,
    warpgroups: int,
) -> Axis:
    """Count what one axis contributes, for every ``(kernel_size, stride)`` of ``windows``.

    Args:
        layer, axis, windows: what is counted.
        needed: what :func:`_needed` says of them.
        q_block, kv_block, warpgroups: the tiles, as in :class:`Tiling`.
    """
    most = max(1, _AT_A_TIME * q_block // layer.queries[axis])
    if len(windows) > most:
        parts = [
            _count(
                layer, axis, windows[i : i + most], needed[i : i + most], q_block, kv_block,
                warpgroups,
            )
            for i in range(0, len(windows), most)
        ]  # fmt: skip
        names = (name for name in Axis._fields if name != "q_blocks")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in names
        }
        return parts[0]._replace(**joined)
    r = layer.rule.queries_per_key[axis]
    kernel, stride = torch.tensor(windows, device="cpu")[:, :, None].unbind(1)
    visited = full = most_visited = fetched = torch.zeros_like(needed)
    q_blocks = 0
    tile = q_block * warpgroups
    for (begin, end, n), groups in layer.groups(axis).items():

        def bounds(query: Tensor, begin: int = begin, end: int = end, n: int = n) -> Any:
            position = (begin + query).clamp(max=end - 1) // r
            return _bounds(position, n, kernel, stride, layer.rule, axis)

        first = torch.arange(0, end - begin, tile, device="cpu")  # of each tile
        q_blocks += groups * len(first) * warpgroups
        origin, _ = bounds(first)
        _, tile_end = bounds(first + tile - 1)
        fetched = fetched + groups * warpgroups * (-((origin - tile_end) // kv_block)).sum(-1)
        for warpgroup in range(warpgroups):
            own = first + warpgroup * q_block
            low, first_end = bounds(own)
            last_start, high = bounds(own + q_block - 1)
            count = tiling.count_blocks(
                low, last_start, first_end, high, kv_block,
                torch.zeros_like(low) if layer.aligned else origin,
            )  # fmt: skip
            visited = visited + groups * count.visited
            full = full + groups * count.full
            most_visited = torch.maximum(most_visited, count.most)
    slides = (stride[:, 0] == 1) & (not layer.rule.is_causal[axis]) & (r == 1)
    return Axis(needed, visited, full, most_visited, fetched, slides, q_blocks)


def _predict(
    layer: Layer, options: Sequence[Sequence[Sequence[tuple[int, int]]]], step: Step
) -> list[Prediction]:
    """Predict every combination of one option per axis, each with its cheapest tiles.

    Args:
        options: for each axis, a list of options. An option is a list of alternatives
            ``(kernel_size, stride)``, of which the cheapest counts; all options of an axis have
            the same number of alternatives.
        step: is called with what is being done.
    """
    kernel = layer.kernel()
    device, rank, all_pairs = layer.device, layer.rank, layer.all_pairs
    sizes = [
        torch.tensor([option[0][0] for option in axis], dtype=torch.float64, device="cpu")
        for axis in options
    ]
    size = outer(sizes)  # tokens of each window: costs are compared per token of the window
    largest = float(size.max())
    windows_of = [tuple(itertools.chain(*axis)) for axis in options]
    needed_of = [_needed(layer, axis, windows) for axis, windows in enumerate(windows_of)]

    @cache
    def cheapest(
        axis: int, q_block: int, kv_block: int, warpgroups: int
    ) -> tuple[Axis, list[int], float]:
        """Each option's cheapest alternative: counts, indices, and the fewest blocks per token."""
        alternatives = len(options[axis][0])
        counts = _count(
            layer, axis, windows_of[axis], needed_of[axis], q_block, kv_block, warpgroups
        )
        cost = counts.visited + device.masking * (counts.visited - counts.full)
        chosen = cost.view(-1, alternatives).argmin(1)
        index = chosen + alternatives * torch.arange(len(chosen), device="cpu")
        found = counts.of(index)
        return found, chosen.tolist(), float((found.visited / sizes[axis]).min())

    def cut(tiles: Tiling) -> list[tuple[Axis, list[int], float]]:
        """What :func:`cheapest` says of every axis."""
        q, kv, split_axis, warpgroups = tiles
        return [cheapest(a, q[a], kv[a], warpgroups if a == split_axis else 1) for a in range(rank)]

    bounds = []
    for number, tiles in enumerate(kernel.tilings):
        step(f"counting the blocks of tile {number + 1} of {len(kernel.tilings)}")
        axes, _, fewest = zip(*cut(tiles))
        q_blocks = math.prod(axis.q_blocks for axis in axes) / largest
        bounds.append(kernel.least(number, math.prod(fewest), q_blocks))
    combinations = list(itertools.product(*(range(len(axis)) for axis in options)))
    best = torch.full([len(combinations)], math.inf, dtype=torch.float64, device="cpu")
    chosen = torch.zeros(len(combinations), dtype=torch.int64, device="cpu")
    # The most promising tilings come first, so that most of the others need not be looked at.
    for number in sorted(range(len(bounds)), key=bounds.__getitem__):
        if bounds[number] > float((best / size).max()):
            break
        step(f"comparing tiles for {len(combinations)} combinations")
        axes, *_ = zip(*cut(kernel.tilings[number]))
        cost = kernel.cost(number, axes) * (1 + _LATER * number)
        better = cost < best
        best = torch.where(better, cost, best)
        chosen.masked_fill_(better, number)

    names = "needed", "visited", "full", "most", "overhead"
    columns = {name: torch.empty_like(best) for name in names}
    windows = {}  # for each tiling and axis, the chosen window and stride of each option
    for number in chosen.unique().tolist():
        of_tiling = chosen == number
        axes, indices, _ = zip(*cut(kernel.tilings[number]))
        windows[number] = [
            [option[i] for option, i in zip(*each)] for each in zip(options, indices)
        ]
        found = [outer(each) for each in list(zip(*axes))[:4]]
        for name, column in zip(names, [*found, kernel.overhead(number, axes)]):
            columns[name][of_tiling] = column[of_tiling]

    dense_us, _ = layer.time_us(float(all_pairs))
    predictions: list[Prediction] = []
    rows = zip(combinations, chosen.tolist(), *(each.tolist() for each in columns.values()))
    for combination, number, needed, visited, full, most, overhead in rows:
        if len(predictions) % 10_000 == 0:
            step(f"prediction {len(predictions)} of {len(combinations)}")
        tiles = kernel.tilings[number]
        kernel_size, stride = zip(*(axis[i] for axis, i in zip(windows[number], combination)))
        pairs = visited * tiles.pairs
        time_us, bound_by = layer.time_us(pairs, overhead)
        predictions.append(
            Prediction(
                kernel_size=kernel_size,
                stride=stride,
                kept=needed / all_pairs,
                backend=kernel.name,
                q_tile=tiles.tile,
                kv_tile=tiles.kv_block,
                computed_over_needed=pairs / needed,
                full_blocks=full / visited,
                flop_bound=all_pairs / needed,
                tile_bound=all_pairs / pairs,
                interior_bound=math.prod(layer.shape) / (most * math.prod(tiles.kv_block)),
                time_us=time_us,
                dense_us=dense_us,
                bound_by=bound_by,
            )
        )
    return predictions
