"""What to expect of windows and strides, each with its cheapest tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from .counting import count_axis, needed_pairs
from .kernels import Axis, Shape, Tiling, outer
from .layer import Layer

_LATER = (
    1e-12  # a tiling's position adds this to its cost, so that the first of equal ones is taken
)

Step = Callable[[str], None]


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


def predict(
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
    needed_of = [needed_pairs(layer, axis, windows) for axis, windows in enumerate(windows_of)]

    @cache
    def cheapest(
        axis: int, q_block: int, kv_block: int, warpgroups: int
    ) -> tuple[Axis, list[int], float]:
        """Each option's cheapest alternative: counts, indices, and the fewest blocks per token."""
        alternatives = len(options[axis][0])
        counts = count_axis(
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
