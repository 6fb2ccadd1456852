"""What ``natten draw`` does: it writes a picture and says where."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from .. import draw
from ..layouts import by, words
from .outputs import STDOUT, write
from .window import window_of

KINDS: dict[str, Callable[..., Any]] = {
    "window": draw.draw_neighborhood,
    "mask": draw.draw_mask,
    "tiles": draw.draw_tiles,
    "walk": draw.draw_walk,
}
# The kinds of picture that have an option; with any other kind it is an error.
USES = {"query": ("window", "tiles"), "q_tile": ("mask", "tiles"), "kv_tile": ("mask", "tiles")}


def run(args: argparse.Namespace) -> int:
    """Write the picture and say where."""
    rule, queries = window_of(args)
    for option, kinds in USES.items():
        if getattr(args, option) is not None and args.kind not in kinds:
            name = option.replace("_", "-")
            raise ArgumentError(f"`--{name}` is for {' and '.join(kinds)}, not for {args.kind}.")
    if args.kind == "tiles" and not (args.q_tile and args.kv_tile):
        raise ArgumentError("`tiles` needs `--q-tile` and `--kv-tile`, one size per axis.")
    options: dict[str, Any] = {
        name: tuple(getattr(args, name)) for name in USES if getattr(args, name) is not None
    }
    if args.kind != "walk":
        options["legend"] = not args.no_legend
    title = args.title
    if args.kind == "tiles":  # draw_tiles writes a caption of its own
        title = title or _caption(args, rule, queries)
    else:
        options["caption"] = _caption(args, rule, queries)
    names = "boundary", "queries_per_key", "query_offset"
    options |= {name: getattr(rule, name) for name in names}
    window = (rule.kernel_size, rule.stride, rule.dilation, rule.is_causal)
    draw_to = partial(
        KINDS[args.kind], tuple(args.input_size), *window, query_shape=queries, title=title,
        **options,
    )  # fmt: skip
    moving = "gif" if importlib.util.find_spec("matplotlib") else "html"
    default = f"natten-{args.kind}.{moving if args.kind == 'walk' else 'svg'}"
    if args.output == STDOUT:
        with tempfile.TemporaryDirectory() as folder:
            draw_to(path=Path(folder, default))
            write(STDOUT, Path(folder, default).read_bytes())
    else:
        target = Path(args.output or default)  # its folder is made with it
        draw_to(path=target)
        print(f"wrote {target}")
    return 0


def _caption(args: argparse.Namespace, rule: Neighborhood, queries: tuple[int, ...]) -> str:
    parts = [f"window {by(rule.kernel_size)}"]
    parts += [f"stride {by(rule.stride)}"] if max(rule.stride) > 1 else []
    parts += [f"dilation {by(rule.dilation)}"] if max(rule.dilation) > 1 else []
    causal = [str(axis) for axis, is_causal in enumerate(rule.is_causal) if is_causal]
    parts += [f"causal along axis {', '.join(causal)}"] if causal else []
    parts += words(rule, queries)
    if args.kind == "window" and args.query is not None:
        parts.append(f"query at {', '.join(map(str, args.query))}")
    if args.kind == "mask":
        for sizes, what in (
            (args.q_tile, "tiles of {} queries"),
            (args.kv_tile, "blocks of {} keys"),
        ):
            parts += [what.format(by(sizes))] if sizes else []
    return ", ".join(parts)
