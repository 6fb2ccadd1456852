"""What neighborhood attention can gain over dense attention, before any of it runs.

Three numbers, each below the one before it:

* by FLOPs: all pairs of tokens over the pairs that attend each other;
* by tiling: all pairs over the pairs that a kernel computes, which works in whole tiles of queries
  and boxes of keys (:func:`natten.tiling.count_boxes`);
* by roofline: predicted time of dense attention over predicted time, each the longest of its matrix
  products, its exponentials, and reading its inputs and writing its output once.

Times are of the forward pass, and lower bounds: a device's peaks are those of its data sheet.

Source of the idea: "Generalized Neighborhood Attention" (arXiv 2504.16922).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten import tiling
from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood, group_length, window_bounds

Shape = tuple[int, ...]

_SAME = 1e-9  # relative difference below which two costs are one
_CHUNK = 64  # windows counted position by position at a time


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know of a device, and how its kernels are tiled.

    Attributes:
        name: what to call it.
        tflops: matrix products, 10^12 operations a second (2 per multiply-add), in half precision.
        bandwidth: of memory, 10^12 bytes a second.
        exponentials: 10^12 a second.
        q_tile: queries in a tile.
        kv_tile: keys in a box; 1 means that a tile takes exactly the keys it needs.
        masking: what masking adds to a box that some query attends in part, as a fraction.
    """

    name: str
    tflops: float
    bandwidth: float
    exponentials: float
    q_tile: int = 128
    kv_tile: int = 64
    masking: float = 0.2  # measured on an H100: 0.13 to 0.25


# GPUs: dense bf16 and memory from data sheets; exponentials are 16 per multiprocessor and clock.
# cpu: two cores, from the constants that the tiled backend chooses its tiles by.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", tflops=989, bandwidth=3.35, exponentials=3.7),
        Device("h200", tflops=989, bandwidth=4.8, exponentials=3.7),
        Device("a100", tflops=312, bandwidth=2.04, exponentials=2.4),
        Device(
            "cpu",
            tflops=4e-3 / tiling.PRODUCT_DIM,
            bandwidth=4e-3 / tiling.COPY,
            exponentials=1e-3 / tiling.PRODUCT,
            q_tile=16,
            kv_tile=1,
            masking=0.0,  # part of the cost of an exponential
        ),
    )
}


@dataclass(frozen=True)
class Prediction:
    """What to expect of one window and stride.

    Attributes:
        kernel_size, stride: the window.
        kept: fraction of all pairs of tokens that attend each other.
        q_tile, kv_tile: the cheapest tile of queries and box of keys.
        computed_over_needed: pairs computed per pair needed; 1 is no waste.
        whole_boxes: fraction of the visited boxes that need no mask.
        flop_bound: most speed-up over dense attention that the kept pairs allow.
        tile_bound: most speed-up that the computed pairs allow.
        interior_bound: most speed-up of a single tile, the one that visits the most boxes; it lies
            away from the borders, where windows stop moving.
        time_us, dense_us: roofline of this problem and of dense attention, microseconds.
        bound_by: what takes longest: "products", "exponentials" or "memory".
    """

    kernel_size: Shape
    stride: Shape
    kept: float
    q_tile: Shape
    kv_tile: Shape
    computed_over_needed: float
    whole_boxes: float
    flop_bound: float
    tile_bound: float
    interior_bound: float
    time_us: float
    dense_us: float
    bound_by: str

    @property
    def is_whole(self) -> bool:
        """Whether no visited box needs a mask."""
        return self.whole_boxes == 1

    @property
    def speedup(self) -> float:
        """Predicted speed-up over dense attention."""
        return self.dense_us / self.time_us

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "is_whole": self.is_whole, "speedup": self.speedup}


@dataclass(frozen=True)
class Layer:
    """An attention layer whose window and stride may vary.

    Build it with :meth:`create`, which checks what it gets.
    """

    shape: Shape
    kernel_size: Shape
    stride: Shape
    dilation: Shape
    is_causal: tuple[bool, ...]
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
        shape: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
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
        rank = len(shape)
        rule = Neighborhood.create(rank, kernel_size, stride, dilation, is_causal)
        rule.check(shape)
        for name, number in (
            ("batch", batch), ("heads", heads), ("head_dim", head_dim), ("itemsize", itemsize)
        ):  # fmt: skip
            if number < 1:
                raise ArgumentError(f"`{name}` must be at least 1, got {number}.")
        for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
            if tile is not None and (len(tile) != rank or min(tile) < 1):
                raise ArgumentError(
                    f"`{name}` must be {rank} numbers of at least 1, one per axis, got {tile!r}."
                )
        return cls(
            shape=tuple(shape),
            kernel_size=rule.kernel_size,
            stride=rule.stride,
            dilation=rule.dilation,
            is_causal=rule.is_causal,
            device=device,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            itemsize=itemsize,
            q_tile=None if q_tile is None else tuple(q_tile),
            kv_tile=None if kv_tile is None else tuple(kv_tile),
            aligned=aligned,
        )

    @property
    def tokens(self) -> int:
        """Tokens of one batch entry."""
        return math.prod(self.shape)

    def time_us(self, pairs: float, masked: float = 0.0) -> tuple[float, str]:
        """Roofline of ``pairs`` computed per head, of which ``masked`` are masked; what bounds it.

        Microseconds.
        """
        matrices, device = self.batch * self.heads, self.device
        work = matrices * (pairs + device.masking * masked)
        moved = 4 * matrices * self.tokens * self.head_dim * self.itemsize
        times = {
            "products": 4 * work * self.head_dim / device.tflops,
            "exponentials": matrices * pairs / device.exponentials,
            "memory": moved / device.bandwidth,
        }
        bound_by = max(times, key=lambda kind: times[kind])
        return times[bound_by] / 1e6, bound_by


def simulate(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    **options: Any,
) -> Prediction:
    """Predict one problem.

    Args:
        shape: token layout, one to three axis lengths.
        kernel_size, stride, dilation, is_causal: as in ``na1d``, ``na2d`` and ``na3d``.
        device: a :class:`Device`, or the name of one of ``DEVICES``: "h100", "h200", "a100", "cpu".
        batch, heads, head_dim: of the attention layer; 1, 1 and 128.
        itemsize: bytes of a number, 2 for half precision.
        q_tile, kv_tile: tile of queries and box of keys, one size per axis; None tries all powers
            of two that multiply to the device's numbers and takes the cheapest.
        aligned: whether boxes lie on a fixed grid, as in kernels that reorder tokens first.
            Our kernels' boxes start where a tile's first window starts.

    Raises:
        ArgumentError: an argument has a type or value that is not allowed.

    Example:
        >>> video = simulate((30, 48, 80), (18, 24, 24), heads=24)
        >>> f"{video.flop_bound:.1f} by FLOPs, {video.tile_bound:.1f} by tiling"
        '11.1 by FLOPs, 7.2 by tiling'
        >>> simulate((30, 48, 80), (18, 24, 24), (16, 8, 8), heads=24).is_whole
        True
    """
    layer = Layer.create(shape, kernel_size, stride, dilation, is_causal, **options)
    return _predict(layer, [[[pair]] for pair in zip(layer.kernel_size, layer.stride)])[0]


def simulate_strides(
    shape: Sequence[int], kernel_size: int | Sequence[int], **options: Any
) -> list[Prediction]:
    """Predict every stride, finest first: the fewer queries share a window, the finer.

    Takes the arguments of :func:`simulate`, but for ``stride``.

    Example:
        >>> len(simulate_strides((16, 44, 80), (16, 8, 12)))
        1536
    """
    layer = Layer.create(shape, kernel_size, **options)
    strides = [[[(k, s)] for s in range(1, k + 1)] for k in layer.kernel_size]
    return sorted(_predict(layer, strides), key=lambda p: (math.prod(p.stride), p.time_us))


def recommended_strides(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Of one window's predictions, finest first, those that no finer stride equals in speed.

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
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    near: float = 0.25,
    **options: Any,
) -> list[Prediction]:
    """Windows and strides near a wish that are Pareto-best in kept pairs and predicted time.

    Windows differ from the wish by at most the fraction ``near`` on each axis. Strides are the
    wish, powers of two, and sizes of given tiles, up to the wish or half the window, whichever is
    larger.

    Args:
        near: how far from ``kernel_size`` a window may be, as a fraction.
        shape, kernel_size, stride, dilation, is_causal, options: as in :func:`simulate`.

    Returns:
        Fastest first; each keeps more pairs than all before it, and none that keeps as many is
        predicted faster.

    Example:
        >>> front = recommend((256, 256), 80, 16, near=0.1, heads=24)
        >>> front[0].kept < front[-1].kept and front[0].time_us < front[-1].time_us
        True
    """
    if not 0 <= near < 1:
        raise ArgumentError(f"`near` must be at least 0 and below 1, got {near!r}.")
    layer = Layer.create(shape, kernel_size, stride, dilation, is_causal, **options)
    options_per_axis = []
    for axis, (length, d, k) in enumerate(zip(layer.shape, layer.dilation, layer.kernel_size)):
        wish = layer.stride[axis]
        sizes = {wish, *(1 << i for i in range(k.bit_length()))}
        sizes |= {tile[axis] for tile in (layer.q_tile, layer.kv_tile) if tile is not None}
        low, high = math.ceil(k * (1 - near)), min(int(k * (1 + near)), length // d)
        options_per_axis.append(
            [
                [(window, min(s, window, max(wish, window // 2))) for s in sorted(sizes)]
                for window in range(low, high + 1)
            ]
        )
    front: list[Prediction] = []
    for prediction in sorted(_predict(layer, options_per_axis), key=lambda p: (p.time_us, -p.kept)):
        if not front or prediction.kept > front[-1].kept * (1 + _SAME):
            front.append(prediction)
    return front


# --- counting ---


class _Axis(NamedTuple):
    """Counts of one axis for a tile size and a box size; one entry per window.

    float64: counts of three axes are multiplied.
    """

    needed: Tensor
    visited: Tensor
    whole: Tensor
    most: Tensor


def _needed(n: int, kernel_size: Tensor, stride: Tensor, is_causal: bool) -> Tensor:
    """Pairs that attend each other among ``n`` positions, for each window ``[windows, 1]``."""
    if not is_causal:
        return n * kernel_size[:, 0]
    position = torch.arange(n)
    sums = []
    for k, s in zip(kernel_size.split(_CHUNK), stride.split(_CHUNK)):
        start, end = window_bounds(position, n, k, s, is_causal)
        sums.append((end - start).sum(-1))
    return torch.cat(sums)


def _count(
    length: int,
    dilation: int,
    is_causal: bool,
    windows: Sequence[tuple[int, int]],
    tile: int,
    box: int,
    aligned: bool,
) -> _Axis:
    """Count what one axis contributes, for every ``(kernel_size, stride)`` of ``windows``."""
    kernel, stride = torch.tensor(windows)[:, :, None].unbind(1)
    zero = torch.zeros(len(windows), dtype=torch.float64)
    total = _Axis(zero, zero, zero, zero)
    for group, groups in tiling.group_kinds(length, dilation):
        n = group_length(length, dilation, group)
        first = torch.arange(0, n, tile)
        last = (first + tile - 1).clamp(max=n - 1)
        low, end = window_bounds(first, n, kernel, stride, is_causal)
        start, high = window_bounds(last, n, kernel, stride, is_causal)
        count = tiling.count_boxes(low, start, end, high, box, aligned)
        total = _Axis(
            total.needed + groups * _needed(n, kernel, stride, is_causal),
            total.visited + groups * count.visited,
            total.whole + groups * count.whole,
            torch.maximum(total.most, count.most),
        )
    return total


def _tile_shapes(count: int, lengths: Sequence[int]) -> list[Shape]:
    """Powers of two, one per axis, whose product is ``count``; no axis is far longer than needed.

    If the layout has too few tokens, the last axis is as long as it must be.
    """
    most = [max(1, 1 << (n - 1).bit_length()) for n in lengths]
    most[-1] = max(most[-1], count // math.prod(most[:-1]))
    sizes = [[1 << i for i in range(count.bit_length()) if 1 << i <= m] for m in most]
    return [shape for shape in itertools.product(*sizes) if math.prod(shape) == count]


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """The product of one entry per axis, for every combination, flat."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[:, None] * vector).flatten()
    return product


def _predict(
    layer: Layer, options: Sequence[Sequence[Sequence[tuple[int, int]]]]
) -> list[Prediction]:
    """Predict every combination of one option per axis, each with its cheapest tiles.

    Args:
        options: per axis, a list of options; an option is ``(kernel_size, stride)`` alternatives
            of which the cheapest counts. Options of an axis have as many alternatives.
    """
    lengths = [group_length(n, d, 0) for n, d in zip(layer.shape, layer.dilation)]
    device, rank = layer.device, len(lengths)
    queries = [layer.q_tile] if layer.q_tile else _tile_shapes(device.q_tile, lengths)
    keys = [layer.kv_tile] if layer.kv_tile else _tile_shapes(device.kv_tile, lengths)

    @cache
    def cheapest(axis: int, tile: int, box: int) -> tuple[_Axis, list[int]]:
        """Counts and index of the cheapest alternative of each option."""
        alternatives = len(options[axis][0])
        counts = _count(
            layer.shape[axis], layer.dilation[axis], layer.is_causal[axis],
            tuple(itertools.chain(*options[axis])), tile, box, layer.aligned,
        )  # fmt: skip
        cost = counts.visited + device.masking * (counts.visited - counts.whole)
        chosen = cost.view(-1, alternatives).argmin(1)
        index = chosen + alternatives * torch.arange(len(chosen))
        return _Axis(*(x[index] for x in counts)), chosen.tolist()

    tilings = list(itertools.product(queries, keys))
    best: dict[str, Tensor] = {}
    for number, (query, key) in enumerate(tilings):
        axes = [cheapest(axis, query[axis], key[axis])[0] for axis in range(rank)]
        needed, visited, whole, most = (_outer(each) for each in zip(*axes))
        row = {
            "cost": (visited + device.masking * (visited - whole)) * math.prod(query + key),
            "needed": needed,
            "visited": visited,
            "whole": whole,
            "most": most,
            "tiling": torch.full_like(visited, number, dtype=torch.int64),
        }
        if best:
            better = row["cost"] < best["cost"] * (1 - _SAME)
            row = {name: torch.where(better, row[name], best[name]) for name in best}
        best = row

    dense_us, _ = layer.time_us(float(layer.tokens) ** 2)
    predictions = []
    combinations = itertools.product(*(range(len(axis)) for axis in options))
    columns = (best[name].tolist() for name in ("needed", "visited", "whole", "most", "tiling"))
    for combination, needed, visited, whole, most, number in zip(combinations, *columns):
        query, key = tilings[number]
        box = math.prod(query + key)
        window = [
            options[axis][i][cheapest(axis, query[axis], key[axis])[1][i]]
            for axis, i in enumerate(combination)
        ]
        kernel, stride = zip(*window)
        time_us, bound_by = layer.time_us(visited * box, (visited - whole) * box)
        predictions.append(
            Prediction(
                kernel_size=kernel,
                stride=stride,
                kept=needed / layer.tokens**2,
                q_tile=query,
                kv_tile=key,
                computed_over_needed=visited * box / needed,
                whole_boxes=whole / visited,
                flop_bound=layer.tokens**2 / needed,
                tile_bound=layer.tokens**2 / (visited * box),
                interior_bound=layer.tokens / (most * math.prod(key)),
                time_us=time_us,
                dense_us=dense_us,
                bound_by=bound_by,
            )
        )
    return predictions
