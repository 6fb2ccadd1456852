"""Rectangles and text in panels, written as SVG or painted by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ArgumentError

PAD = 20  # around the picture and between its panels
LINE = 17  # height of a line of text
SCALE = 2  # pixels of a PNG per unit

CARD, BORDER = "#ffffff", "#dbe2ec"
INK, QUIET_INK = "#1e293b", "#64748b"
TOKEN, ATTENDED, QUERY = "#e8edf4", "#5b9df5", "#f2762e"
PARTLY, WASTED = "#bcd7fb", "#f4b6b6"
FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


class Rect(NamedTuple):
    """A rectangle with rounded corners; ``stroke`` is drawn inside its edge."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0
    stroke: str = "none"
    stroke_width: float = 0

    @property
    def inner(self) -> tuple[float, float, float, float, float]:
        """``x, y, width, height, radius`` of the middle of the stroke."""
        half = self.stroke_width / 2
        return (
            self.x + half,
            self.y + half,
            self.width - 2 * half,
            self.height - 2 * half,
            max(0, self.radius - half),
        )


class Text(NamedTuple):
    """A line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    size: int = 12
    color: str = QUIET_INK
    weight: int = 400

    @property
    def width(self) -> float:
        """An upper estimate, because fonts differ."""
        return 0.62 * self.size * len(self.text)


@dataclass(frozen=True)
class Panel:
    """Rectangles and texts that belong together, in coordinates of their own."""

    parts: Sequence[Rect | Text]
    width: float
    height: float
    description: str


class Key(NamedTuple):
    """An entry of a legend: a square, perhaps in a dark frame, and what it means."""

    fill: str
    framed: bool
    label: str
    outlined: bool = False


@dataclass(frozen=True)
class Picture:
    """Panels on a light card, which is readable on any background."""

    panels: Sequence[tuple[float, float, Panel]]
    width: float
    height: float

    @property
    def card(self) -> Rect:
        """The background."""
        return Rect(0, 0, self.width, self.height, CARD, 10, BORDER, 1)

    def svg(self) -> str:
        """A complete SVG document."""
        about = "; ".join(panel.description for _, _, panel in self.panels if panel.description)
        groups = [
            f'<g transform="translate({x:g} {y:g})">\n'
            + "\n".join(_rect(p) if isinstance(p, Rect) else _text(p) for p in panel.parts)
            + "\n</g>"
            for x, y, panel in self.panels
        ]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'width="{self.width:g}" height="{self.height:g}" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="{FONT}">\n'
            f"<title>{escape(about)}</title>\n"
            + "\n".join([_rect(self.card), *groups])
            + "\n</svg>\n"
        )

    def figure(self) -> Any:
        """A matplotlib figure."""
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch

        dpi = 72  # one unit is one point
        figure = Figure((self.width / dpi, self.height / dpi), dpi=SCALE * dpi)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        patches = []
        placed = [(0.0, 0.0, Panel([self.card], 0, 0, "")), *self.panels]
        for left, top, panel in placed:
            for part in panel.parts:
                if isinstance(part, Text):
                    axes.text(
                        left + part.x, top + part.y, part.text, size=part.size, color=part.color,
                        weight=part.weight,
                    )  # fmt: skip
                    continue
                x, y, width, height, radius = part.inner
                patch = FancyBboxPatch(
                    (left + x, top + y), width, height, linewidth=part.stroke_width,
                    boxstyle=f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0",
                    facecolor=part.fill, edgecolor=part.stroke,
                )  # fmt: skip
                patches.append(patch)
        axes.add_collection(PatchCollection(patches, match_original=True))
        return figure

    def save(self, path: str | Path) -> None:
        """Write the picture as SVG or PNG, as the suffix of the name says.

        Raises:
            ArgumentError: the suffix is another one, or PNG is asked for without matplotlib.
        """
        path = Path(path)
        suffix = check_suffix(path, written=".svg", painted=".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        else:
            self.figure().savefig(path)


def check_suffix(path: Path, *, written: str, painted: str) -> str:
    """The suffix of ``path``: ``written`` needs nothing, ``painted`` needs matplotlib.

    Raises:
        ArgumentError: the suffix is neither, or matplotlib is needed and not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (written, painted):
        raise ArgumentError(f"`path` must end in {written} or {painted}, got {str(path)!r}.")
    if suffix == painted and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(
            f"`path` must end in {written}, got {str(path)!r}: matplotlib, which makes {painted}, "
            "is not installed; pip install matplotlib brings it."
        )
    return suffix


def square(x: float, y: float, size: float, fill: str, framed: bool = False) -> Rect:
    """A token, drawn as a square."""
    frame = (QUERY, size * 0.15) if framed else ("none", 0.0)
    return Rect(x, y, size, size, fill, round(size / 4, 1), *frame)


def compose(panels: Sequence[Panel], legend: Sequence[Key] = ()) -> Picture:
    """Panels side by side, and the legend in lines below them."""
    placed: list[tuple[float, float, Panel]] = []
    left: float = PAD
    for panel in panels:
        placed.append((left, PAD, panel))
        left += panel.width + PAD
    height = max(panel.height for panel in panels) + 2 * PAD
    if legend:
        below = _legend(legend, left - 2 * PAD)
        placed.append((PAD, height, below))
        height += below.height + PAD
        left = max(left, below.width + 2 * PAD)
    return Picture(placed, left, height)


def _legend(legend: Sequence[Key], width: float) -> Panel:
    parts: list[Rect | Text] = []
    x, y, widest, size = 0.0, 0.0, 0.0, 17
    for key in legend:
        label = Text(0, 0, key.label)
        if x and x + size + 7 + label.width > width:
            x, y = 0, y + size + 8
        parts.append(square(x, y, size, key.fill, key.framed))
        if key.outlined:
            parts.append(Rect(x, y, size, size, "none", 3, INK, 1.5))
        parts.append(label._replace(x=x + size + 7, y=y + 13))
        x += size + 7 + label.width + 10
        widest = max(widest, x - 10)
    return Panel(parts, widest, y + size, "")


def _rect(rect: Rect) -> str:
    x, y, width, height, radius = rect.inner
    corners = f' rx="{radius:g}"' if radius else ""
    stroke = f' stroke="{rect.stroke}" stroke-width="{rect.stroke_width:g}"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corners} '
        f'fill="{rect.fill}"{stroke if rect.stroke_width else ""}/>'
    )


def _text(text: Text) -> str:
    return (
        f'<text x="{text.x:g}" y="{text.y:g}" font-size="{text.size}" font-weight="{text.weight}" '
        f'fill="{text.color}">{escape(text.text)}</text>'
    )
