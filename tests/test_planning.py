"""Plans of layouts on several ranks: counted by brute force, and what really travels."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Pool
from torch.utils._python_dispatch import TorchDispatchMode

from natten import ArgumentError, Neighborhood
from natten.distributed import neighborhood_attention_generic, plan
from natten.neighborhood import window_mask

pytestmark = pytest.mark.xdist_group("distributed")


def own_tokens(sizes: tuple[tuple[int, ...], ...], at: tuple[int, ...], fine: tuple[int, ...]):
    """Whether each token of the layout is a rank's, flat."""
    found = torch.ones(1, dtype=torch.bool)
    for each, i, r in zip(sizes, at, fine):
        ends = [0, *accumulate(each)]
        token = torch.arange(r * ends[-1])
        along = (token >= r * ends[i]) & (token < r * ends[i + 1])
        found = (found[:, None] & along).flatten()
    return found


def drawn(draw: random.Random, is_plain: bool) -> tuple[dict[str, Any], dict[int, tuple[int, ...]]]:
    """A random layout, and how it is split; a plain one slides by single tokens, both ways."""
    rank = draw.choice((1, 2))
    names = ("shift", "truncate") if is_plain else ("shift", "truncate", "circular")
    axes = []
    for _ in range(rank):
        boundary, d = draw.choice(names), 1 if is_plain else draw.choice((1, 1, 2))
        causal = not is_plain and boundary != "circular" and draw.random() < 0.3
        k = draw.randint(1, 5)
        s = 1 if is_plain else draw.randint(1, k)
        n = draw.randint(k * d, 18)
        if boundary == "circular":
            n = -(-n // (s * d)) * s * d
        axes.append((n, k, s, d, causal, boundary, draw.choice((1, 1, 2))))
    names = ("shape", "kernel_size", "stride", "dilation", "is_causal", "boundary")
    problem = dict(zip((*names, "queries_per_key"), map(tuple, zip(*axes))))
    ranks = {}
    for axis in draw.sample(range(rank), draw.randint(1, rank)):
        cuts = sorted(draw.randint(0, axes[axis][0]) for _ in range(draw.randint(0, 2)))
        ends = (0, *cuts, axes[axis][0])
        ranks[axis] = tuple(b - a for a, b in pairwise(ends))
    return problem, ranks


@pytest.mark.parametrize("seed", range(60))
def test_loads_are_those_of_the_mask(seed: int) -> None:
    is_plain = seed < 20
    problem, ranks = drawn(random.Random(seed), is_plain)
    shape, fine = problem["shape"], problem["queries_per_key"]
    names = ("kernel_size", "stride", "dilation", "is_causal", "boundary", "queries_per_key")
    rule = Neighborhood.create(len(shape), *(problem[name] for name in names))
    sizes = tuple(ranks.get(axis, (n,)) for axis, n in enumerate(shape))
    mask = window_mask(rule, tuple(r * n for r, n in zip(fine, shape)), shape)
    count = len(list(product(*sizes)))
    found = plan(**problem, ranks=ranks, batch=3, heads=2 * count, head_dim=4, value_dim=6)
    key = 3 * 2 * count * (4 + 6) * 2  # bytes of a key and its value
    halo = found["halo"].loads
    for load in halo:
        queries = mask[own_tokens(sizes, load.at, fine)]
        own = own_tokens(sizes, load.at, (1,) * len(fine))
        assert load.pairs == 3 * 2 * count * queries.sum()
        assert load.keys == own.sum()
        foreign = int((queries.any(0) & ~own).sum())
        inside = queries[~(queries & ~own).any(1)]
        assert 0 <= load.inner_pairs <= 3 * 2 * count * inside.sum()
        assert load.extra_keys == foreign if is_plain else load.extra_keys >= foreign
        assert load.forward.received == load.backward.sent == key * load.extra_keys == load.halo
    assert sum(load.forward.sent for load in halo) == sum(load.forward.received for load in halo)
    by_heads = found["heads"].loads
    assert {load.inner_pairs for load in by_heads} == {0}
    for load in by_heads:
        assert load.pairs == 3 * 2 * mask.sum()
        others = sum(x.keys for x in by_heads) - load.keys
        query, value = (3 * 2 * fine_keys(fine) * dim * 2 for dim in (4, 6))
        share = query + key // count
        arriving = others * share + (count - 1) * load.keys * value
        assert load.forward.received == load.backward.sent == arriving
    assert sum(x.forward.sent for x in by_heads) == sum(x.forward.received for x in by_heads)


def fine_keys(fine: tuple[int, ...]) -> int:
    return int(torch.tensor(fine).prod())


class Counting(TorchDispatchMode):
    """Counts the bytes that this rank sends to others."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(func):
            lengths = list(args[2])
            del lengths[dist.get_rank()]
            self.sent += sum(lengths) * args[0].itemsize
        return func(*args, **(kwargs or {}))


WINDOW = {"kernel_size": (5, 3), "stride": (2, 1), "is_causal": (False, True)}
SIZES = (5, 9)


def sent_bytes(method: str) -> tuple[int, int]:
    """What this rank sends in forward and backward."""
    mesh = dist.init_device_mesh("cpu", (2,))
    rows = SIZES[dist.get_rank()]
    tensors = [torch.randn(2, rows, 7, 4, dim, requires_grad=True) for dim in (6, 6, 8)]
    with Counting() as forward:
        out = neighborhood_attention_generic(
            *tensors, **WINDOW, mesh=mesh, shard={0: 0}, sizes={0: SIZES}, method=method
        )
    with Counting() as backward:
        out.sum().backward()
    return forward.sent, backward.sent


@pytest.mark.parametrize("method", ["halo", "heads"])
def test_as_many_bytes_travel_as_the_plan_says(method: str, two_ranks: Pool) -> None:
    found = plan(
        (14, 7), **WINDOW, ranks={0: SIZES}, batch=2, heads=4, head_dim=6, value_dim=8,
        dtype=torch.float32,
    )  # fmt: skip
    loads = found[method].loads
    assert two_ranks(sent_bytes, method) == [(x.forward.sent, x.backward.sent) for x in loads]
    assert all(min(x.forward) > 0 for x in loads)


def test_times_by_hand() -> None:
    """Two ranks of 8 tokens, window 3: each has one foreign key and 8 * 3 = 24 pairs, of which 21
    or, where the window shifts at the border, as many are inner ones."""
    rates = {"bandwidth": 4.0, "latency": 2.0, "flops": 6.0}
    found = plan(16, 3, ranks={0: 2}, head_dim=1, heads=2, dtype=torch.float32, **rates)
    halo, heads = found["halo"], found["heads"]
    assert [(x.extra_keys, x.pairs, x.inner_pairs) for x in halo.loads] == [(1, 48, 42)] * 2
    # A key and its value are 2 * 2 * 4 = 16 bytes; a pair has 4 operations forward, 10 backward.
    assert halo.forward is not None and halo.backward is not None
    assert halo.forward.communication == halo.backward.communication == 2 + 16 / 4
    assert halo.forward.compute == halo.forward.time == 48 * 4 / 6
    assert halo.backward.time == 48 * 10 / 6
    assert halo.forward.hidden == halo.forward.efficiency == 1
    # With heads, half of 8 queries, keys and values of 2 * 4 bytes, then the output, go each way.
    assert heads.forward is not None and heads.loads[0].forward == (8 * 8 // 2 * 4,) * 2
    assert heads.forward.communication == 2 * 2 + 128 / 4
    assert heads.forward.time == heads.forward.compute + heads.forward.communication
    assert heads.forward.hidden == 0 and heads.forward.efficiency == 32 / (32 + 36)
    assert found.auto == "halo"


def test_a_narrow_shard_hides_nothing() -> None:
    found = plan(16, 9, ranks={0: 4}, bandwidth=1.0, flops=1.0)["halo"]
    assert found.forward is not None and found.forward.hidden == 0
    assert found.forward.time == found.forward.compute + found.forward.communication


def test_one_rank_moves_nothing() -> None:
    found = plan((5, 6), 3, ranks={}, bandwidth=1.0, flops=1.0)
    for method in ("halo", "heads"):
        (load,) = found[method].loads
        assert load.forward == load.backward == (0, 0)
        estimate = found[method].forward
        assert estimate is not None and estimate.efficiency == estimate.hidden == 1


def test_auto_is_the_method_of_fewer_bytes() -> None:
    wide = plan(64, 63, ranks={0: 8}, heads=8)
    narrow = plan(64, 3, ranks={0: 8}, heads=8)
    assert (wide.auto, narrow.auto) == ("heads", "halo")
    received = [max(x.forward.received for x in wide[m].loads) for m in ("halo", "heads")]
    assert received[0] > received[1]
    assert plan(64, 63, ranks={0: 8}, heads=6).auto == "halo"  # 8 does not divide 6


def test_axes_are_split_as_dtensors_split_them() -> None:
    for length, ranks in product(range(1, 12), range(1, 6)):
        chunks = torch.arange(length).chunk(ranks)
        sizes = [len(x) for x in chunks] + [0] * (ranks - len(chunks))
        assert plan(length, 1, ranks={-1: ranks}).sizes == (tuple(sizes),)


def test_a_plan_prints_and_becomes_json() -> None:
    found = plan((30, 48, 80), (18, 24, 24), ranks={1: 2, 2: 2}, heads=24, head_dim=128)
    lines = str(found).splitlines()
    assert lines[0].startswith("30x48x80 keys on 1x2x2 ranks, window 18x24x24, batch 1")
    assert "halo (auto)" in lines[2] and len({len(line) for line in lines[2:]}) == 1
    assert "time, forward" not in str(found) and found["halo"].forward is None
    timed = plan((30, 48, 80), (18, 24, 24), ranks={1: 2}, bandwidth=1e11, flops=1e14)
    assert "efficiency, backward" in str(timed)
    assert timed.as_dict()["methods"][0]["forward"]["efficiency"] <= 1
    with pytest.raises(KeyError):
        timed["heads"]  # one head on two ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 4}, "`ranks` must name"),
        ({"ranks": {2: 2}}, "different axes from 0 to 1"),
        ({"ranks": {0: 0}}, "number of ranks"),
        ({"ranks": {0: (3, 6)}}, "8 altogether"),
        ({"ranks": {0: (9, -1)}}, "8 altogether"),
        ({"ranks": {0: "2"}}, "number of ranks"),
        ({"ranks": {0: 2, -2: 4}}, "different axes"),
        ({"shape": (8, -1)}, "`shape`"),
        ({"kernel_size": 9}, "`kernel_size`"),
        ({"heads": 0}, "`heads`"),
        ({"heads": 6, "heads_kv": 4}, "multiple of `heads_kv`"),
        ({"dtype": torch.int32}, "`dtype`"),
        ({"bandwidth": 1e9}, "together"),
        ({"bandwidth": 0, "flops": 1}, "`bandwidth`"),
        ({"bandwidth": 1, "flops": "fast"}, "`flops`"),
        ({"latency": -1}, "`latency`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    good = {"shape": (8, 8), "kernel_size": 3, "ranks": {0: 2}}
    with pytest.raises(ArgumentError, match=message):
        plan(**(good | arguments))
