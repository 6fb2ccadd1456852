"""Write the pictures of the README and of the documentation.

python docs/pictures.py
"""

from pathlib import Path

from natten.draw import (
    draw_examples,
    draw_mask,
    draw_neighborhood,
    draw_tiles,
    draw_walk,
)
from natten.draw.canvas import ATTENDED, INK, PARTLY, QUERY, Panel, Rect, Text, compose
from natten.draw.window import LEGEND, layout, window_panel

IMAGES = Path(__file__).parent / "images"
TILE = {"q_tile": (4, 8), "kv_tile": (4, 4)}


def borders() -> str:
    """One window at a corner, for each boundary."""
    panels = []
    captions = {
        "shift": "moves inwards", "truncate": "is cut", "circular": "goes on at the other end"
    }  # fmt: skip
    for boundary, caption in captions.items():
        drawn = layout((10, 10), (5, 1, 1, False, boundary))
        panels.append(window_panel(drawn, (1, 8), title=f'boundary="{boundary}"', caption=caption))
    return compose(panels, LEGEND[:2]).svg()


LAYERS = (
    ("legacy, compat", "names of older eras", QUERY),
    ("tools/cli", "the command", ATTENDED),
    ("tools, export, flops, explaining", "simulator, profiler, pictures", ATTENDED),
    ("distributed", "layouts over several ranks", ATTENDED),
    ("functional, varlen, unfused, modules", "the public functions and layers", ATTENDED),
    ("operators, gather", "operators and their derivatives", ATTENDED),
    ("backends", "hopper, sdpa, triton, tiled, reference", ATTENDED),
    ("neighborhood, tiling, documents, sequences, nested, _checks", "the rules", PARTLY),
    ("inputs, errors, softmax, caches, tuning, _library, _torch, ...", "the base", PARTLY),
)


def layers() -> str:
    """The layers of the package, one on another."""
    width, height = 640, 40
    parts: list[Rect | Text] = []
    for number, (modules, what, color) in enumerate(LAYERS):
        y = number * (height + 6)
        parts += [Rect(0, y, 8, height, color, 3), Text(20, y + 17, modules, 13, INK, 700)]
        parts += [Text(20, y + 34, what)]
    title = "Layers of the package; each imports from itself and from those below"
    return compose([Panel(parts, width, len(LAYERS) * (height + 6) - 6, title)]).svg()


def pictures() -> dict[str, str]:
    """The SVG documents by file name."""
    return {
        "neighborhoods.svg": draw_examples(),
        "causal.svg": draw_neighborhood(
            24, 7, dilation=2, is_causal=True, query=17, legend=True,
            caption="kernel_size=7, dilation=2, is_causal=True",
        ),
        "slices.svg": draw_neighborhood(
            (4, 9, 9), 3, dilation=(1, 2, 2), is_causal=(True, False, False), query=(2, 4, 4),
            legend=True,
            caption="kernel_size=3, dilation=(1, 2, 2), is_causal=(True, False, False)",
        ),
        "layers.svg": layers(),
        "borders.svg": borders(),
        "part.svg": draw_neighborhood(
            (8, 12), 5, is_causal=(True, False), query_offset=(5, 0), query=(1, 4), legend=True,
            caption="8x12 keys, kernel_size=5, is_causal=(True, False)\n"
            "3x12 queries, query_offset=(5, 0)",
        ),
        "finer.svg": draw_neighborhood(
            (5, 8), 3, queries_per_key=3, query=(7, 10), legend=True,
            caption="5x8 keys, 15x24 queries, kernel_size=3, queries_per_key=3",
        ),
        "mask.svg": draw_mask((24,), 7, legend=True, caption="24 tokens, kernel_size=7"),
        "tiles.svg": draw_tiles((24, 24), 9, **TILE, legend=True, title="kernel_size=9"),
        "tiles-strided.svg": draw_tiles(
            (24, 24), 12, (4, 8), **TILE, legend=True, title="kernel_size=12, stride=(4, 8)"
        ),
        "mask-tiles.svg": draw_mask(
            (12, 12), 5, q_tile=(4, 4), kv_tile=(2, 4), legend=True,
            caption="12x12 tokens, kernel_size=5, 4x4 queries, blocks of 2x4 keys",
        ),
    }  # fmt: skip


def write(directory: Path) -> None:
    """Write all pictures and the walks."""
    for name, svg in pictures().items():
        (directory / name).write_text(svg, encoding="utf-8")
    walk = {"shape": (8, 8), "kernel_size": 4, "stride": 2}
    draw_walk(**walk, path=directory / "walk.html", title="kernel_size=4, stride=2")
    draw_walk(**walk, path=directory / "walk.gif", title="kernel_size=4, stride=2")


if __name__ == "__main__":
    write(IMAGES)
