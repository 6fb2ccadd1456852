"""Layouts on several ranks, by gloo on a CPU: the numbers of one device."""

import random
import time
from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import Failures, Pool
from sharded_problems import Sharded, draw, errors, loss_of
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from natten import Neighborhood, distributed
from natten.distributed import collectives
from natten.distributed.shards import Sharding, halo_plan
from natten.neighborhood import window_mask

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def ranks():
    pool = Pool(4)
    yield pool
    pool.close()


# --- which keys a shard needs ---


def random_sharding(rng):
    boundary = rng.choice(["shift", "truncate", "circular"])
    k, d, r = rng.randint(1, 9), rng.choice([1, 1, 2, 3, 4]), rng.choice([1, 1, 2, 3])
    s = rng.randint(1, k) if rng.random() < 0.5 else 1
    causal = boundary != "circular" and rng.random() < 0.3
    if boundary == "circular":
        length = s * d * rng.randint(-(-k // s), 12)
    elif boundary == "truncate":
        length = rng.randint(1, 60)
    else:
        length = rng.randint(k * d, k * d + 50)
    cuts = sorted(rng.randint(0, length) for _ in range(rng.randint(1, 3)))
    sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, length]))
    return Sharding(Neighborhood.create(1, k, s, d, causal, boundary, r), (sizes,))


@pytest.mark.parametrize("seed", range(4))
def test_parts_of_keys_have_the_windows_of_the_whole(seed):
    rng = random.Random(seed)
    inner = 0
    for _ in range(150):
        sharding = random_sharding(rng)
        rule, (length,) = sharding.rule, sharding.shape
        (r,) = rule.queries_per_key
        whole = window_mask(rule, (r * length,), (length,)).int()
        coordinates = tuple((i,) for i in range(len(sharding.sizes[0])))
        for rank in range(len(coordinates)):
            plan = halo_plan(sharding, coordinates, rank)
            first, last = sharding.own(0, rank)
            tokens = []
            for segment in plan.segments[0]:
                begin = sharding.own(0, segment.owner)[0]
                tokens += range(begin + segment.own[0], begin + segment.own[1])
            pieces = [x for pair in plan.border for x in pair if x] + [plan.core] * bool(plan.core)
            seen = []
            for piece in pieces:
                (a, b), (lo, hi) = piece.queries[0], piece.keys[0]
                piece.rule.check((b - a,), (hi - lo,))
                mask = torch.zeros(b - a, length, dtype=torch.int32)
                part = window_mask(piece.rule, (b - a,), (hi - lo,)).int()
                mask.index_add_(1, torch.tensor(tokens[lo:hi]), part)
                assert torch.equal(mask, whole[r * first + a : r * first + b])
                seen += range(a, b)
                if piece is plan.core and plan.is_inner:
                    inner += 1
                    assert all(first <= token < last for token in tokens[lo:hi])
            assert sorted(seen) == list(range(r * (last - first)))
    assert inner > 100


def test_inner_queries_and_border_are_whole_tiles():
    def queries(window, sizes, **options):
        rule = Neighborhood.create(1, window, **options)
        plan = halo_plan(Sharding(rule, (sizes,)), tuple((i,) for i in range(len(sizes))), 1)
        assert plan.is_inner
        before, after = plan.border[0]
        return [piece.queries[0] for piece in (before, plan.core, after) if piece is not None]

    assert queries(21, (90, 90, 90)) == [(0, 16), (16, 74), (74, 90)]
    assert queries(21, (90, 90)) == [(0, 16), (16, 90)]
    assert queries(21, (180, 180), dilation=2) == [(0, 32), (32, 180)]
    assert queries(21, (90, 90), queries_per_key=4) == [(0, 40), (40, 360)]
    # With 16 tokens before them, less than three quarters of the inner ones were left.
    assert queries(21, (25, 25)) == [(0, 10), (10, 25)]


def test_a_halo_is_what_windows_reach():
    rule = Neighborhood.create(2, (5, 3))
    sharding = Sharding(rule, ((8, 8, 8), (10, 10)))
    plan = halo_plan(sharding, tuple(product(range(3), range(2))), 2)  # the middle of the left
    assert [[(s.owner, s.own) for s in axis] for axis in plan.segments] == [
        [(0, (6, 8)), (1, (0, 8)), (2, (0, 2))],
        [(0, (0, 10)), (1, (0, 1))],
    ]
    assert plan.core.queries == ((2, 6), (0, 9))  # the last column needs the rank on the right


# --- copies ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 24])
def test_copies_keep_every_bit(dtype, channels):
    """Whether words can be larger than numbers or not, and wherever tokens begin."""
    bits = torch.randint(0, 256, (2, 24, channels * dtype.itemsize), dtype=torch.uint8)
    x = bits > 99 if dtype == torch.bool else bits.view(dtype)
    for first in range(4):
        parts = x[:, first : first + 9], x[:, 5:], x
        found, expected = collectives.joined(parts, 1), torch.cat(parts, 1)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "boxes",
    [
        (((0, 3), (0, 4)), ((3, 5), (0, 4))),  # each token once
        (((0, 3), (0, 4)), ((2, 5), (1, 4))),  # some twice, some never
        (((1, 4), (1, 3)), ((1, 1), (0, 4))),  # one is empty
    ],
)
def test_gradients_of_boxes(boxes):
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        parts = collectives.parts_of(x, boxes)
        joined = collectives.joined([part.flatten(1, 2) for part in parts], 1)
        return joined.square(), collectives._Packed.apply(x.dtype, *parts).sin()

    torch.autograd.gradcheck(run, x)
    torch.autograd.gradgradcheck(run, x)


# --- the numbers of one device ---


def mesh_of(*sizes):
    count = 1
    for size in sizes:
        count *= size
    return DeviceMesh("cpu", torch.arange(count).reshape(sizes))  # made by all ranks together


def worst_of(sizes, problems):
    """The largest difference in each problem, on ranks that are in the mesh."""
    mesh = mesh_of(*sizes)
    if mesh.get_coordinate() is None:
        return []
    return [max(errors(problem, mesh).items(), key=lambda x: x[1]) for problem in problems]


def check(ranks, sizes, problems):
    for found in ranks(worst_of, sizes, problems):
        for problem, (name, error) in zip(problems, found):
            assert error < 1e-12, (problem, name)


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (2, 2)])
def test_random_problems(ranks, sizes):
    check(ranks, sizes, [draw(seed, sizes) for seed in range(40)])


def one(shape, sizes, axis=0, **options):
    """A problem of which one axis is split."""
    names = ("kernel_size", "stride", "dilation", "is_causal", "boundary", "queries_per_key")
    window = {name: options.pop(name) for name in names if name in options}
    return Sharded(shape, window, {axis: 0}, {axis: sizes}, **options)


CASES = {
    "uneven": one((11, 5), (6, 3, 2), kernel_size=5),
    "narrower than the window": one((9, 4), (1, 6, 2), kernel_size=(7, 3)),
    "windows over all ranks": one((9,), (3, 3, 3), kernel_size=9),
    "an empty shard in the middle": one((8,), (5, 0, 3), kernel_size=5),
    "all on one rank": one((8,), (0, 8, 0), kernel_size=5, has_bias=True, additional=2),
    "dilation across shards": one((24,), (7, 9, 8), kernel_size=5, dilation=4),
    "uneven dilation groups": one((23,), (8, 8, 7), kernel_size=5, dilation=4),
    "strides across shards": one((20,), (7, 6, 7), kernel_size=7, stride=4),
    "blocks": one((20,), (8, 8, 4), kernel_size=4, stride=4),  # nothing travels
    "causal": one((14, 3), (5, 5, 4), kernel_size=(6, 3), is_causal=(True, False)),
    "causal strides": one((18,), (5, 7, 6), kernel_size=6, stride=3, is_causal=True),
    "truncated": one((10,), (3, 4, 3), kernel_size=13, boundary="truncate"),
    "a ring": one((12, 3), (3, 5, 4), kernel_size=(5, 3), boundary=("circular", "shift")),
    "a ring as long as the window": one((9,), (3, 3, 3), kernel_size=9, boundary="circular"),
    "a ring of two ranks and one": one((8,), (6, 2, 0), kernel_size=7, boundary="circular"),
    "a ring that is not split": one((3, 12), (1, 1, 1), kernel_size=3, boundary="circular"),
    "the last axis": one((3, 4, 12), (5, 3, 4), axis=2, kernel_size=(3, 3, 5), has_bias=True),
    "finer queries": one((10,), (3, 3, 4), kernel_size=5, queries_per_key=3),
    "masks": one((12,), (4, 4, 4), kernel_size=5, is_masked=True, additional=3),
    "grouped queries": one((12,), (4, 4, 4), kernel_size=5, heads=6, heads_kv=2, value_dim=3),
    "no batch": one((12,), (4, 4, 4), kernel_size=5, batch=0, has_bias=True, additional=2),
    "heads": one(
        (12, 2), (4, 5, 3), kernel_size=(5, 1), heads=6, heads_kv=3, method="heads",
        has_bias=True, is_masked=True, additional=2,
    ),
    "heads, with an empty shard": one((12,), (12, 0, 0), kernel_size=5, heads=3, heads_kv=3,
                                      method="heads"),
}  # fmt: skip


def test_cases_by_hand(ranks):
    check(ranks, (3,), list(CASES.values()))


def corners(mesh_sizes):
    window = {"kernel_size": (5, 5), "boundary": ("circular", "shift")}
    return Sharded((8, 9), window, {0: 1, 1: 0}, {0: (4, 4), 1: (5, 4)}, has_bias=True)


def test_corners(ranks):
    check(ranks, (2, 2), [corners((2, 2))])


def bits():
    mesh = mesh_of(4)
    problem = draw(5, (4,), batch=2, has_bias=True, additional=3, dtype=torch.float32)
    found = []
    for _ in range(3):
        local = problem.local(mesh, problem.tensors("cpu"))
        out, lse = problem.run(mesh, local)
        out.sum().backward()
        found.append([out, lse, *(x.grad for x in local.values() if x is not None and x.is_leaf
                                  and x.requires_grad)])  # fmt: skip
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_the_same_bits_on_every_run(ranks):
    assert ranks(bits) == [True] * 4


# --- derivatives beyond the first, and memory ---


def penalty(run, tensors):
    """A loss of gradients, and its own gradients."""
    out, lse = run()
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)


def second_derivatives(method):
    mesh = mesh_of(2)
    if mesh.get_coordinate() is None:
        return 0.0
    problem = one((10, 3), (6, 4), kernel_size=(5, 3), method=method)
    whole = problem.tensors("cpu")
    names = ("query", "key", "value")
    wanted = penalty(lambda: natten_call(problem, whole), [whole[name] for name in names])
    local = problem.local(mesh, whole)
    got = penalty(lambda: problem.run(mesh, local), [local[name] for name in names])
    return max(float((a[problem.part(mesh)] - b).abs().max()) for a, b in zip(wanted, got))


def natten_call(problem, tensors):
    import natten

    call = getattr(natten, f"na{len(problem.shape)}d")
    return call(**tensors, **problem.window, return_lse=True)


@pytest.mark.parametrize("method", ["halo", "heads"])
def test_second_derivatives(ranks, method):
    assert max(ranks(second_derivatives, method)) < 1e-12


def checkpointed():
    mesh = mesh_of(4)
    problem = draw(8, (4,), batch=1, has_bias=True)
    found = []
    for again in (False, True):
        local = problem.local(mesh, problem.tensors("cpu"))

        def run(query, local=local):
            return problem.run(mesh, {**local, "query": query})

        query = local["query"]
        out, lse = checkpoint(run, query, use_reentrant=False) if again else run(query)
        loss_of(out, lse, (torch.ones_like(out), torch.ones_like(lse))).backward()
        found.append([local[name].grad for name in ("query", "key", "value", "rpb")])
    return all(torch.equal(a, b) for a, b in zip(*found))


def test_checkpoint(ranks):
    assert ranks(checkpointed) == [True] * 4


class Recorder(TorchDispatchMode):
    """Names of operators, and the most numbers that a new tensor has."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket._qualified_op_name)
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def recorded():
    mesh = mesh_of(4)
    problem = one((64, 6), (16, 16, 16, 16), kernel_size=(5, 3), batch=1)
    local = problem.local(mesh, problem.tensors("cpu"))
    problem.run(mesh, local)  # ranks agree
    with Recorder() as forward:
        out, _ = problem.run(mesh, local)
    with Recorder() as backward:
        out.sum().backward()
    kept = ("attention", "all_to_all_single", "wait_tensor", "attention_backward")
    names = [
        [name.partition("::")[2] for name in recorder.names if name.endswith(kept)]
        for recorder in (forward, backward)
    ]
    return names, max(forward.largest, backward.largest), local["key"].numel()


def test_keys_travel_while_inner_queries_run_and_nothing_is_as_large_as_the_whole(ranks):
    for rank, ((forward, backward), largest, own) in enumerate(ranks(recorded)):
        border = 2 if rank in (1, 2) else 1
        assert forward == ["all_to_all_single", "attention", "wait_tensor", *["attention"] * border]
        grads = ["attention_backward"] * border
        assert backward == [*grads, "all_to_all_single", "attention_backward", "wait_tensor"]
        halo = 2 * 2 * 6 * 8  # two rows on two sides, keys or values of two heads of 4
        assert largest <= own + halo < 4 * own


# What waits for a GPU, because the host reads what it has computed.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


def reads(method):
    """Which operators of a step read data, once ranks have agreed and plans are made."""
    mesh = mesh_of(4)
    problem = one(
        (32, 5), (7, 9, 8, 8), kernel_size=(5, 3), boundary=("circular", "shift"), heads=8,
        heads_kv=4, has_bias=True, is_masked=True, additional=2, method=method,
    )  # fmt: skip
    local = problem.local(mesh, problem.tensors("cpu"))
    problem.run(mesh, local)
    with Recorder() as step:
        out, lse = problem.run(mesh, local)
        (out.sum() + lse.sum()).backward()
    assert any(name.endswith("all_to_all_single") for name in step.names)
    return READS.intersection(step.names)


@pytest.mark.parametrize("method", ["halo", "heads"])
def test_the_host_reads_nothing(ranks, method):
    assert ranks(reads, method) == [set()] * 4


# --- mistakes ---


def call(**options):
    mesh = mesh_of(4)
    q = torch.randn(1, 8, 4, 2, 4)
    given = {"mesh": mesh, "shard": {0: 0}, "kernel_size": 3, **options}
    return distributed.na2d(q, q, q, **given)


def call_with_another_shape_on_rank_1(shape):
    q = torch.randn(shape if dist.get_rank() == 1 else (1, 8, 4, 2, 4))
    return distributed.na2d(q, q, q, (1, 3), mesh=mesh_of(4), shard={0: 0})


def messages(pool, *job, **options):
    with pytest.raises(Failures) as caught:
        pool(*job)
    return caught.value.messages


@pytest.mark.parametrize(
    ("common", "given", "message"),
    [
        ({"kernel_size": 2}, {"kernel_size": 5}, "must not exceed"),
        ({"kernel_size": (3, 2)}, {"scale": 0.25}, "`scale` must be the same"),
        ({"kernel_size": (5, 1)}, {"method": "halo"}, "`method` must be the same"),
        ({"kernel_size": (7, 1)}, {"stride": (2, 1)}, "kernel_size, stride"),
    ],
)
def test_a_call_that_differs_raises_on_all_ranks(ranks, common, given, message):
    found = messages(ranks, differ, common, {**common, **given})
    assert all(each and "ArgumentError" in each and message in each for each in found)


def differ(options, options_of_rank_2):
    return call(**(options_of_rank_2 if dist.get_rank() == 2 else options))


@pytest.mark.parametrize(
    "shape", [(1, 9, 4, 2, 4), (1, 8, 4, 4, 4), (2, 8, 4, 2, 4), (1, 8, 4, 2, 8)]
)
def test_a_shape_that_differs_raises_on_all_ranks(ranks, shape):
    found = messages(ranks, call_with_another_shape_on_rank_1, shape)
    assert all(each and "must be the same on every rank" in each for each in found)


BAD = [
    ({"shard": {}}, "`shard` must name at least one axis"),
    ({"shard": {2: 0}}, "`shard` must have different axes from 0 to 1"),
    ({"shard": {0: 0, -2: 0}}, "`shard` must have different axes"),
    ({"shard": {0: 1}}, "`shard` must map axes to dimensions of the mesh"),
    ({"shard": {0: "space"}}, "`shard` must map axes to dimensions of the mesh"),
    ({"mesh": None}, "`mesh` must be a torch.distributed.DeviceMesh"),
    ({"sizes": {0: [8, 8]}}, "`sizes` must have one number for each of the 4 ranks"),
    ({"sizes": {0: [8, 8, 8, -8]}}, "`sizes` must have the tokens of each rank"),
    ({"sizes": {1: [4]}}, "`sizes` must be a dict whose axes are among"),
    ({"sizes": {0: [9, 9, 9, 9]}}, "`key` must have the tokens that `sizes` gives"),
    ({"method": "ring"}, "`method` must be one of"),
    ({"method": "heads"}, "divide"),
    ({"kernel_size": 33}, "must not exceed the input"),
    ({"kernel_size": 3, "window": 3}, "`window` is no argument"),
    ({"query_offset": 0}, "`query_offset` is no argument"),
]


def all_wrong():
    found = []
    for options, message in BAD:
        try:
            call(**options)
            found.append((options, "nothing raised"))
        except ValueError as error:
            if message not in str(error):
                found.append((options, str(error)))
    return found


def test_bad_arguments(ranks):
    assert ranks(all_wrong) == [[]] * 4


def two_faults():
    """What rank 1 does wrong in its first call, and in a call like the one before."""
    found = []
    q = torch.randn(1, 8, 2, 4)
    options = {"mesh": mesh_of(2), "shard": {0: 0}}
    wrong = q.int() if dist.get_rank() == 1 else q
    for key in (wrong, q, q, wrong):
        begin = time.monotonic()
        try:
            distributed.na1d(q, key, q, 5, **options)
            found.append(("", 0.0))
        except (RuntimeError, ValueError) as error:
            found.append((f"{type(error).__name__}: {error}", time.monotonic() - begin))
    return found


def test_a_fault_on_one_rank_ends_the_others():
    pool = Pool(2, timeout=5)
    try:
        here, there = pool(two_faults)
    finally:
        pool.close()
    # The first call is compared, so that all ranks know what is wrong.
    assert here[0][0].startswith("ArgumentError: natten.distributed.na1d: rank 1")
    assert "`key` must have a floating-point dtype" in here[0][0]
    assert there[0][0].startswith("ArgumentError: `key` must have a floating-point dtype")
    assert here[1] == here[2] == there[1] == there[2] == ("", 0.0)
    # Later it is raised at once, and the other rank waits as long as its group allows.
    assert there[3][0].startswith("ArgumentError: `key`") and there[3][1] < 2
    assert "natten.distributed.na1d: a rank does not answer" in here[3][0] and here[3][1] < 9
