"""The tiled backend beyond its default choices: tile sizes, poison, views, memory, bits."""

import itertools
import math
import random
import weakref

import pytest
import torch
from helpers import CASES, RATIO, Case, assert_close, name_of, reference, tiled
from torch.utils._python_dispatch import TorchDispatchMode

import natten
from natten import caches, tiling
from natten.backends.sdpa import costs
from natten.backends.tiled import grids
from natten.inputs import Inputs, compute_dtype
from natten.neighborhood import Neighborhood

LARGE = [
    Case((700,), (31,), batch=1, heads=4, kv_heads=2, dim=32, value_dim=12, num_additional=5),
    Case((513,), (64,), stride=64, batch=1, dim=3, value_dim=65, is_causal=True, rpb=True),
    Case((400,), (13,), stride=4, dilation=7, batch=1, dim=12, value_dim=3, rpb=True),
    Case((33, 29), (7, 6), batch=1, dim=12, value_dim=12, rpb=True),
    Case(
        (30, 31), (5, 8), (2, 3), (3, 2), (True, False), 1, 6, 3, 4, 5, num_additional=3, rpb=True
    ),
    Case((9, 13, 14), (3, 5, 4), batch=1, dim=8, value_dim=16),
    Case(
        (8, 12, 11),
        (4, 2, 3),
        stride=(1, 2, 1),
        dilation=(2, 3, 1),
        is_causal=True,
        batch=1,
        heads=2,
        kv_heads=1,
        dim=4,
        value_dim=7,
        num_additional=1,
        rpb=True,
    ),
    # Wide values with a large dilation: upstream's illegal memory access (issue 335).
    Case((33, 37), (2, 2), dilation=16, batch=1, heads=1, kv_heads=1, dim=8, value_dim=384),
]


@pytest.fixture
def fresh_plans():
    """Drop all kept plans before and after a test that changes how plans are made."""
    forget_plans()
    yield
    forget_plans()


def forget_plans():
    caches.STORE.forget(lambda key: True)


def run(module, inputs, rule, grad_out, grad_lse):
    """Output, LSE and all gradients, by name."""
    out, lse = module.forward(Inputs(*inputs), rule, 0.4)
    grads = module.backward(grad_out, grad_lse, Inputs(*inputs), out, lse, rule, 0.4)
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    return {"out": out, "lse": lse} | dict(zip(names, grads))


def check(case, dtype=torch.float64, inputs=None):
    inputs = case.inputs(dtype) if inputs is None else inputs
    grad_out = torch.randn(*inputs[0].shape[:-1], case.value_dim, dtype=dtype)
    grad_lse = torch.randn(grad_out.shape[:-1], dtype=compute_dtype(dtype))
    oracle = [None if x is None else x.double() for x in inputs]
    expected = run(reference, oracle, case.rule, grad_out.double(), grad_lse.double())
    actual = run(tiled, inputs, case.rule, grad_out, grad_lse)
    for name, x in expected.items():
        ratio = RATIO[compute_dtype(dtype) if name == "lse" else dtype]
        assert_close(name, x, actual[name], ratio if name in ("out", "lse") else 2 * ratio)


@pytest.mark.parametrize("dtype", RATIO, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LARGE, ids=name_of)
def test_many_tiles(case, dtype):
    """Layouts are long enough that tiles repeat, their keys overlap, and borders are far apart."""
    check(case, dtype)


@pytest.mark.parametrize("case", [*CASES[:-1], LARGE[2], LARGE[6]], ids=name_of)
def test_every_tile_size_is_right(case, monkeypatch, fresh_plans):
    """The choice of tiles is a guess about machines, and must not change the result."""
    candidates, rng = tiling._candidates, random.Random(0)
    monkeypatch.setattr(tiling, "_candidates", lambda *args: [rng.choice(candidates(*args))])
    for _ in range(4):
        forget_plans()
        check(case)


@pytest.mark.parametrize("size", [3, 5, 11])
def test_tile_sizes_that_nothing_divides(size, monkeypatch, fresh_plans):
    monkeypatch.setattr(tiling, "_candidates", lambda *args: [size])
    for case in (*CASES[:-1], LARGE[4]):
        check(case)


@pytest.fixture
def poison():
    """Let every buffer start as NaN, and let PyTorch refuse what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chunk", [100, grids.CHUNK])
@pytest.mark.parametrize("case", [*CASES, LARGE[1], LARGE[4]], ids=name_of)
def test_no_garbage_is_read(case, chunk, monkeypatch, poison):
    monkeypatch.setattr(grids, "CHUNK", chunk)
    check(case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_unfused_reads_no_garbage(case, poison):
    """Masked slots and the former contents of memory are ignored, even if they are NaN."""
    q = torch.randn(case.batch, *case.space, case.heads, case.dim).double()
    attn = torch.randn(*q.shape[:-1], case.rule.window_tokens).double()
    valid = case.rule.attended_slots(case.space, case.space)[..., None, :]
    dirty = attn.masked_fill(~valid, math.nan)
    rpb = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size)).double()
    layout = case.space, case.rule
    calls = {
        "qk": ((q, q, case.rule),) * 2,
        "av": ((attn, q, case.rule), (dirty, q, case.rule)),
        "av_transposed": ((attn, q, *layout), (dirty, q, *layout)),
        "rpb_bias": ((rpb, case.space, *layout),) * 2,
        "rpb_bias_transposed": ((attn.sum(0), *layout), (dirty.sum(0), *layout)),
    }
    for name, (clean, given) in calls.items():
        expected = getattr(reference, name)(*clean)
        assert_close(name, expected, getattr(tiled, name)(*given), 1e-12)


@pytest.mark.parametrize("dtype", RATIO, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LARGE[2:5], ids=name_of)
def test_unfused_in_every_precision(case, dtype):
    """Inputs are views with heads before space in memory, and of every other channel."""

    def make(*shape):
        wide = torch.randn(shape[0], shape[-2], *shape[1:-2], 2 * shape[-1], dtype=dtype)
        return wide.movedim(1, -2)[..., ::2]

    q, k = (make(case.batch, *case.space, case.heads, case.dim) for _ in range(2))
    attn = make(*q.shape[:-1], case.rule.window_tokens)
    calls = {"qk": (q, k), "av": (attn, q), "av_transposed": (attn, q, case.space)}
    for name, args in calls.items():
        exact = (x.double() if isinstance(x, torch.Tensor) else x for x in args)
        expected = getattr(reference, name)(*exact, case.rule)
        actual = getattr(tiled, name)(*args, case.rule)
        assert actual.dtype == dtype
        assert_close(name, expected, actual, RATIO[dtype])


def test_expanded_everywhere():
    """Tokens, heads and batch entries may be expanded; gradients have the full shape."""
    case = Case((9, 8), (3, 4), dilation=2, is_causal=(False, True), num_additional=2, rpb=True)
    shapes = [x.shape for x in case.inputs().differentiable]
    check(case, inputs=[torch.randn(s[-1:]).double().expand(s) for s in shapes])


def test_large_scores_do_not_overflow():
    """With scores of thousands, exponentials that are not shifted would be infinite."""
    case = Case((40,), (7,), dim=4, num_additional=2, rpb=True)
    inputs = [100 * x for x in case.inputs(torch.float32).differentiable]
    oracle = [x.double() for x in inputs]
    expected = reference.forward(Inputs(*oracle), case.rule, 0.4)
    out, lse = tiled.forward(Inputs(*inputs), case.rule, 0.4)
    assert lse.abs().max() > 1e3
    assert_close("lse", expected[1], lse, 1e-5)
    # float32 scores near 10^4 are exact to 10^-3, and weights inherit this error.
    assert_close("out", expected[0], out, 2e-3)


class NoOverlap(TorchDispatchMode):
    """A mode that refuses in-place operations which write an element twice, in no fixed order."""

    writes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.endswith("_") and args[0].numel():
            place = torch.arange(args[0].untyped_storage().nbytes() // args[0].element_size())
            x = place.as_strided(args[0].shape, args[0].stride(), args[0].storage_offset())
            assert x.unique().numel() == x.numel(), func
            self.writes += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tile", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES[1:-1:3], ids=name_of)
def test_no_operation_writes_an_element_twice(case, tile, monkeypatch, fresh_plans):
    monkeypatch.setattr(tiling, "_candidates", lambda *args: [tile])
    inputs = case.inputs()
    out, lse = tiled.forward(Inputs(*inputs), case.rule, 0.4)
    attn = torch.randn(*inputs[0].shape[:-1], case.rule.window_tokens).double()
    with NoOverlap() as watch:
        tiled.backward(out, lse, inputs, out, lse, case.rule, 0.4)
        tiled.av_transposed(attn, out, case.space, case.rule)
    assert watch.writes > 10


def test_zero_additional_tokens():
    """An empty tensor adds no token, and its gradient is empty, too."""
    inputs = [
        x.requires_grad_() for x in Case((9,), (3,), num_additional=2).inputs() if x is not None
    ]
    q, k, v, ak, av = inputs
    none = natten.na1d(q, k, v, 3)
    out = natten.na1d(q, k, v, 3, additional_keys=ak[:, :0], additional_values=av[:, :0])
    assert torch.equal(out, none)
    grads, expected = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, none))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


class Peak(TorchDispatchMode):
    """A mode that records the peak of all bytes in storages that are made inside of it."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = set(), 0, 0

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.freed, key, storage.nbytes())
        return out


@pytest.mark.parametrize("kind", ["fused", "unfused"])
def test_peak_memory_of_forward_and_backward(kind):
    """The square of 32768 tokens would be 4 GB; six times q, k and v is allowed."""
    tokens, window = 32768, 9
    q, k, v = (torch.randn(1, tokens, 2, 16) for _ in range(3))
    peak = Peak()
    with peak:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        if kind == "fused":
            out = natten.na1d(*inputs, window)
        else:
            first = [x.movedim(-2, 1) for x in inputs]
            attn = natten.na1d_qk(first[0], first[1], window).softmax(-1)
            out = natten.na1d_av(attn, first[2], window)
        torch.autograd.grad(out.sum(), inputs)
    assert 2 * q.nbytes < peak.most < 6 * 3 * q.nbytes


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_tiling_is_found(seed):
    """A bound leaves out most of them."""
    rng = random.Random(seed)
    rank = rng.choice((1, 2, 3))
    shape = tuple(rng.randint(7, (300, 60, 20)[rank - 1]) for _ in range(rank))
    rule = Neighborhood.create(rank, 7, is_causal=rng.random() < 0.3)
    matrices, dim = rng.choice((1, 8, 64)), rng.choice((16, 64))
    options = costs._options(rule, shape, shape)

    def cost(axes):
        return costs.FORWARD.of(axes, math.prod(shape), matrices, dim, 0)

    floor = costs.FORWARD.floor(math.prod(shape), matrices, dim)
    found, tiling_found = tiling.cheapest(options, cost, floor)
    every = itertools.product(*([tiling.axis_cost(runs) for runs in axis] for axis in options))
    assert found == min(map(cost, every))
    assert found == cost([tiling.axis_cost(runs) for runs in tiling_found])


def test_layouts_share_masks():
    """Tiles look alike in layouts of many sizes, which then have one mask."""
    rule = Neighborhood.create(2, 7)
    looks = []
    for shape in ((40, 44), (56, 48)):
        x = torch.empty(1, *shape, 2, 32)
        looks.append({grid.looks for grid in grids.grids_for(rule, x, x, 32) if not grid.full})
    shared = looks[0] & looks[1]
    assert len(shared) > len(looks[0]) / 2
    for each in shared:
        assert grids._kept_mask(each) is grids._kept_mask(each)
