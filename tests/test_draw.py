"""Pictures show the definition: colors are compared with window masks."""

import json
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch

from natten import Neighborhood, na1d_qk, na2d_qk
from natten.cli import main
from natten.draw import (
    ATTENDED,
    PARTLY,
    QUERY,
    TOKEN,
    WASTED,
    draw_mask,
    draw_neighborhood,
    draw_tiles,
    draw_walk,
)
from natten.errors import ArgumentError
from natten.neighborhood import window_mask

ROOT = Path(__file__).parents[1]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def squares(svg: str) -> list[ET.Element]:
    """The tokens of a picture without a legend, in row-major order."""
    return ET.fromstring(svg).findall(f"{NAMESPACE}g/{NAMESPACE}rect")


@pytest.mark.parametrize(
    "shape, kernel_size, stride, dilation, is_causal, query",
    [
        (9, 3, 1, 1, False, 4),
        ((9,), 4, 2, 2, True, (7,)),
        ((7, 8), 3, 1, 2, False, (0, 7)),
        ((7, 8), (3, 4), (2, 4), (2, 1), (False, True), (5, 2)),
        ((3, 4, 5), (2, 3, 5), (1, 3, 1), 1, (True, False, False), (1, 2, 4)),
    ],
)
def test_marks_what_is_attended(shape, kernel_size, stride, dilation, is_causal, query):
    svg = draw_neighborhood(shape, kernel_size, stride, dilation, is_causal, query=query)
    lengths = (shape,) if isinstance(shape, int) else shape
    at = (query,) if isinstance(query, int) else query
    rule = Neighborhood.create(len(lengths), kernel_size, stride, dilation, is_causal)
    index = int(torch.arange(torch.Size(lengths).numel()).view(lengths)[at])
    mask = window_mask(rule, lengths, lengths)
    expected = [ATTENDED if attended else TOKEN for attended in mask[index].tolist()]
    expected[index] = QUERY
    rects = squares(svg)
    assert [rect.get("fill") for rect in rects] == expected
    framed = [rect.get("stroke") is not None for rect in rects]
    shared = (mask == mask[index]).all(1)
    shared[index] = False
    if rule.stride == (1,) * rule.rank:
        assert not any(framed)
    else:
        assert framed == shared.tolist()


# Layout of the keys, window, stride, dilation, further options, layout of the queries, a query.
PARTS = [
    ((9,), 5, 1, 1, {"boundary": "truncate"}, (9,), (1,)),
    ((3,), 7, 2, 5, {"boundary": "truncate"}, (3,), (1,)),
    ((8,), 5, 2, 1, {"boundary": "circular"}, (8,), (7,)),
    ((9,), 4, 3, 2, {"query_offset": 4}, (5,), (0,)),
    ((9, 8), 3, 1, 1, {"query_offset": (4, 0), "query_shape": (2, 7)}, (2, 7), (1, 0)),
    ((5, 6), (3, 4), 1, 1, {"queries_per_key": (1, 3)}, (5, 18), (4, 7)),
    (
        (3, 4, 6), (2, 3, 3), 1, (1, 1, 2),
        {"queries_per_key": 2, "query_offset": (1, 3, 0), "query_shape": (4, 5, 7),
         "boundary": ("truncate", "shift", "circular")},
        (4, 5, 7), (3, 0, 6),
    ),
]  # fmt: skip


@pytest.mark.parametrize("shape, kernel_size, stride, dilation, options, queries, query", PARTS)
def test_marks_of_parts_finer_queries_and_borders(
    shape, kernel_size, stride, dilation, options, queries, query
):
    """A square is a query of the whole layout, and has the color of the key at which it stands."""
    rank = len(shape)
    names = "boundary", "queries_per_key", "query_offset"
    given = {name: options[name] for name in names if name in options}
    rule = Neighborhood.create(rank, kernel_size, stride, dilation, **given)
    mask = window_mask(rule, queries, shape)
    own = mask[torch.arange(mask.shape[0]).view(queries)[query]]
    grid, same = own.view(shape), (mask == own).all(1).view(queries)
    shared = torch.zeros(tuple(n * r for n, r in zip(shape, rule.queries_per_key))).bool()
    shared[tuple(slice(o, o + n) for o, n in zip(rule.offset, queries))] = same
    at = tuple(o + x for o, x in zip(rule.offset, query))
    for axis, r in enumerate(rule.queries_per_key):
        grid = grid.repeat_interleave(r, axis)
    expected = [ATTENDED if attended else TOKEN for attended in grid.flatten().tolist()]
    index = int(torch.arange(grid.numel()).view(grid.shape)[at])
    expected[index] = QUERY
    svg = draw_neighborhood(shape, kernel_size, stride, dilation, query=query, **options)
    rects = squares(svg)
    tokens, frames = rects[: grid.numel()], rects[grid.numel() :]
    assert [rect.get("fill") for rect in tokens] == expected
    framed = [rect.get("stroke") is not None for rect in tokens]
    if max(rule.stride) > 1 or max(rule.queries_per_key) > 1:
        shared[at] = False
        assert framed == shared.flatten().tolist()
    else:
        assert not any(framed)
    # One dark frame in each slice is around the part, and around nothing else.
    slices = queries[0] if rank == 3 else 1
    assert len(frames) == (slices if rule.query_offset is not None else 0)
    if frames:
        part = torch.zeros_like(shared)
        part[tuple(slice(o, o + n) for o, n in zip(rule.offset, queries))] = True
        boxes = [[float(f.get(x)) for x in ("x", "y", "width", "height")] for f in frames]
        inside = [
            any(
                x < float(rect.get("x")) < x + w and y < float(rect.get("y")) < y + h
                for x, y, w, h in boxes
            )
            for rect in tokens
        ]
        assert inside == part.flatten().tolist()


def test_weights_of_a_part_become_shades_of_its_keys():
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 6, 4)
    part = {"queries_per_key": 2, "query_offset": 8, "boundary": "circular"}
    weights = na1d_qk(q, k, 3, **part).softmax(-1)[0, 0, 2]
    svg = draw_neighborhood(6, 3, query_shape=3, query=2, weights=weights, **part)
    fills = [rect.get("fill") for rect in squares(svg)][:12]
    assert [fill != TOKEN for fill in fills] == [True] * 2 + [False] * 6 + [True] * 4
    # Query 10 stands at key 5, and its window goes on at key 0.
    strongest = (4, 5, 0)[int(weights.argmax())]
    assert int(fills[2 * strongest][1:3], 16) == 22 == int(fills[2 * strongest + 1][1:3], 16)


def test_weights_become_shades():
    q, k = torch.randn(2, 1, 1, 6, 6, 8)
    weights = na2d_qk(q, k, 3, is_causal=True).softmax(-1)[0, 0, 2, 3]
    svg = draw_neighborhood((6, 6), 3, is_causal=True, query=(2, 3), weights=weights)
    fills = [rect.get("fill") for rect in squares(svg)]
    rule = Neighborhood.create(2, 3, is_causal=True)
    attended = window_mask(rule, (6, 6), (6, 6))[2 * 6 + 3].tolist()
    assert [fill != TOKEN for fill in fills] == attended
    slots = rule.window_tokens_of((6, 6), (6, 6))[2, 3]
    red = [int(fills[token][1:3], 16) for token in slots]
    assert min(red) == red[int(weights.argmax())] == 22
    assert max(red) == red[int(weights.argmin())]


def test_slots_that_causality_empties_stay_blank():
    weights = torch.tensor([0.25, 0.75, 0.0])
    fills = [r.get("fill") for r in squares(draw_neighborhood(4, 3, 1, 1, True, query=1))]
    assert fills == [ATTENDED, QUERY, TOKEN, TOKEN]
    svg = draw_neighborhood(4, 3, 1, 1, True, query=1, weights=weights)
    assert [r.get("fill") == TOKEN for r in squares(svg)] == [False, False, True, True]


def test_text_is_escaped_and_file_is_written(tmp_path):
    path = tmp_path / "window.svg"
    svg = draw_neighborhood(5, 3, title="a < b", caption="one\ntwo & three", path=path)
    assert path.read_text(encoding="utf-8") == svg
    texts = [text.text for text in ET.fromstring(svg).iter(f"{NAMESPACE}text")]
    assert texts == ["a < b", "one", "two & three"]


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"shape": (8, 8, 8, 8)}, "shape"),
        ({"shape": 8.0}, "shape"),
        ({"shape": (8, 0)}, "shape"),
        ({"kernel_size": 9}, "kernel_size"),
        ({"kernel_size": (3,)}, "kernel_size"),
        ({"stride": 4}, "stride"),
        ({"query": (8, 0)}, "query"),
        ({"query": 3}, "query"),
        ({"query": (2, 0), "query_offset": 6}, "query"),
        ({"boundary": "mirror"}, "boundary"),
        ({"queries_per_key": 0}, "queries_per_key"),
        ({"shape": (128, 128), "queries_per_key": 2}, "queries_per_key"),
        ({"query_offset": -1}, "query_offset"),
        ({"query_offset": 8}, "query_offset"),
        ({"query_offset": 4, "query_shape": 5}, "query_shape"),
        ({"query_offset": 4, "query_shape": (5, 1)}, "query_offset"),
        ({"query_shape": (5, 1)}, "query_offset"),
        ({"weights": torch.ones(8)}, "weights"),
        ({"weights": [0.1] * 9}, "weights"),
        ({"weights": -torch.ones(9)}, "weights"),
        ({"weights": torch.full((9,), torch.nan)}, "weights"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else str(v),
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        draw_neighborhood(**{"shape": (8, 8), "kernel_size": 3, **arguments})


# 12 tokens and a window of 5; a tile of 4 queries visits blocks of 3 keys.
TILED = {"shape": (12,), "kernel_size": 5, "q_tile": (4,), "kv_tile": (3,)}


def test_mask():
    svg = draw_mask((3, 4), (3, 2), dilation=(1, 2), is_causal=(True, False))
    rule = Neighborhood.create(2, (3, 2), 1, (1, 2), (True, False))
    expected = window_mask(rule, (3, 4), (3, 4)).flatten().tolist()
    assert [rect.get("fill") == ATTENDED for rect in squares(svg)] == expected


@pytest.mark.parametrize("shape, kernel_size, stride, dilation, options, queries, query", PARTS)
def test_masks_of_parts_finer_queries_and_borders(
    shape, kernel_size, stride, dilation, options, queries, query
):
    names = "boundary", "queries_per_key", "query_offset"
    given = {name: options[name] for name in names if name in options}
    rule = Neighborhood.create(len(shape), kernel_size, stride, dilation, **given)
    mask = window_mask(rule, queries, shape)
    svg = draw_mask(shape, kernel_size, stride, dilation, **options)
    if mask.numel() < 5000:  # else neighbors of one color are one bar
        fills = [rect.get("fill") == ATTENDED for rect in squares(svg)]
        assert fills == mask.flatten().tolist()
    tiles = {"q_tile": (2,) * len(shape), "kv_tile": (3,) * len(shape)}
    fills = [
        rect.get("fill")
        for rect in squares(draw_mask(shape, kernel_size, stride, dilation, **tiles, **options))
    ]
    if mask.numel() < 5000:
        assert fills.count(ATTENDED) == int(mask.sum())


def test_mask_by_tiles():
    fills = [rect.get("fill") for rect in squares(draw_mask(**TILED))]
    cells, lines = fills[: 12 * 12], fills[12 * 12 :]
    letters = "".join({ATTENDED: "a", WASTED: "w", TOKEN: "."}[fill] for fill in cells)
    # The second tile, queries 4 to 7, needs keys 2 to 9: three blocks, which end at key 10.
    assert [letters[12 * q : 12 * q + 12] for q in (0, 4, 7)] == [
        "aaaaaw......",
        "..aaaaawwww.",
        "..wwwaaaaaw.",
    ]
    assert len(lines) == 2


def test_mask_with_many_tokens_has_the_same_pairs():
    svg = draw_mask((256,), 9)
    width = sum(float(r.get("width")) for r in squares(svg) if r.get("fill") == ATTENDED)
    rule = Neighborhood.create(1, 9)
    assert width == 2 * window_mask(rule, (256,), (256,)).sum()  # a pair is 2 wide


def test_mask_orders_tokens_by_tiles():
    """Where windows match the tiles, each tile attends only itself: squares on the diagonal."""
    svg = draw_mask((4, 4), 2, 2, q_tile=(2, 2), kv_tile=(2, 2))
    fills = [rect.get("fill") for rect in squares(svg)][: 16 * 16]
    diagonal = [q // 4 == k // 4 for q in range(16) for k in range(16)]
    assert [fill == ATTENDED for fill in fills] == diagonal and WASTED not in fills


def test_tiles():
    rects = squares(draw_tiles(**TILED, query=(5,)))
    tokens, blocks = rects[:12], rects[12:]
    some, every = {2, 3, 4, 7, 8, 9}, {5, 6}  # windows 2-6, 3-7, 4-8, 5-9
    for x, token in enumerate(tokens):
        kind = PARTLY if x in some else ATTENDED if x in every else WASTED if x == 10 else TOKEN
        assert token.get("fill") == kind, x
        assert (token.get("stroke") == QUERY) == (x in (4, 5, 6, 7))
    assert len(blocks) == 3
    text = "".join(ET.fromstring(draw_tiles(**TILED)).itertext())
    assert "3 blocks of 3 keys, none without a mask" in text


def test_tiles_with_a_dilation_stay_in_their_group():
    svg = draw_tiles((4, 12), (3, 3), dilation=(1, 2), q_tile=(2, 2), kv_tile=(2, 2), query=(1, 5))
    for x, token in enumerate(squares(svg)[: 4 * 12]):
        assert x % 2 == 1 or token.get("fill") == TOKEN


def test_tiles_of_a_part_go_around_a_ring():
    # Queries 9, 10 and 11 stand at keys 4, 5 and 5, so their windows are keys 3 to 5 and 4 to 6,
    # which is 0. Blocks of two keys: 3 and 4, 5 and 0.
    part = {"queries_per_key": 2, "query_offset": 9, "boundary": "circular"}
    svg = draw_tiles(6, 3, q_tile=3, kv_tile=2, **part)
    rects = squares(svg)
    fills = [rect.get("fill") for rect in rects[:12]]
    of_keys = [PARTLY, TOKEN, TOKEN, PARTLY, ATTENDED, ATTENDED]
    assert fills == [color for color in of_keys for _ in range(2)]
    assert [rect.get("stroke") == QUERY for rect in rects[:12]] == [False] * 9 + [True] * 3
    frames = [(rect.get("x"), rect.get("width")) for rect in rects[12:]]
    assert len(frames) == 3  # one of keys 3 and 4, and the pieces of that of keys 5 and 0
    assert "2 blocks of 2 keys, none without a mask" in svg
    assert "1.33 pairs computed per pair needed" in svg  # 3 * 4 of 3 * 3


def test_tiles_of_a_part_start_at_its_first_query():
    svg = draw_mask(12, 3, query_offset=5, q_tile=4, kv_tile=3)
    lines = [rect for rect in squares(svg) if rect.get("height") != rect.get("width")]
    assert len(squares(svg)) - len(lines) == 7 * 12 and len(lines) == 1


def test_full_blocks_are_counted():
    text = draw_tiles((16, 16), 8, 8, q_tile=(4, 8), kv_tile=(4, 4))
    assert "4 blocks of 4x4 keys, 4 without a mask" in text
    assert "1.00 pairs computed per pair needed" in text


def test_walk_page_looks_up_the_definition(tmp_path):
    path = tmp_path / "walk.html"
    draw_walk((4, 5), (3, 2), (1, 2), path=path, queries=[(0, 0), (3, 4)])
    page = path.read_text(encoding="utf-8")
    constants = re.search(r"lengths = (.*), masks = (.*), walk = (.*), framed = (.*);", page)
    lengths, masks, walk, framed = map(json.loads, constants.groups())
    rule = Neighborhood.create(2, (3, 2), (1, 2))
    both = torch.kron(*(torch.tensor(mask, dtype=torch.float64) for mask in masks)).bool()
    assert torch.equal(both, window_mask(rule, (4, 5), (4, 5)))
    assert (lengths, walk, framed) == ([4, 5], [0, 19], True)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_walk_page_of_a_part(tmp_path):
    path = tmp_path / "walk.html"
    part = {"queries_per_key": (1, 2), "query_offset": (2, 3), "boundary": "truncate"}
    draw_walk((4, 5), 3, path=path, query_shape=(2, 6), queries=[(0, 0), (1, 5)], **part)
    page = path.read_text(encoding="utf-8")
    constants = re.search(r"lengths = (.*), masks = (.*), walk = (.*), framed = (.*);", page)
    lengths, masks, walk, framed = map(json.loads, constants.groups())
    per_key, offset = map(json.loads, re.search(r"perKey = (.*), offset = (.*);", page).groups())
    rule = Neighborhood.create(2, 3, **part)
    both = torch.kron(*(torch.tensor(mask, dtype=torch.float64) for mask in masks)).bool()
    assert torch.equal(both, window_mask(rule, (2, 6), (4, 5)))
    assert (lengths, per_key, offset, framed) == ([4, 10], [1, 2], [2, 3], True)
    assert walk == [2 * 10 + 3, 3 * 10 + 8]


def test_walk_has_a_frame_per_query(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "walk.gif"
    draw_walk(5, 3, path=path)
    with image.open(path) as animation:
        assert animation.n_frames == 5


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"q_tile": None}, "q_tile"),
        ({"kv_tile": (2, 2)}, "kv_tile"),
        ({"kv_tile": (0,)}, "kv_tile"),
        ({"shape": (1025,)}, "shape"),
    ],
    ids=str,
)
def test_bad_tiles(arguments, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        draw_mask(**{**TILED, **arguments})


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"path": "walk.svg"}, "path"),
        ({"queries": []}, "queries"),
        ({"queries": [9]}, "query"),
        ({"shape": (401,)}, "shape"),
        ({"frames_per_second": 0}, "frames_per_second"),
    ],
    ids=str,
)
def test_bad_walks(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        draw_walk(**{"shape": 9, "kernel_size": 3, "path": "walk.gif", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, output, starts",
    [
        ("-i 6 6 -w 3 -q 0 5", "natten-window.svg", b"<svg"),
        ("-i 2 6 6 -w 2 3 3 -c true 0 0 -o new/window.png", "new/window.png", b"\x89PNG"),
        ("mask -i 12 -w 5 --dilation 2", "natten-mask.svg", b"<svg"),
        ("tiles -i 12 -w 5 --q-tile 4 --kv-tile 3 --no-legend", "natten-tiles.svg", b"<svg"),
        (
            "-i 6 6 -w 3 --boundary truncate shift --query-offset 2 0 --query-shape 2 6",
            "natten-window.svg",
            b"<svg",
        ),
        ("mask -i 6 -w 3 --queries-per-key 4 --boundary circular", "natten-mask.svg", b"<svg"),
        ("walk -i 6 -w 3", "natten-walk.gif", b"GIF8"),
        ("walk -i 6 -w 3 -s 2 -o walk.html", "walk.html", b"<!doctype html>"),
    ],
)
def test_command(line, output, starts, tmp_path, monkeypatch, capsys):
    if not output.endswith((".svg", ".html")):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *line.split()]) == 0
    assert output in capsys.readouterr().out
    assert (tmp_path / output).read_bytes().startswith(starts)


@pytest.mark.parametrize(
    "line, starts",
    [
        ("-i 6 6 -w 3", b"<svg"),
        ("mask -i 12 -w 5", b"<svg"),
        ("tiles -i 12 -w 5 --q-tile 4 --kv-tile 3", b"<svg"),
        ("walk -i 6 -w 3", b"GIF8"),
    ],
)
def test_a_dash_is_standard_output(line, starts, tmp_path, monkeypatch, capsysbinary):
    if starts == b"GIF8":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *line.split(), "-o", "-"]) == 0
    out = capsysbinary.readouterr().out
    assert out.startswith(starts) and b"wrote" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "draw, refused, taken",
    [
        (draw_neighborhood, "a.png", "a.svg"),
        (draw_mask, "a.png", "a.svg"),
        (partial(draw_tiles, q_tile=2, kv_tile=3), "a.png", "a.svg"),
        (draw_walk, "a.gif", "a.html"),
    ],
)
def test_without_matplotlib_what_is_suggested_is_taken(draw, refused, taken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    message = f"`path` must end in {taken[1:]}, got '{refused}': matplotlib"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        draw(9, 3, path=refused)
    assert not list(tmp_path.iterdir())
    draw(9, 3, path=taken)
    assert Path(taken).exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("-i 6 -w 7", "7 * 1 > 6"),
        ("-i 6 -w 3 -o window.bmp", ".svg or .png"),
        ("-i 6 -w 3 -q 6", "`--query`"),
        ("tiles -i 6 -w 3 --q-tile 2", "`--kv-tile`"),
        ("walk -i 6 -w 3 --q-tile 2", "`--q-tile` is for mask and tiles, not for walk"),
        ("mask -i 6 -w 3 -q 2", "`--query` is for window and tiles, not for mask"),
        ("circle -i 6 -w 3", "kind: expected one of window, mask, tiles, walk"),
        ("-i 6 -w 3 --boundary mirror", "--boundary: expected one of shift"),
        ("-i 6 -w 3 --query-offset 1 2", "`--query-offset` must have 1 entry"),
        ("-i 6 6 -w 3 --query-offset 1 --query-shape 6", "`--query-offset` plus `--query-shape`"),
        ("-i 6 6 -w 3 --query-shape 3", "`--query-offset` is for queries that are a part"),
    ],
)
def test_command_refuses(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *line.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_of_the_documentation_are_current(tmp_path):
    """Only pictures that are text are compared; ``python docs/pictures.py`` writes all."""
    pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "docs/pictures.py"))["write"](tmp_path)
    for path in tmp_path.iterdir():
        written = ROOT / "docs/images" / path.name
        if path.suffix == ".gif":  # its bytes depend on the versions of matplotlib and pillow
            assert written.exists()
        else:
            same = path.read_text(encoding="utf-8") == written.read_text(encoding="utf-8")
            assert same, f"{path.name} is stale: python docs/pictures.py"
