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
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..._numbers import real
from ...errors import ArgumentError
from ...neighborhood import fit_window
from .counting import sums_positions
from .layer import DEVICES, Device, Layer
from .predicting import Prediction, Step, predict

__all__ = [
    "DEVICES",
    "MOST_COMBINATIONS",
    "Device",
    "Prediction",
    "recommend",
    "recommended_strides",
    "simulate",
    "simulate_strides",
]

_SAME = 1e-9  # relative difference below which two times are one
# What takes about half a minute on one core.
MOST_COMBINATIONS = 1 << 20  # of strides, or of windows, that are predicted at once
_MOST_COUNTED = 1 << 28  # tiles of an axis, for each of its strides or windows


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
    return predict(layer, [[[window]] for window in windows], lambda name: None)[0]


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
    return sorted(predict(layer, strides, step), key=lambda p: (math.prod(p.stride), p.time_us))


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
        tiles += layer.queries[axis] if sums_positions(layer, axis) else 0
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
    found = predict(layer, options_per_axis, step)
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
