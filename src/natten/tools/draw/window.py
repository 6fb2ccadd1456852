"""Pictures of what one query attends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._numbers import entries, integer
from ...errors import ArgumentError
from ...neighborhood import Boundary, Neighborhood, window_mask
from ..layouts import query_layout, words
from .canvas import (
    ATTENDED,
    INK,
    LINE,
    PAD,
    QUERY,
    TOKEN,
    Key,
    Panel,
    Picture,
    Rect,
    Text,
    compose,
    square,
)

MAX_TOKENS = 16384
_MAX_WIDTH = 1000  # width of a row of slices, and of a layout as long as tokens can still shrink
_FAINT, _STRONG = (200, 222, 252), (22, 78, 170)  # the two ends of the scale of weights
_FRAME = 1.5  # thickness of a frame around several squares

Sizes = int | Sequence[int]
LEGEND = (
    Key(QUERY, False, "query"),
    Key(ATTENDED, False, "attended by the query"),
    Key(ATTENDED, True, "attended, and a query with the same window"),
)
PART = Key(TOKEN, False, "the part of the layout that queries are", outlined=True)


def draw_neighborhood(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    boundary: Boundary = "shift",
    queries_per_key: Sizes = 1,
    query_offset: Sizes | None = None,
    query_shape: Sizes | None = None,
    query: Sizes | None = None,
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
    legend: bool = False,
    path: str | Path | None = None,
) -> str:
    """Draw the tokens, one query among them, and what it attends.

    The query is orange, and the tokens that it attends are blue. Where queries share windows, those
    with the same window carry an orange frame. Three axes become slices along the first one.

    There is one square for each query of the whole layout. Where queries are finer than keys, the
    squares of one key stand close together. A dark frame is around queries that are a part.

    Args:
        shape: token layout of the keys, one to three axis lengths.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
            ``na1d``, ``na2d`` and ``na3d``.
        query_shape: token layout of the queries; None means all from ``query_offset`` on.
        query: position of the query among the queries; None means the middle.
        weights: how strongly the query attends each slot of its window, ``[window tokens]``:
            one row of what ``na*d_qk`` followed by softmax returns. Larger weights are darker.
        title, caption: a line above and lines below the tokens.
        legend: whether to explain the colors below.
        path: also write the picture to this file, ``.svg`` or (with matplotlib) ``.png``.

    Returns:
        The picture, a complete SVG document.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> draw_neighborhood((8, 8), kernel_size=3, dilation=2, query=(0, 5))[:4]
        '<svg'
    """
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    drawn = layout(shape, window, query_shape)
    panel = window_panel(drawn, position(query, drawn.queries), weights, title, caption)
    return finish(compose([panel], drawn.legend if legend else ()), path)


def draw_examples() -> str:
    """Draw the picture of the README: four windows side by side, with a legend.

    Example:
        >>> draw_examples().count("Strided")
        2
    """

    def panel(
        title: str, caption: str, at: tuple[int, int] = (5, 5), stride: int = 1, dilation: int = 1
    ) -> Panel:
        drawn = layout((11, 11), (5, stride, dilation))
        return window_panel(drawn, at, title=title, caption=caption)

    panels = [
        panel("Sliding window", "kernel_size=5\ncentered on its query"),
        panel("At a border", "kernel_size=5\nshifts, never shrinks", at=(1, 9)),
        panel("Dilated", "kernel_size=5, dilation=2\ngaps between tokens", dilation=2),
        panel("Strided", "kernel_size=5, stride=3\nnine queries share it", stride=3),
    ]
    return compose(panels, LEGEND).svg()


def finish(picture: Picture, path: str | Path | None) -> str:
    """The picture as SVG, also written to ``path``."""
    if path is not None:
        picture.save(path)
    return picture.svg()


class Drawn(NamedTuple):
    """The windows of a picture, and the token layouts of keys and of queries."""

    rule: Neighborhood
    keys: tuple[int, ...]
    queries: tuple[int, ...]

    @property
    def squares(self) -> tuple[int, ...]:
        """The layout of a picture's squares: all the queries that there are for these keys."""
        return tuple(n * r for n, r in zip(self.keys, self.rule.queries_per_key))

    @property
    def shares(self) -> bool:
        """Whether queries share windows other than at the ends of an axis."""
        return max(self.rule.stride) > 1 or max(self.rule.queries_per_key) > 1

    @property
    def legend(self) -> tuple[Key, ...]:
        """What the colors of :func:`window_panel` mean."""
        keys = LEGEND if self.shares else LEGEND[:2]
        return keys if self.rule.query_offset is None else (*keys, PART)

    def grid(self) -> Grid:
        """Where the squares lie."""
        return Grid(self.squares, per_key=self.rule.queries_per_key)

    def of_keys(self, axis: int, marks: Tensor) -> Tensor:
        """What is said of each key of an axis, for each square."""
        return marks.repeat_interleave(self.rule.queries_per_key[axis])

    def of_queries(self, axis: int, marks: Tensor) -> Tensor:
        """Which queries of an axis are marked, for each square, bool."""
        squares = torch.zeros(self.squares[axis], dtype=torch.bool, device="cpu")
        squares[self.rule.offset[axis] :][: len(marks)] = marks
        return squares

    def part(self, grid: Grid) -> list[Rect | Text]:
        """A frame around the queries, if they are a part of the layout."""
        if self.rule.query_offset is None:
            return []
        axes = (torch.ones(n, dtype=torch.bool, device="cpu") for n in self.queries)
        return grid.outline(every_axis([self.of_queries(*each) for each in enumerate(axes)]))

    def __str__(self) -> str:
        rule = self.rule
        parts = [
            f"kernel_size {rule.kernel_size}, stride {rule.stride}, dilation {rule.dilation}",
            f"is_causal {rule.is_causal}",
            *words(rule, self.queries),
        ]
        return ", ".join(parts)


def layout(
    shape: Sizes,
    window: tuple[Any, ...],
    query_shape: Sizes | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Drawn:
    """The windows and the layouts, checked; ``window`` is as in :meth:`Neighborhood.create`."""
    lengths = integers("shape", shape)
    rule = Neighborhood.create(len(lengths), *window)
    squares = math.prod(n * r for n, r in zip(lengths, rule.queries_per_key))
    if min(lengths) < 1 or squares > max_tokens:
        raise ArgumentError(
            "`shape` must have at least 1 token per axis and, to be drawn, at most "
            f"{max_tokens} in all, times `queries_per_key`, got {lengths} times "
            f"{rule.queries_per_key}."
        )
    return Drawn(rule, lengths, query_layout(rule, lengths, query_shape))


def position(query: Sizes | None, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """A query of the layout ``lengths``, by default the middle."""
    at = tuple(n // 2 for n in lengths) if query is None else integers("query", query)
    if len(at) != len(lengths) or not all(0 <= x < n for x, n in zip(at, lengths)):
        raise ArgumentError(f"`query` must be one of the layout {lengths}, got {query!r}.")
    return at


def integers(name: str, value: Sizes) -> tuple[int, ...]:
    """``value`` as one to three integers."""
    given = entries(value)
    numbers = tuple(integer(e) for e in ((value,) if given is None else given))
    if not 1 <= len(numbers) <= 3 or None in numbers:
        raise ArgumentError(f"`{name}` must be one to three integers, got {value!r}.")
    return numbers


def axis_masks(drawn: Drawn) -> list[Tensor]:
    """For each axis, which query attends which key along it, bool ``[queries, keys]``.

    A query attends a key where all of them are true.
    """
    rule = drawn.rule
    axes = zip(
        rule.kernel_size, rule.stride, rule.dilation, rule.is_causal, rule.boundary,
        rule.queries_per_key, rule.query_offset or (None,) * rule.rank,
    )  # fmt: skip
    rules = [Neighborhood.create(1, *each) for each in axes]
    lengths = zip(drawn.queries, drawn.keys)
    return [window_mask(each, (n,), (keys,)) for each, (n, keys) in zip(rules, lengths)]


def every_axis(vectors: Sequence[Tensor]) -> list[bool]:
    """For each token, in row-major order, whether it is marked along every axis."""
    marked = torch.ones(1, dtype=torch.bool, device="cpu")
    for vector in vectors:
        marked = (marked[:, None] & vector).flatten()
    return marked.tolist()


def window_panel(
    drawn: Drawn,
    at: tuple[int, ...],
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
) -> Panel:
    """The tokens, the query at ``at``, and what it attends."""
    masks = axis_masks(drawn)
    rows = [mask[x] for mask, x in zip(masks, at)]
    attended = every_axis([drawn.of_keys(axis, row) for axis, row in enumerate(rows)])
    same = [(mask == row).all(1) for mask, row in zip(masks, rows)]
    same_window = every_axis([drawn.of_queries(axis, each) for axis, each in enumerate(same)])
    shades = _shades(weights, drawn, at)
    query = 0
    for x, offset, length in zip(at, drawn.rule.offset, drawn.squares):
        query = query * length + offset + x

    def token(index: int) -> tuple[str, bool]:
        if shades is not None:
            return shades[index], index == query
        if index == query:
            return QUERY, False
        shared = same_window[index] and drawn.shares
        return ATTENDED if attended[index] else TOKEN, shared

    grid = drawn.grid()
    parts: list[Rect | Text] = [
        square(*grid.place(i), grid.cell, *token(i)) for i in range(len(attended))
    ]
    parts += drawn.part(grid)
    description = f"{title or 'Neighborhood'}: {drawn}; query {at} of {drawn.queries}"
    return grid.panel(parts, title, caption, description)


class Grid:
    """Where squares lie: in a row, in a plane, or in slices side by side that wrap.

    With ``per_key`` above 1, squares of one key stand close together.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        max_width: int = _MAX_WIDTH,
        min_step: int = 7,
        per_key: tuple[int, ...] | None = None,
    ) -> None:
        missing = (1,) * (3 - len(lengths))
        self.depth, self.rows, self.columns = missing + lengths
        self.per_key = missing + (per_key or (1,) * len(lengths))
        self.step = max(min_step, min(20, max_width // max(self.rows, self.columns)))
        self.cell = self.step - round(self.step * 0.15)
        self.between = 2 * (self.step - self.cell) if max(self.per_key) > 1 else 0
        self.slices = len(lengths) == 3
        self.top = LINE if self.slices else 0  # height of a slice's own label
        width = self._edge(self.columns - 1, 2) + self.cell
        height = self.top + self._edge(self.rows - 1, 1) + self.cell
        self.across = max(1, min(self.depth, (_MAX_WIDTH + PAD) // (width + PAD)))
        self.slice = width + PAD, height + PAD
        self.width = self.across * self.slice[0] - PAD
        self.height = -(-self.depth // self.across) * self.slice[1] - PAD

    def _edge(self, x: int, axis: int) -> int:
        """Where square ``x`` of an axis starts."""
        return x * self.step + x // self.per_key[axis] * self.between

    def corner(self, z: int) -> tuple[int, int]:
        """The left and top edge of the tokens of slice ``z``."""
        return z % self.across * self.slice[0], z // self.across * self.slice[1] + self.top

    def place(self, index: int) -> tuple[int, int]:
        """The left and top edge of a token, given by its index in row-major order."""
        left, top = self.corner(index // (self.rows * self.columns))
        y, x = index // self.columns % self.rows, index % self.columns
        return left + self._edge(x, 2), top + self._edge(y, 1)

    def outline(self, inside: Sequence[bool]) -> list[Rect | Text]:
        """A frame around squares in each slice, in the middle of the gap that neighbors share."""
        frames: list[Rect | Text] = []
        out = (self.step - self.cell + _FRAME) / 2
        marked = [i for i, is_inside in enumerate(inside) if is_inside]
        for _, group in itertools.groupby(marked, lambda i: i // (self.rows * self.columns)):
            squares = list(group)
            (left, top), (right, bottom) = self.place(squares[0]), self.place(squares[-1])
            size = right - left + self.cell + 2 * out, bottom - top + self.cell + 2 * out
            frames.append(Rect(left - out, top - out, *size, "none", 3, INK, _FRAME))
        return frames

    def panel(
        self, parts: Sequence[Rect | Text], title: str, caption: str, description: str
    ) -> Panel:
        """``parts`` with a title above, a caption below, and the names of slices."""
        lines = [
            Text(0, 0, line, color=INK if number == 0 else Text._field_defaults["color"])
            for number, line in enumerate(caption.splitlines())
        ]
        if self.slices:
            for z in range(self.depth):
                x, y = self.corner(z)
                key, query = divmod(z, self.per_key[0])
                name = f"slice {key}, query {query}" if self.per_key[0] > 1 else f"slice {key}"
                parts = [*parts, Text(x, y - 6, name, 11)]
        top = LINE + 10 if title else 0
        moved = [part._replace(y=part.y + top) for part in parts]
        if title:
            moved.insert(0, Text(0, LINE - 4, title, 14, INK, 700))
        bottom = top + self.height
        moved += [line._replace(y=bottom + 3 + (n + 1) * LINE) for n, line in enumerate(lines)]
        bottom += len(lines) * LINE + 9 if lines else 0
        texts = [each.width for each in moved if isinstance(each, Text)]
        return Panel(moved, max([self.width, *texts]), bottom, description)


def _shades(weights: Tensor | None, drawn: Drawn, query: tuple[int, ...]) -> list[str] | None:
    """The color of each square; the token with the largest weight is the darkest."""
    if weights is None:
        return None
    rule, layouts = drawn.rule, (drawn.queries, drawn.keys)
    if not isinstance(weights, Tensor) or weights.shape != (rule.window_tokens,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights)
        raise ArgumentError(
            f"`weights` must be a tensor of shape ({rule.window_tokens},), one weight per slot of "
            f"the window, got {got}."
        )
    slots = rule.window_tokens_of(*layouts)[query].tolist()
    valid = rule.attended_slots(*layouts)[query]
    strength = weights.detach().to("cpu", torch.float64)
    if not bool((strength[valid] >= 0).all()) or not math.isfinite(float(strength[valid].sum())):
        raise ArgumentError("`weights` must be finite and not negative.")
    strength = strength / strength[valid].max().clamp(min=1e-30)
    shades = {
        slot: _mix(share)
        for slot, share, is_attended in zip(slots, strength.tolist(), valid.tolist())
        if is_attended
    }
    key = torch.zeros(1, dtype=torch.int64, device="cpu")  # of each square
    for axis, length in enumerate(drawn.keys):
        own = drawn.of_keys(axis, torch.arange(length, device="cpu"))
        key = (key[:, None] * length + own).flatten()
    return [shades.get(each, TOKEN) for each in key.tolist()]


def _mix(share: float) -> str:
    """The color at ``share`` of the way from the faintest to the strongest."""
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(_FAINT, _STRONG))
