"""Pictures of neighborhoods as SVG and PNG, and walks over query positions as GIF and HTML.

The marks come from :mod:`natten.neighborhood`, so a picture shows what the operators compute.

canvas.py   rectangles and text, written as SVG or painted by matplotlib
window.py   what one query attends
pairs.py    all pairs of queries and keys, and how tiles cover them
walk.py     an animation that shows what one query after the other attends
"""

from .canvas import ATTENDED, PARTLY, QUERY, TOKEN, WASTED
from .pairs import draw_mask, draw_tiles
from .walk import draw_walk
from .window import draw_examples, draw_neighborhood

__all__ = ["draw_examples", "draw_mask", "draw_neighborhood", "draw_tiles", "draw_walk"]
