"""Pictures of neighborhoods, as SVG.

Which tokens are marked comes from :mod:`natten.neighborhood`, so a picture shows what the
operators compute. ``python -m natten.draw PATH`` writes the picture of the README.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from natten.errors import ArgumentError
from natten.neighborhood import Neighborhood, window_mask

CELL = 17  # side of a token
STEP = 20  # distance between tokens
PAD = 20  # around the picture and between its panels
LINE = 17  # height of a line of text

CARD, BORDER = "#ffffff", "#dbe2ec"
INK, QUIET_INK = "#1e293b", "#64748b"
TOKEN, ATTENDED, QUERY = "#e8edf4", "#5b9df5", "#f2762e"
FAINT, STRONG = (200, 222, 252), (22, 78, 170)  # ends of the scale of weights


def draw_neighborhood(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    query: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
    path: str | Path | None = None,
) -> str:
    """Draw the tokens, one query among them, and what it attends.

    The query is orange, what it attends is blue. With a stride above 1 the queries that have the
    same window carry an orange frame. Three axes become a row of slices.

    Args:
        shape: token layout, one to three axis lengths.
        kernel_size, stride, dilation, is_causal: as in ``na1d``, ``na2d`` and ``na3d``.
        query: position of the query; None is the middle.
        weights: how strongly the query attends each slot of its window, ``[window tokens]``:
            one row of what ``na*d_qk`` followed by softmax returns. They become the shade.
        title, caption: a line above and lines below the tokens.
        path: also write the picture to this file.

    Returns:
        The picture, a complete SVG document.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> draw_neighborhood((8, 8), kernel_size=3, dilation=2, query=(0, 5))[:4]
        '<svg'
    """
    panel = _panel(shape, kernel_size, stride, dilation, is_causal, query, weights, title, caption)
    svg = _document([panel])
    if path is not None:
        Path(path).write_text(svg, encoding="utf-8")
    return svg


def draw_examples() -> str:
    """The picture of the README: four windows side by side, with a legend."""
    grid = (11, 11)
    panels = [
        _panel(grid, 5, title="Sliding window", caption="kernel_size=5\ncentered on its query"),
        _panel(
            grid,
            5,
            query=(1, 9),
            title="At a border",
            caption="kernel_size=5\nshifts, never shrinks",
        ),
        _panel(
            grid,
            5,
            dilation=2,
            title="Dilated",
            caption="kernel_size=5, dilation=2\ngaps between tokens",
        ),
        _panel(
            grid,
            5,
            stride=3,
            title="Strided",
            caption="kernel_size=5, stride=3\nnine queries share it",
        ),
    ]
    legend = [
        (QUERY, False, "query"),
        (ATTENDED, False, "attended by the query"),
        (ATTENDED, True, "attended, and a query with the same window"),
    ]
    return _document(panels, legend)


@dataclass(frozen=True)
class _Panel:
    """Tokens with text above and below; ``body`` starts at the origin."""

    body: str
    width: int
    height: int
    description: str


def _panel(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    query: int | Sequence[int] | None = None,
    weights: Tensor | None = None,
    title: str = "",
    caption: str = "",
) -> _Panel:
    lengths = _integers("shape", shape)
    if not all(length >= 1 for length in lengths):
        raise ArgumentError(f"`shape` must have at least 1 token per axis, got {lengths}.")
    rule = Neighborhood.create(len(lengths), kernel_size, stride, dilation, is_causal)
    rule.check(lengths)
    at = tuple(n // 2 for n in lengths) if query is None else _integers("query", query)
    if len(at) != len(lengths) or not all(0 <= x < n for x, n in zip(at, lengths)):
        raise ArgumentError(f"`query` must be a token of the layout {lengths}, got {query!r}.")

    mask = window_mask(rule, lengths, lengths)
    token = 0
    for x, n in zip(at, lengths):
        token = token * n + x
    attended = mask[token]
    same_window = (mask == attended).all(1) & (max(rule.stride) > 1)
    shades = _shades(weights, rule, lengths, at)

    depth, height, width = (1,) * (3 - len(lengths)) + lengths
    slice_width = width * STEP - (STEP - CELL)
    top = LINE + 10 if title else 0
    parts = [_text(0, LINE - 4, title, 14, INK, "600")] if title else []
    for index in range(depth * height * width):
        z, y, x = index // (height * width), index // width % height, index % width
        left = z * (slice_width + PAD) + x * STEP
        is_query = index == token
        if shades is not None:
            fill, framed = shades.get(index, TOKEN), is_query
        else:
            fill = QUERY if is_query else ATTENDED if attended[index] else TOKEN
            framed = bool(same_window[index]) and not is_query
        parts.append(_square(left, top + y * STEP, fill, framed))
    bottom = top + height * STEP
    for number, line in enumerate(caption.splitlines()):
        ink = INK if number == 0 else QUIET_INK
        parts.append(_text(0, bottom + (number + 1) * LINE, line, 12, ink))
    bottom += (len(caption.splitlines()) * LINE + 6) if caption else -(STEP - CELL)
    description = (
        f"{title or 'Neighborhood'}: kernel_size {rule.kernel_size}, stride {rule.stride}, "
        f"dilation {rule.dilation}, is_causal {rule.is_causal}; query {at} of {lengths} tokens"
    )
    return _Panel("\n".join(parts), depth * (slice_width + PAD) - PAD, bottom, description)


def _integers(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    entries = tuple(value) if isinstance(value, Sequence) else (value,)
    if not 1 <= len(entries) <= 3 or any(type(e) is not int for e in entries):
        raise ArgumentError(f"`{name}` must be one to three integers, got {value!r}.")
    return entries


def _shades(
    weights: Tensor | None, rule: Neighborhood, shape: tuple[int, ...], query: tuple[int, ...]
) -> dict[int, str] | None:
    """The color of each attended token, by its weight; the strongest is darkest."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (rule.window_tokens,):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights)
        raise ArgumentError(
            f"`weights` must be a tensor of shape ({rule.window_tokens},), one weight per slot of "
            f"the window, got {got}."
        )
    slots = rule.window_tokens_of(shape)[query].tolist()
    valid = rule.attended_slots(shape)[query]
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
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(FAINT, STRONG))


def _square(x: float, y: float, fill: str, framed: bool = False) -> str:
    if not framed:
        return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" fill="{fill}"/>'
    inner = CELL - 2.5
    return (
        f'<rect x="{x + 1.25}" y="{y + 1.25}" width="{inner}" height="{inner}" rx="3" '
        f'fill="{fill}" stroke="{QUERY}" stroke-width="2.5"/>'
    )


def _text(x: float, y: float, text: str, size: int, color: str, weight: str = "400") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}">'
        f"{escape(text)}</text>"
    )


def _document(panels: list[_Panel], legend: Sequence[tuple[str, bool, str]] = ()) -> str:
    """Panels side by side on a light card, which reads on any background."""
    parts = []
    left = PAD
    for panel in panels:
        parts.append(f'<g transform="translate({left} {PAD})">\n{panel.body}\n</g>')
        left += panel.width + PAD
    height = max(panel.height for panel in panels) + 2 * PAD
    if legend:
        x = PAD
        for fill, framed, label in legend:
            parts.append(_square(x, height, fill, framed))
            parts.append(_text(x + STEP + 4, height + 13, label, 12, QUIET_INK))
            x += STEP + 28 + 6 * len(label)
        height += CELL + PAD
    about = escape("; ".join(panel.description for panel in panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{left}" height="{height}" '
        f'viewBox="0 0 {left} {height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>{about}</title>\n"
        f'<rect x="0.5" y="0.5" width="{left - 1}" height="{height - 1}" rx="10" fill="{CARD}" '
        f'stroke="{BORDER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture of the README."""
    parser = argparse.ArgumentParser(prog="python -m natten.draw", description=main.__doc__)
    parser.add_argument("path", type=Path, help="where to write the SVG")
    path = parser.parse_args(arguments).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw_examples(), encoding="utf-8")


if __name__ == "__main__":
    main()
