"""Animations of one query after the other: a GIF, or a page where the pointer picks the query."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from ...errors import ArgumentError
from ...neighborhood import Boundary
from .canvas import ATTENDED, CARD, INK, QUERY, QUIET_INK, TOKEN, check_suffix, compose
from .window import Sizes, axis_masks, layout, position, window_panel

MAX_FRAMES = 400
MAX_PAGE_TOKENS = 4096


def draw_walk(
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
    path: str | Path,
    queries: Sequence[Sizes] | None = None,
    frames_per_second: int = 8,
    title: str = "",
    caption: str = "",
) -> None:
    """Write an animation of what one query after the other attends.

    A ``.gif`` needs matplotlib and pillow. An ``.html`` needs nothing beside its one file. It plays
    by itself, and the pointer on a query shows what that query attends.

    Args:
        shape: token layout of the keys, one to three axis lengths.
        kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset: as in
            ``na1d``, ``na2d`` and ``na3d``.
        query_shape: token layout of the queries; None means all from ``query_offset`` on.
        path: the file to write; its suffix chooses the format.
        queries: positions to visit; None means every query, in row-major order.
        frames_per_second: queries shown per second.
        title, caption: a line above and lines below the tokens.

    Raises:
        ArgumentError: an argument has a type, shape or value that is not allowed.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "walk.html"
        >>> draw_walk((6, 6), kernel_size=3, dilation=2, path=page)
        >>> page.stat().st_size > 1000
        True
    """
    path = Path(path)
    suffix = check_suffix(path, written=".html", painted=".gif")
    limit = MAX_FRAMES if suffix == ".gif" and queries is None else MAX_PAGE_TOKENS
    window = kernel_size, stride, dilation, is_causal, boundary, queries_per_key, query_offset
    drawn = layout(shape, window, query_shape, limit)
    every = itertools.product(*(range(n) for n in drawn.queries))
    visited = [position(query, drawn.queries) for query in (every if queries is None else queries)]
    if not 1 <= len(visited) <= MAX_PAGE_TOKENS:
        raise ArgumentError(
            f"`queries` must be 1 to {MAX_PAGE_TOKENS} positions, got {len(visited)}."
        )
    if frames_per_second <= 0:
        raise ArgumentError(f"`frames_per_second` must be above 0, got {frames_per_second}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = (
        compose([window_panel(drawn, at, None, title, caption)], drawn.legend) for at in visited
    )
    if suffix == ".html":
        masks = [mask.int().tolist() for mask in axis_masks(drawn)]
        lengths, offset = drawn.squares, drawn.rule.offset
        strides = [math.prod(lengths[axis + 1 :]) for axis in range(len(lengths))]
        walk = [sum((o + x) * s for o, x, s in zip(offset, at, strides)) for at in visited]
        page = Template(_PAGE).substitute(
            title=title or "Neighborhood attention",
            svg=next(pictures).svg(),
            walk=json.dumps(walk),
            lengths=json.dumps(lengths), masks=json.dumps(masks, separators=(",", ":")),
            per_key=json.dumps(drawn.rule.queries_per_key), offset=json.dumps(offset),
            framed=json.dumps(drawn.shares), delay=round(1000 / frames_per_second),
            token=TOKEN, attended=ATTENDED, query=QUERY, card=CARD, ink=INK, quiet=QUIET_INK,
        )  # fmt: skip
        path.write_text(page, encoding="utf-8")
        return
    figures = [picture.figure() for picture in pictures]
    from matplotlib.animation import PillowWriter

    writer = PillowWriter(fps=frames_per_second)
    writer.setup(figures[0], str(path))
    for figure in figures:
        writer.fig = figure
        figure.patch.set(alpha=1, facecolor=CARD)  # a GIF has no soft transparency
        writer.grab_frame()
    writer.finish()


# The page holds one table per axis of which query attends which key; the script looks them up.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>$title</title>
<style>
  body { margin: 2rem; font: 14px system-ui, sans-serif; color: $ink; background: $card }
  svg { max-width: 100%; height: auto }
  svg rect { transition: fill 80ms }
  p { color: $quiet }
</style>
<p>Move the pointer over the tokens, or click to <b>pause and play</b>.</p>
$svg
<p id="where"></p>
<script>
const lengths = $lengths, masks = $masks, walk = $walk, framed = $framed;
const perKey = $per_key, offset = $offset;
const count = lengths.reduce((product, n) => product * n, 1);
const tokens = [...document.querySelector("svg g").querySelectorAll("rect")].slice(0, count);
const position = index => {
  const at = [];
  for (const n of [...lengths].reverse()) { at.unshift(index % n); index = Math.floor(index / n); }
  return at;
};
const positions = tokens.map((_, index) => position(index));
const rows = masks.map(mask => mask.map(row => row.join("")));
const size = Number(tokens.find(rect => !rect.hasAttribute("stroke")).getAttribute("width"));
const corners = tokens.map(rect => {
  const inset = Number(rect.getAttribute("stroke-width") || 0) / 2;
  return [rect.getAttribute("x") - inset, rect.getAttribute("y") - inset];
});
function show(query) {
  const at = positions[query].map((x, axis) => x - offset[axis]);
  if (!at.every((x, axis) => x in masks[axis])) return;  // a token that is no query
  tokens.forEach((rect, index) => {
    const other = positions[index];
    const attended = other.every(
      (x, axis) => masks[axis][at[axis]][Math.floor(x / perKey[axis])]);
    const shared = framed && index !== query
      && other.every((x, axis) => rows[axis][x - offset[axis]] === rows[axis][at[axis]]);
    const inset = shared ? size * 0.075 : 0;
    rect.setAttribute("fill", index === query ? "$query" : attended ? "$attended" : "$token");
    rect.setAttribute("stroke", shared ? "$query" : "none");
    rect.setAttribute("stroke-width", 2 * inset);
    rect.setAttribute("x", corners[index][0] + inset);
    rect.setAttribute("y", corners[index][1] + inset);
    rect.setAttribute("width", size - 2 * inset);
    rect.setAttribute("height", size - 2 * inset);
  });
  document.getElementById("where").textContent = "query (" + at.join(", ") + ")";
}
let step = 0, playing = true;
setInterval(() => { if (playing) show(walk[step++ % walk.length]); }, $delay);
tokens.forEach((rect, index) => rect.addEventListener("mouseenter", () => {
  playing = false;
  show(index);
}));
document.querySelector("svg").addEventListener("mouseleave", () => { playing = true; });
document.querySelector("svg").addEventListener("click", () => { playing = !playing; });
show(walk[0]);
</script>
</html>
"""
