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

from natten import Neighborhood, na2d_qk
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
        ("-i 6 -w 3 -q 6", "`query`"),
        ("tiles -i 6 -w 3 --q-tile 2", "`--kv-tile`"),
        ("walk -i 6 -w 3 --q-tile 2", "`--q-tile` is for mask and tiles, not for walk"),
        ("mask -i 6 -w 3 -q 2", "`--query` is for window and tiles, not for mask"),
        ("circle -i 6 -w 3", "invalid choice"),
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
