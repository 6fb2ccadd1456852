"""Arguments may be of other libraries' types: arrays, ranges, configurations, small tensors."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import RELEASE

import natten
from natten import ArgumentError, Neighborhood, VarlenLayout
from natten.draw import draw_mask, draw_neighborhood, draw_walk
from natten.simulator import Device, recommend, simulate

FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
QK = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}
VARLEN = {1: natten.na1d_varlen, 2: natten.na2d_varlen, 3: natten.na3d_varlen}
MODULES = {
    1: natten.NeighborhoodAttention1D,
    2: natten.NeighborhoodAttention2D,
    3: natten.NeighborhoodAttention3D,
}
SPACE = (6, 7, 8)


class Config(Sequence):
    """Like OmegaConf's ListConfig, a sequence that may change and has a hash all the same."""

    def __init__(self, *items):
        self.items = list(items)

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)

    __hash__ = object.__hash__


SEQUENCES = {
    "config": lambda *n: Config(*n),
    "array": lambda *n: np.array(n),
    "small array": lambda *n: np.array(n, dtype=np.uint8),
    "list of NumPy's": lambda *n: [np.int32(each) for each in n],
    "tensor": lambda *n: torch.tensor(n),
    "tuple of tensors": lambda *n: tuple(map(torch.tensor, n)),
    "size": lambda *n: torch.Size(n),
}
NUMBERS = {"NumPy": np.int64, "0-D array": np.array, "tensor": torch.tensor}
TRUTHS = {"NumPy": np.bool_, "tensor": torch.tensor}
SCALES = {
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "array": np.array([0.5]),
    "tensor": torch.tensor(0.5),
    "one element": torch.tensor([[0.5]]),
    "fraction": Fraction(1, 2),
}


def every_call(rank, kernel, stride, dilation, causal, scale):
    """The results of every function that takes a window."""
    torch.manual_seed(0)
    space = SPACE[:rank]
    q = torch.randn(1, *space, 2, 4)
    window = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "is_causal": causal}
    first = q.movedim(-2, 1)
    attn = QK[rank](first, first, **window).softmax(-1)
    layout = VarlenLayout([space, space])
    packed = q[0].flatten(0, -3).repeat(2, 1, 1)
    layer = MODULES[rank](8, 2, **window, qk_scale=scale)
    return [
        FUSED[rank](q, q, q, **window, scale=scale),
        attn,
        AV[rank](attn, first, **window),
        VARLEN[rank](packed, packed, packed, layout, **window, scale=scale),
        layer(q.flatten(-2)),
    ]


@pytest.mark.parametrize("rank", FUSED)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences(rank, kind):
    make = SEQUENCES[kind]
    plain = (3, 2, 3)[:rank], (1, 2, 1)[:rank], (2, 1, 2)[:rank]
    expected = every_call(rank, *plain, False, 0.5)
    found = every_call(rank, *(make(*each) for each in plain), False, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("rank", FUSED)
def test_ranges(rank):
    sizes = tuple(range(2, 2 + rank))
    expected = every_call(rank, sizes, 1, 1, False, None)
    found = every_call(rank, range(2, 2 + rank), range(1, 2) if rank == 1 else 1, 1, False, None)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("rank", FUSED)
@pytest.mark.parametrize("kind", TRUTHS)
def test_truths(rank, kind):
    make = TRUTHS[kind]
    for plain in (True, (True, False, True)[:rank]):
        given = make(plain) if plain is True else Config(*map(make, plain))
        expected = every_call(rank, 3, 2, 1, plain, None)
        found = every_call(rank, 3, 2, 1, given, None)
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    q = torch.randn(1, 5, 2, 4)
    causal = natten.attention(q, q, q, is_causal=True)
    assert torch.equal(natten.attention(q, q, q, is_causal=make(True)), causal)


@pytest.mark.parametrize("kind", NUMBERS)
def test_single_numbers(kind):
    make = NUMBERS[kind]
    expected = every_call(2, 3, 2, 1, False, None)
    found = every_call(2, make(3), make(2), make(1), False, None)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    q = torch.randn(1, 6, 2, 4)
    assert torch.equal(natten.na1d(q, q, q, 3, q_tile_shape=make(4)), natten.na1d(q, q, q, 3))
    deep = natten.NeighborhoodAttention3D(make(8), make(2), make(3), kernel_size_d=make(2))
    assert deep.kernel_size == (2, 3, 3) and type(deep.num_heads) is type(deep.head_dim) is int


@pytest.mark.parametrize("kind", SCALES)
def test_scales(kind):
    expected = every_call(2, 3, 1, 1, False, 0.5)
    found = every_call(2, 3, 1, 1, False, SCALES[kind])
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    q = torch.randn(1, 5, 2, 4)
    scaled = natten.attention(q, q, q, scale=0.5)
    assert torch.equal(natten.attention(q, q, q, scale=SCALES[kind]), scaled)


def test_a_learned_scale_is_refused_where_it_would_not_learn():
    q, scale = torch.randn(1, 5, 2, 4), torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ArgumentError, match=r"`scale` is a number.*multiply the query"):
        natten.na1d(q, q, q, 3, scale=scale)
    with torch.no_grad():
        natten.na1d(q, q, q, 3, scale=scale)


def test_a_sequence_that_changed_is_read_again():
    window, array = Config(3, 3), np.array([3, 3])
    tensor = torch.tensor([3, 3])
    q = torch.randn(1, 8, 8, 2, 4)
    for given in (window, array, tensor, [3, 3], (tensor[0], 3)):
        small = natten.na2d(q, q, q, given)
        assert Neighborhood.create(2, given).kernel_size == (3, 3)
        if isinstance(given, tuple):
            tensor[0] = 5
        else:
            given = given.items if given is window else given
            given[0] = 5
        changed = (tensor[0], 3) if isinstance(given, tuple) else given
        assert Neighborhood.create(2, changed).kernel_size == (5, 3)
        assert not torch.equal(natten.na2d(q, q, q, changed), small)
        tensor[:] = 3


REFUSED = {
    "kernel_size": [
        "3", b"\x03\x03", 3.0, True, np.True_, np.float32(3), (3, True), [3, np.True_], {3}, {3: 1},
        np.array([3.0, 3.0]), np.array([[3, 3]]), torch.tensor([3.0, 3.0]), iter((3, 3)),
        torch.tensor([True, True]), torch.tensor(3, device="meta"), Config("3", 3),
    ],
    "is_causal": [
        1, 0.0, "yes", np.int64(1), (1, 0), np.array([1, 0]), torch.tensor(1),
        torch.tensor(True, device="meta"),
    ],
    "scale": [
        "0.5", b"1", True, np.True_, torch.tensor(True), 1j, torch.tensor(1j), [0.5],
        np.array([0.5, 0.5]), torch.ones(2), torch.ones((), device="meta"), np.array("0.5"),
        np.float32("nan"), float("inf"),
    ],
    "q_tile_shape": ["44", (4, True), np.array([4.0, 4.0]), (4, np.True_), [0, 4]],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_is_still_refused(name):
    q = torch.randn(1, 8, 8, 2, 4)
    for given in REFUSED[name]:
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            natten.na2d(q, q, q, **{"kernel_size": 3, name: given})


def test_elsewhere():
    """Simulator, pictures, documents and fit_window read such arguments in the same way."""
    three, shape = np.int64(3), np.array([8, 8])
    expected = simulate((8, 8), 3, 1, 1, (True, False), batch=2, head_dim=64, q_tile=(2, 2))
    found = simulate(
        shape, three, range(1, 3)[:1][0], Config(1, 1), (np.True_, np.False_),
        batch=np.int32(2), head_dim=np.int64(64), q_tile=np.array([2, 2]),
    )  # fmt: skip
    assert found == expected
    assert Device("x", 1, 1, 1, q_tile=np.int64(64)) == Device("x", 1, 1, 1, q_tile=64)
    assert recommend((16, 16), 4, near=np.float32(0.25)) == recommend((16, 16), 4)
    picture = draw_neighborhood((8, 8), 3, query=(2, 5))
    assert draw_neighborhood(shape, three, query=np.array([2, 5])) == picture
    tiles = {"q_tile": (2, 2), "kv_tile": (1, 2)}
    arrays = {name: np.array(tile) for name, tile in tiles.items()}
    assert draw_mask(Config(8, 8), three, **arrays) == draw_mask((8, 8), 3, **tiles)
    assert natten.fit_window(shape, three) == natten.fit_window((8, 8), 3)
    shapes = ((4, 6), (3, 3))
    for given in (np.array(shapes), [Config(4, 6), np.array([3, 3])], torch.tensor(shapes)):
        layout = VarlenLayout(given)
        assert layout.shapes == shapes and layout.offsets.tolist() == [0, 24, 33]
    assert VarlenLayout(np.array([4, 5])).shapes == ((4,), (5,))
    for wrong in ("8", 8.0, True, np.array([8.0]), np.True_):
        for refuses in (
            lambda x: simulate(x, 1),
            lambda x: draw_neighborhood(x, 1),
            lambda x: VarlenLayout([x]),
            lambda x: natten.NeighborhoodAttention1D(x, 1, 1),
        ):
            with pytest.raises(ArgumentError):
                refuses(wrong)


def test_walks(tmp_path):
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page, queries in zip(pages, ([(0, 0), (1, 2)], np.array([[0, 0], [1, 2]]))):
        draw_walk((3, 4), 3, path=page, queries=queries)
    assert pages[0].read_text() == pages[1].read_text()


@pytest.mark.parametrize(
    "given",
    [[3, 5], range(3, 6, 2), Config(3, 5), torch.Size((3, 5)), np.int64(3), (np.int64(3), 5)],
)
def test_compiled(given):
    if RELEASE < (2, 9) and isinstance(given, Config):
        pytest.skip("its compiler reads no sequences of other libraries")
    if RELEASE < (2, 12) and (isinstance(given, np.integer) or isinstance(given[0], np.integer)):
        pytest.skip("its compiler reads no numbers of NumPy")
    torch._dynamo.reset()
    q = torch.randn(1, 8, 8, 2, 4)

    def function(q):
        return natten.na2d(q, q, q, given, is_causal=[True, False], scale=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.allclose(function(q), compiled(q), atol=1e-6)
