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

IMAGES = Path(__file__).parent / "images"
TILE = {"q_tile": (4, 8), "kv_tile": (4, 4)}


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
