"""Pictures of what one query attends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..._numbers import entries, integer
from ...errors import ArgumentError
from ...neighborhood import Neighborhood, window_mask
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

Sizes = int | Sequence[int]
LEGEND = (
    Key(QUERY, False, "query"),
    Key(ATTENDED, False, "attended by the query"),
    Key(ATTENDED, True, "attended, and a query with the same window"),
)


def draw_neighborhood(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    query: Sizes | None = None,
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
    legend: bool = False,
    path: str | Path | None = None,
) -> str:
    """Draw the tokens, one query among them, and what it attends.

    The query is orange, and the tokens that it attends are blue. With a stride above 1, queries
    with the same window carry an orange frame. Three axes become slices along the first one.

    Args:
        shape: token layout, one to three axis lengths.
        kernel_size, stride, dilation, is_causal: as in ``na1d``, ``na2d`` and ``na3d``.
        query: position of the query; None means the middle.
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
    lengths, rule = layout(shape, kernel_size, stride, dilation, is_causal)
    panel = window_panel(lengths, rule, position(query, lengths), weights, title, caption)
    shared = max(rule.stride) > 1
    picture = compose([panel], (LEGEND if shared else LEGEND[:2]) if legend else ())
    return finish(picture, path)


def draw_examples() -> str:
    """Draw the picture of the README: four windows side by side, with a legend.

    Example:
        >>> draw_examples().count("Strided")
        2
    """
    grid = (11, 11)

    def panel(
        title: str, caption: str, at: tuple[int, int] = (5, 5), stride: int = 1, dilation: int = 1
    ) -> Panel:
        rule = Neighborhood.create(2, 5, stride, dilation)
        return window_panel(grid, rule, at, title=title, caption=caption)

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


def layout(
    shape: Sizes,
    kernel_size: Sizes,
    stride: Sizes,
    dilation: Sizes,
    is_causal: bool | Sequence[bool],
    max_tokens: int = MAX_TOKENS,
) -> tuple[tuple[int, ...], Neighborhood]:
    """The axis lengths and the window, checked."""
    lengths = integers("shape", shape)
    tokens = math.prod(lengths)
    if min(lengths) < 1 or tokens > max_tokens:
        raise ArgumentError(
            "`shape` must have at least 1 token per axis and, to be drawn, at most "
            f"{max_tokens} in all, got {lengths}."
        )
    rule = Neighborhood.create(len(lengths), kernel_size, stride, dilation, is_causal)
    rule.check(lengths, lengths)
    return lengths, rule


def position(query: Sizes | None, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """A token of the layout, by default the middle."""
    at = tuple(n // 2 for n in lengths) if query is None else integers("query", query)
    if len(at) != len(lengths) or not all(0 <= x < n for x, n in zip(at, lengths)):
        raise ArgumentError(f"`query` must be a token of the layout {lengths}, got {query!r}.")
    return at


def integers(name: str, value: Sizes) -> tuple[int, ...]:
    """``value`` as one to three integers."""
    given = entries(value)
    numbers = tuple(integer(e) for e in ((value,) if given is None else given))
    if not 1 <= len(numbers) <= 3 or None in numbers:
        raise ArgumentError(f"`{name}` must be one to three integers, got {value!r}.")
    return numbers


def axis_masks(rule: Neighborhood, lengths: tuple[int, ...]) -> list[Tensor]:
    """For each axis, which query attends which key along it, bool ``[length, length]``.

    A query attends a key where all of them are true.
    """
    axes = zip(rule.kernel_size, rule.stride, rule.dilation, rule.is_causal)
    rules = [Neighborhood.create(1, *each) for each in axes]
    return [window_mask(each, (n,), (n,)) for each, n in zip(rules, lengths)]


def every_axis(vectors: Sequence[Tensor]) -> list[bool]:
    """For each token, in row-major order, whether it is marked along every axis."""
    marked = torch.ones(1, dtype=torch.bool, device="cpu")
    for vector in vectors:
        marked = (marked[:, None] & vector).flatten()
    return marked.tolist()


def window_panel(
    lengths: tuple[int, ...],
    rule: Neighborhood,
    at: tuple[int, ...],
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
) -> Panel:
    """The tokens, the query at ``at``, and what it attends."""
    masks = axis_masks(rule, lengths)
    rows = [mask[x] for mask, x in zip(masks, at)]
    attended = every_axis(rows)
    same_window = every_axis([(mask == row).all(1) for mask, row in zip(masks, rows)])
    shades = _shades(weights, rule, lengths, at)
    query = sum(x * math.prod(lengths[axis + 1 :]) for axis, x in enumerate(at))

    def token(index: int) -> tuple[str, bool]:
        if shades is not None:
            return shades.get(index, TOKEN), index == query
        if index == query:
            return QUERY, False
        shared = same_window[index] and max(rule.stride) > 1
        return ATTENDED if attended[index] else TOKEN, shared

    grid = Grid(lengths)
    parts = [square(*grid.place(i), grid.cell, *token(i)) for i in range(len(attended))]
    description = (
        f"{title or 'Neighborhood'}: kernel_size {rule.kernel_size}, stride {rule.stride}, "
        f"dilation {rule.dilation}, is_causal {rule.is_causal}; query {at} of {lengths} tokens"
    )
    return grid.panel(parts, title, caption, description)


class Grid:
    """Where tokens lie: in a row, in a plane, or in slices side by side that wrap."""

    def __init__(
        self, lengths: tuple[int, ...], max_width: int = _MAX_WIDTH, min_step: int = 7
    ) -> None:
        self.depth, self.rows, self.columns = (1,) * (3 - len(lengths)) + lengths
        self.step = max(min_step, min(20, max_width // max(self.rows, self.columns)))
        self.cell = self.step - round(self.step * 0.15)
        self.slices = len(lengths) == 3
        self.top = LINE if self.slices else 0  # height of a slice's own label
        width = self.columns * self.step - (self.step - self.cell)
        height = self.top + self.rows * self.step - (self.step - self.cell)
        self.across = max(1, min(self.depth, (_MAX_WIDTH + PAD) // (width + PAD)))
        self.slice = width + PAD, height + PAD
        self.width = self.across * self.slice[0] - PAD
        self.height = -(-self.depth // self.across) * self.slice[1] - PAD

    def corner(self, z: int) -> tuple[int, int]:
        """The left and top edge of the tokens of slice ``z``."""
        return z % self.across * self.slice[0], z // self.across * self.slice[1] + self.top

    def place(self, index: int) -> tuple[int, int]:
        """The left and top edge of a token, given by its index in row-major order."""
        left, top = self.corner(index // (self.rows * self.columns))
        y, x = index // self.columns % self.rows, index % self.columns
        return left + x * self.step, top + y * self.step

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
                parts = [*parts, Text(x, y - 6, f"slice {z}", 11)]
        top = LINE + 10 if title else 0
        moved = [part._replace(y=part.y + top) for part in parts]
        if title:
            moved.insert(0, Text(0, LINE - 4, title, 14, INK, 700))
        bottom = top + self.height
        moved += [line._replace(y=bottom + 3 + (n + 1) * LINE) for n, line in enumerate(lines)]
        bottom += len(lines) * LINE + 9 if lines else 0
        texts = [each.width for each in moved if isinstance(each, Text)]
        return Panel(moved, max([self.width, *texts]), bottom, description)


def _shades(
    weights: Tensor | None, rule: Neighborhood, shape: tuple[int, ...], query: tuple[int, ...]
) -> dict[int, str] | None:
    """The color of each attended token; the token with the largest weight is the darkest."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (rule.window_tokens,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights)
        raise ArgumentError(
            f"`weights` must be a tensor of shape ({rule.window_tokens},), one weight per slot of "
            f"the window, got {got}."
        )
    slots = rule.window_tokens_of(shape, shape)[query].tolist()
    valid = rule.attended_slots(shape, shape)[query]
    strength = weights.detach().to("cpu", torch.float64)
    if not bool((strength[valid] >= 0).all()) or not math.isfinite(float(strength[valid].sum())):
        raise ArgumentError("`weights` must be finite and not negative.")
    strength = strength / strength[valid].max().clamp(min=1e-30)
    return {
        slot: _mix(share)
        for slot, share, is_attended in zip(slots, strength.tolist(), valid.tolist())
        if is_attended
    }


def _mix(share: float) -> str:
    """The color at ``share`` of the way from the faintest to the strongest."""
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(_FAINT, _STRONG))
