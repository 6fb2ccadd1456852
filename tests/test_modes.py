"""The table of docs/backends.md on compilation and transforms is what the operators do."""

import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch.func import grad, jvp, vmap

import natten

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"
HEADS_LAST, HEADS_FIRST, PACKED = (1, 5, 6, 2, 4), (1, 2, 5, 6, 4), (18, 2, 4)
LAYOUT = natten.VarlenLayout([(3, 4), (2, 3)])
LAYER = natten.NeighborhoodAttention2D(8, num_heads=2, kernel_size=3).double().eval()


def unfused(x):
    return natten.na2d_av(natten.na2d_qk(x, x, 3).softmax(-1), x, 3)


# By the titles of the columns: a function of one tensor, and the tensor's shape.
OPERATORS = {
    "`na*d`": (lambda x: natten.na2d(x, x, x, 3), HEADS_LAST),
    "`na*d_qk`, `na*d_av`": (unfused, HEADS_FIRST),
    "`na*d_varlen`": (lambda x: natten.na2d_varlen(x, x, x, LAYOUT, 3), PACKED),
    "`attention`": (lambda x: natten.attention(x, x, x), (1, 7, 2, 4)),
    "`merge_attentions`": (
        lambda x: natten.merge_attentions([x, 2 * x], [x.sum(-1), x.mean(-1)])[0],
        (1, 7, 2, 4),
    ),
    "layers": (LAYER, (1, 5, 6, 8)),
}


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def slope(function, x, tangent):
    """The change of ``function`` along ``tangent``, by differences."""
    small = 1e-5 * tangent
    return (function(x + small) - function(x - small)) / 2e-5


def check_compiled(function, x):
    x = x.requires_grad_()
    out, expected = compiled(function)(x), function(x)
    assert_close("output", expected, out, 1e-12)
    (found,), (wanted,) = (torch.autograd.grad(y.sin().sum(), x) for y in (out, expected))
    assert_close("gradient", wanted, found, 1e-12)


def check_exported(function, x):
    program = torch.export.export(Model(function), (x,))
    assert_close("output", function(2 * x), program.module()(2 * x), 1e-12)


def check_vmap(function, x):
    both = torch.stack([x, 2 * x])
    assert_close("vmap", torch.stack(list(map(function, both))), vmap(function)(both), 1e-12)


def check_vmap_of_gradients(function, x):
    check_vmap(grad(lambda x: function(x).sin().sum()), x)


def check_forward_mode(function, x):
    tangent = torch.randn_like(x)
    assert_close("jvp", slope(function, x, tangent), jvp(function, (x,), (tangent,))[1], 1e-7)


def check_compiled_forward_mode(function, x):
    tangent = torch.randn_like(x)
    found = compiled(lambda x: jvp(function, (x,), (tangent,))[1])(x)
    assert_close("jvp", slope(function, x, tangent), found, 1e-7)


def check_second_derivatives(function, x):
    first = grad(lambda x: function(x).sin().sum())
    second = grad(lambda x: (first(x) * x.detach()).sum())(x)
    assert_close("second", slope(first, x, x.detach()), second, 1e-6)


# By the titles of the rows.
CHECKS = {
    "`torch.compile`, without a graph break": check_compiled,
    "`torch.export`": check_exported,
    "`vmap`": check_vmap,
    "`vmap` of gradients": check_vmap_of_gradients,
    "forward mode": check_forward_mode,
    "forward mode in compiled code": check_compiled_forward_mode,
    "second derivatives": check_second_derivatives,
}


def table():
    """The cells of the page's table, by row and column."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(r"^## Compilation.*\n\n((?:\|.*\n)*)", text, re.MULTILINE)
    header, _, *rows = ([x.strip() for x in row.split("|")[1:-1]] for row in found.splitlines())
    return {(row[0], title): cell for row in rows for title, cell in zip(header[1:], row[1:])}


TABLE = table()


def test_the_table_has_all_that_is_checked():
    assert {column for _, column in TABLE} == set(OPERATORS)
    rows = list(dict.fromkeys(row for row, _ in TABLE))
    assert rows[: len(CHECKS)] == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS)
@pytest.mark.parametrize("column", OPERATORS)
def test_the_table_is_what_operators_do(row, column):
    function, shape = OPERATORS[column]
    x = torch.randn(shape, dtype=torch.float64)
    torch.compiler.reset()
    if TABLE[row, column] == "yes":
        CHECKS[row](function, x)
    else:
        assert TABLE[row, column] == "an error"
        with pytest.raises(Exception, match="forward mode"):
            CHECKS[row](function, x)
