"""Pictures show the definition: colors are compared with window masks."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from natten import Neighborhood, na2d_qk
from natten.draw import ATTENDED, QUERY, TOKEN, draw_examples, draw_neighborhood, main
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
    slots = rule.window_tokens_of((6, 6))[2, 3]
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


def test_picture_of_the_readme_is_current(tmp_path):
    path = tmp_path / "images" / "picture.svg"
    main([str(path)])
    written = path.read_text(encoding="utf-8")
    assert written == draw_examples()
    assert written == (ROOT / "docs/images/neighborhoods.svg").read_text(encoding="utf-8")
