"""The definition is compared with hand-made cases and brute force; bad values are refused."""

import pytest
import torch
from helpers import brute_force_axis
from hypothesis import given, settings
from hypothesis import strategies as st

from natten import ArgumentError, Neighborhood, fit_window
from natten.neighborhood import Dense, window_mask


def attended(length, **options):
    """For each token of one axis, the tokens that it attends."""
    rule = Neighborhood.create(1, **options)
    mask = window_mask(rule, (length,), (length,))
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        pytest.param(
            5,
            {"kernel_size": 3},
            [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]],
            id="sliding",
        ),
        pytest.param(
            5,
            {"kernel_size": 2},
            [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]],
            id="even-reaches-left",
        ),
        pytest.param(
            5,
            {"kernel_size": 3, "is_causal": True},
            [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]],
            id="causal",
        ),
        pytest.param(
            5,
            {"kernel_size": 2, "dilation": 2},
            [[0, 2], [1, 3], [0, 2], [1, 3], [2, 4]],
            id="uneven-dilation-groups",
        ),
        pytest.param(
            6, {"kernel_size": 3, "stride": 3}, [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3, id="blocked"
        ),
        pytest.param(
            6,
            {"kernel_size": 3, "stride": 2},
            [[0, 1, 2]] * 2 + [[2, 3, 4]] * 2 + [[3, 4, 5]] * 2,
            id="strided",
        ),
        pytest.param(
            5,
            {"kernel_size": 3, "stride": 2, "is_causal": True},
            [[0], [0, 1], [1, 2], [1, 2, 3], [2, 3, 4]],
            id="strided-causal",
        ),
        pytest.param(3, {"kernel_size": 1}, [[0], [1], [2]], id="window-of-one"),
        pytest.param(3, {"kernel_size": 3}, [[0, 1, 2]] * 3, id="whole-axis"),
    ],
)
def test_by_hand(length, options, expected):
    assert attended(length, **options) == expected


def test_corner_of_two_axes():
    mask = window_mask(Neighborhood.create(2, (3, 2)), (4, 4), (4, 4))
    assert mask[0].view(4, 4).int().tolist() == [[1, 1, 0, 0]] * 3 + [[0] * 4]


@st.composite
def axes(draw):
    length = draw(st.integers(1, 40))
    d = draw(st.integers(1, min(length, 5)))
    k = draw(st.integers(1, length // d))
    return length, k, draw(st.integers(1, k)), d, draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(axes())
def test_against_brute_force(axis):
    length, k, s, d, causal = axis
    expected = brute_force_axis(*axis)
    options = {"kernel_size": k, "stride": s, "dilation": d, "is_causal": causal}
    assert attended(length, **options) == expected
    rule = Neighborhood.create(1, **options)
    tokens, valid = (
        rule.window_tokens_of((length,), (length,)),
        rule.attended_slots((length,), (length,)),
    )
    assert [t[v].tolist() for t, v in zip(tokens, valid)] == expected
    # In the slots, attended tokens come first, and masked slots last.
    assert all(v.tolist() == sorted(v.tolist(), reverse=True) for v in valid)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_attended_keys_are_between_two_positions(data):
    """None is missing, and there is a query for the first and for the last."""
    draw, number = data.draw, st.integers
    boundary = draw(st.sampled_from(["shift", "truncate"]))
    length, d, r = draw(number(1, 24)), draw(number(1, 4)), draw(number(1, 3))
    most = length // d if boundary == "shift" else 9
    k = draw(number(1, max(1, most)))
    length = max(length, d if boundary == "shift" else 1)
    offset = draw(number(0, r * length - 1))
    count = draw(number(1, r * length - offset))
    stride, causal = draw(number(1, k)), draw(st.booleans())
    rule = Neighborhood.create(1, k, stride, d, causal, boundary, r, offset)
    rule.check((count,), (length,))
    found = window_mask(rule, (count,), (length,)).any(0).nonzero().flatten() // d
    first, end = rule.attended(0, count, length)
    assert first <= int(found.min()) and int(found.max()) < end
    if d == 1:
        assert (first, end) == (int(found.min()), int(found.max()) + 1)


def test_every_key_of_a_ring_is_attended():
    rule = Neighborhood.create(1, 3, dilation=2, boundary="circular", query_offset=1)
    assert rule.attended(0, 1, 10) == (0, 5)


def test_slots_are_row_major():
    rule = Neighborhood.create(2, (2, 3))
    assert rule.window_tokens_of((4, 5), (4, 5))[2, 2].tolist() == [6, 7, 8, 11, 12, 13]


def test_hashable_and_frozen():
    rule = Neighborhood.create(2, 3, dilation=[1, 2])
    assert hash(rule) == hash(Neighborhood.create(2, (3, 3), 1, (1, 2)))
    with pytest.raises(AttributeError):
        rule.kernel_size = (5, 5)


def test_dense_is_aligned_top_left():
    mask = window_mask(Dense(True), (4,), (2,))
    assert mask.int().tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*(st.integers(1, 30),) * 3, st.integers(1, 8)), min_size=1, max_size=3))
def test_fit_window(axes):
    shape, kernel, stride, dilation = zip(*((a, k, min(s, k), d) for a, k, s, d in axes))
    found = fit_window(shape, kernel, stride, dilation)
    for length, k, s, d, k2, s2, d2 in zip(shape, kernel, stride, dilation, *found):
        assert d2 == min(d, length)
        assert k2 == min(k, length // d2)
        assert s2 == min(s, k2)
    Neighborhood.create(len(shape), *found).check(shape, shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "`kernel_size` must be at least 1"),
        ({"kernel_size": 2.0}, "`kernel_size`; expected an integer.*float"),
        ({"kernel_size": True}, "`kernel_size`; expected an integer.*bool"),
        ({"kernel_size": (3, 3, 3)}, "`kernel_size`; expected an integer or 2.*got 3"),
        ({"kernel_size": 3, "dilation": 0}, "`dilation` must be at least 1"),
        ({"kernel_size": 3, "dilation": "1"}, "`dilation`; expected an integer.*str"),
        ({"kernel_size": 3, "stride": 4}, "`stride` must be at least 1 and at most"),
        ({"kernel_size": 3, "is_causal": 1}, "`is_causal`; expected a boolean.*int"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ArgumentError, match=message):
        Neighborhood.create(2, **options)


def test_refuses_windows_that_do_not_fit():
    rule = Neighborhood.create(2, 5, dilation=4)
    with pytest.raises(ArgumentError, match=r"must not exceed.*\(19, 20\)"):
        rule.check((19, 20), (19, 20))
    rule.check((20, 20), (20, 20))
    with pytest.raises(ArgumentError, match="has 2 axes"):
        rule.check((20,), (20,))


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    assert Neighborhood.create(1, numpy.int64(3)).kernel_size == (3,)


def test_none_means_default():
    rule = Neighborhood.create(2, 3, None, None, None)
    assert rule == Neighborhood.create(2, 3)
    assert rule.window_tokens == 9 and torch.Size([3, 3]) == torch.Size(rule.kernel_size)
