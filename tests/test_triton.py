"""The Triton kernels: on tiny problems through Triton's interpreter, and compiled without a GPU."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from natten.backends.triton import releases
from natten.neighborhood import Neighborhood

FOUND = releases.release(releases.version() or "")
pytestmark = pytest.mark.skipif(FOUND < releases.OLDEST, reason="needs Triton 3.4 or newer")
ROOT = pathlib.Path(__file__).parent.parent


def interpreted(code: str) -> str:
    """Run code with Triton's interpreter, which must be chosen before Triton is imported."""
    if FOUND < (3, 7) and releases.release(np.__version__) >= (2, 3):
        pytest.skip("the interpreter of this Triton needs NumPy before 2.3")
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


GUARDED = """
import ctypes, mmap, sys
import torch
from natten import na1d
torch.manual_seed(0)
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
pages = mmap.mmap(-1, 3 * page)
first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
for at in (first, first + 2 * page):
    assert libc.mprotect(ctypes.c_void_p(at), page, 0) == 0
for before in (True, False):
    at = first + page if before else first + 2 * page - 9 * 4
    rpb = torch.frombuffer((ctypes.c_float * 9).from_address(at), dtype=torch.float32).view(1, 9)
    rpb.copy_(torch.randn(1, 9))
    q, k, v = torch.randn(3, 1, 64, 1, 16)
    if sys.argv[1] == "nan":
        q[0, 30] = float("nan")
    else:
        q, k[0, 30] = q.abs() * 1e19, 3e19
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    na1d(q, k, v, 5, rpb=rpb, backend="triton").sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("scores", ["nan", "infinite"])
def test_bias_is_not_read_outside_of_itself(scores):
    """A masked score that is not finite is not -inf: the bias lies between unreadable pages."""
    interpreted(f"import sys; sys.argv[1:] = [{scores!r}]\n{GUARDED}")


NEGATED = """
import torch
from natten import na1d
from torch import _neg_view as negated
def results(*tensors):
    found = na1d(*tensors[:3], 3, rpb=tensors[3], return_lse=True, backend="triton")
    return *found, *torch.autograd.grad(found, tensors[:4], tensors[4:])
shapes = [(1, 9, 1, 16)] * 3 + [(1, 5), (1, 9, 1, 16), (1, 9, 1)]
plain = [torch.randn(shape) for shape in shapes]
views = [negated(-x).requires_grad_() for x in plain]
for a, b in zip(results(*[x.requires_grad_() for x in plain]), results(*views)):
    assert torch.equal(a, b)
"""


def test_views_that_negate_are_read_as_what_they_say():
    interpreted(NEGATED)


SWEEP = """
import torch
from helpers import Case, assert_close, reference, triton
from natten import tuning
from natten.inputs import Inputs
from natten.backends.triton import plan
from natten.neighborhood import Dense
torch.set_num_threads(1)
torch.manual_seed(0)
CASES = [
    Case((13,), (4,), dilation=3, dim=3, value_dim=8),
    Case((9,), (5,), stride=3, is_causal=True, heads=4, num_additional=3, dim=4, value_dim=4),
    Case((43,), (6,), dilation=2, batch=1, dim=4, rpb=True),  # tiles of groups of two lengths
    Case((7, 5), (3, 2), stride=(2, 1), dilation=(2, 2), batch=1, rpb=True),
    Case((4, 6), (3, 5), is_causal=(True, False), rpb=True, batch=1, kv_heads=1, num_additional=1),
    Case((3, 4, 5), (2, 3, 3), stride=(1, 2, 3), batch=1, dim=5),
    Case((4, 3, 4), (2, 2, 2), dilation=(2, 1, 2), is_causal=(False, True, False), batch=1),
]
def check(inputs, rule, **tiles):
    backends = (reference, {}), (triton, tiles)
    expected, actual = (m.forward(inputs, rule, 0.6, **options) for m, options in backends)
    grads = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    for a, b in zip(expected, actual):
        assert_close(f"forward {rule}", a, b, 1e-5)
    both = (m.backward(*grads, inputs, *x, rule, 0.6, **options)
            for (m, options), x in zip(backends, (expected, actual)))
    for a, b in zip(*both):
        assert_close(f"backward {rule}", a, b, 2e-5)
for case in CASES:
    check(case.inputs(torch.float32), case.rule)
for causal in (False, True):
    q, k = torch.randn(1, 9, 2, 4), torch.randn(1, 5, 1, 4)
    check(Inputs(q, k, k.clone()), Dense(causal))
# Tiles longer than an axis of one token: nothing beyond the bias is read.
case = Case((1, 9), (1, 4), is_causal=(False, True), rpb=True, batch=1)
inputs = case.inputs(torch.float32)
bias = inputs.rpb
around = torch.full((3, *bias.shape), float("inf"))
around[1] = bias
check(inputs._replace(rpb=around[1]), case.rule, tiles=(8, 8) * 4)
# The bias's gradient head by head, where sums of all have no room.
plan._MOST_SUMS = 1
tuning._forget_choices()
inputs = CASES[2].inputs(torch.float32)
check(inputs, CASES[2].rule)
assert len(plan.plan_for(*inputs[:5], CASES[2].rule, 0.6).rpb[1]) == 2
q = torch.randn(0, 5, 1, 4)
assert triton.forward(Inputs(q, q, q), CASES[0].rule, 1.0)[0].shape == q.shape
print("checked", len(CASES))
"""


def test_kernels_interpreted():
    assert "checked 7" in interpreted(SWEEP)


def test_rows_with_nothing_to_attend_interpreted():
    code = """
import pytest
chosen = "triton and (2 or additional)"
raise SystemExit(pytest.main(["-p", "no:cacheprovider", "tests/test_empty_rows.py", "-k", chosen]))
"""
    assert "2 passed" in interpreted(code)


UNFUSED = """
import torch
from helpers import Case, assert_close, reference, triton
torch.set_num_threads(1)
torch.manual_seed(0)
CASES = [
    Case((13,), (4,), dilation=3, dim=5),
    Case((11,), (5,), stride=4, is_causal=True),
    Case((7, 5), (3, 2), stride=(2, 1), dilation=(2, 2)),
    Case((4, 6), (3, 5), stride=(1, 3), is_causal=(True, False)),
    Case((3, 4, 5), (2, 3, 3), stride=(1, 2, 3), batch=1),
    Case((4, 1, 5), (2, 1, 2), dilation=(2, 1, 2), is_causal=(False, True, True), batch=1),
    Case((5,), (3,), batch=1, heads=1, dim=130),
]
for case in CASES:
    rule, space = case.rule, case.space
    q, k, v = (torch.randn(case.heads, case.batch, *space, case.dim).movedim(0, -2) for _ in "qkv")
    attn = torch.randn(case.batch, *space, rule.window_tokens, case.heads).transpose(-1, -2)
    # What is masked must not even be read.
    attn = attn.masked_fill(~rule.attended_slots(space)[..., None, :], float("nan"))
    rpb = torch.randn(case.heads, *(2 * n - 1 for n in rule.kernel_size))
    for name, args in {
        "qk": (q, k), "av": (attn, v), "av_transposed": (attn, q), "rpb_bias": (rpb, space),
        "rpb_bias_transposed": (attn[0],),
    }.items():
        expected, actual = (getattr(m, name)(*args, rule) for m in (reference, triton))
        assert_close(f"{name} {rule}", expected, actual, 1e-5)
empty = q[:0]
assert triton.qk(empty, empty, rule).shape == (0, 5, 1, 3)
print("checked", len(CASES))
"""


def test_unfused_kernels_interpreted():
    assert "checked 7" in interpreted(UNFUSED)


def test_choice_under_the_interpreter():
    code = """
import torch, natten
from natten import backends
q = torch.randn(1, 9, 1, 4)
assert "triton: runs" in backends.explain(q)
assert "float64" in backends.explain(q.double())
assert "head_dim 1 to 256" in backends.explain(torch.zeros(1, 9, 1, 300))
out = natten.na1d(q, q, q, 3)
assert torch.allclose(out, natten.na1d(q, q, q, 3, backend="reference"), atol=1e-6)
rpb = torch.randn(1, 5)
for scale in (0.0, -2.0, 1e-6, 30.0):  # the product starts from the bias over the scale
    problem = backends.Problem("attention", q.device, q.dtype, 4, 4, scale=scale, bias=True)
    reason = next(x for x in backends.BACKENDS if x.name == "triton").unsupported(problem)
    assert ("divides a bias" in str(reason)) == (scale == 0.0)
    out = natten.na1d(q, q, q, 3, scale=scale, rpb=rpb)
    right = natten.na1d(q, q, q, 3, scale=scale, rpb=rpb, backend="reference")
    assert torch.allclose(out, right, atol=1e-5), scale
print("done")
"""
    assert "done" in interpreted(code)


PACKED = """
import torch, natten
from helpers import assert_close, triton
torch.set_num_threads(1)
torch.manual_seed(0)
launches = []
one_launch = triton.packed_forward
triton.packed_forward = lambda *a: launches.append(a) or one_launch(*a)

def check(function, *tensors):
    leaves = [x.requires_grad_() for x in tensors]
    found = []
    for backend in ("triton", "tiled"):
        out, lse = function(*leaves, backend=backend, return_lse=True)
        finite = lse.isfinite()
        total = (out * weight(out)).sum() + (lse[finite] * weight(lse)[finite]).sum()
        found.append((out, lse, *torch.autograd.grad(total, leaves)))
    for actual, expected in zip(*found):
        assert_close("packed", expected, actual, 2e-5)

def weight(x):
    return torch.linspace(-1, 1, x.numel()).view(x.shape)

layout = natten.VarlenLayout([(0, 4), (5, 4), (3, 9), (7, 0), (1, 2)])
q, k, v = torch.randn(49, 4, 6), torch.randn(49, 2, 6), torch.randn(49, 2, 5)
for window in ((3, 4), (3, 2), (2, 1)), ((2, 5), 1, (2, 1), (True, False)):
    check(lambda *x, **y: natten.na2d_varlen(*x, layout, *window, **y), q, k, v)
q, k, v = torch.randn(1, 12, 2, 4), torch.randn(1, 11, 1, 4), torch.randn(1, 11, 1, 4)
lengths = dict(seqlens_Q=torch.tensor([5, 0, 4, 3]), seqlens_KV=torch.tensor([7, 2, 2, 0]))
for causal in (False, True):
    check(lambda *x, **y: natten.attention(*x, causal, **lengths, **y), q, k, v)
assert len(launches) == 4

def operator(*tensors, backend, return_lse):  # what compiled code calls
    options = *lengths.values(), None, None, -1, -1, 1, 0.5, backend, [0]
    return torch.ops.natten.packed_attention(*tensors, *options)

check(operator, q, k, v)
out = natten.attention(q, k, v, **lengths)
first, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
second, = torch.autograd.grad(first.square().sum(), q)
tiled = natten.attention(q, k, v, backend="tiled", **lengths)
first, = torch.autograd.grad(tiled.square().sum(), q, create_graph=True)
assert_close("second derivative", torch.autograd.grad(first.square().sum(), q)[0], second, 1e-4)

def derivatives(backend):
    q = torch.linspace(-1, 1, 96).view(1, 12, 2, 4).requires_grad_()
    run = lambda q: natten.attention(q, k, v, backend=backend, **lengths)
    out, ad = run(q), torch.autograd.forward_ad
    with ad.dual_level():
        dual = ad.make_dual(weight(out), weight(out).flip(1))
        pulled, = torch.autograd.grad(out, q, dual, retain_graph=True)
        tangent = ad.unpack_dual(pulled).tangent
        pushed = ad.unpack_dual(run(ad.make_dual(q.detach(), weight(q)))).tangent
    batch = torch.stack([weight(out), weight(out).flip(1)])
    return tangent, pushed, *torch.autograd.grad(out, q, batch, is_grads_batched=True)

for expected, actual in zip(derivatives("tiled"), derivatives("triton"), strict=True):
    assert_close("derivative", expected, actual, 2e-5)
print("packed", len(launches))
"""


def test_packed_documents_in_one_launch():
    assert "packed 7" in interpreted(PACKED)


WINDOWS = """
import torch, triton, triton.language as tl
from natten.backends.triton.windows import modes, queries_of, tiles_that_attend, window
from natten.neighborhood import Neighborhood

@triton.jit
def tiles(out, length, d, k, s, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr):
    i = tl.arange(0, 64)
    first, count = tiles_that_attend(length, d, k, s, i - 32, ROWS, COLUMNS, MODE)
    tl.store(out + i, first), tl.store(out + 64 + i, count)

def attending(rule, length, o, rows, columns, beyond):
    # First rows of tiles that attend the block ``o`` from them on, or so many keys beside it.
    found, (d,) = set(), rule.dilation
    for n in {-(-length // d), length // d}:
        start, end = rule.windows(0, torch.arange(n), n, n)
        f = torch.arange(n) // rows * rows
        attend = (start < f + o + columns + beyond) & (f + o - beyond < end)
        found |= set(f[attend].tolist())
    return found

def check_tiles(rule, mode, length, rows, columns):
    out = torch.zeros(2, 64, dtype=torch.int32)
    (k,), (s,), (d,) = rule.kernel_size, rule.stride, rule.dilation
    tiles[(1,)](out, length, d, k, s, ROWS=rows, COLUMNS=columns, MODE=mode)
    for o, first, count in zip(range(-32, 32), *out.tolist()):
        found = set(range(first * rows, (first + count) * rows, rows))
        # Windows of leaders are as far as that, and ends of groups of two lengths are one apart.
        apart = s - 1 + (length % d > 0)
        least, most = (attending(rule, length, o, rows, columns, b) for b in (0, apart))
        assert least <= found <= most, (rule, length, o, found, least, most)

@triton.jit
def bounds(out, n, k, s, MODE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    start, end = window(i, n, n, k, s, MODE)
    first, last = queries_of(i, n, n, k, s, MODE)
    tl.store(out + i, start), tl.store(out + N + i, end)
    tl.store(out + 2 * N + i, first), tl.store(out + 3 * N + i, last)

count = 0
for n in (1, 2, 5, 8, 13):
    for k in range(1, n + 1):
        for s in range(1, k + 1):
            for causal in (False, True):
                rule = Neighborhood.create(1, k, s, 1, causal)
                out = torch.zeros(4, 16, dtype=torch.int32)
                bounds[(1,)](out, n, k, s, MODE=modes(rule, (n,))[2], N=16)
                i = torch.arange(n)
                start, end = rule.windows(0, i, n, n)
                assert out[0, :n].tolist() == start.tolist(), rule
                assert out[1, :n].tolist() == end.tolist(), rule
                for key in range(n):
                    reach = ((start <= key) & (key < end)).nonzero().flatten().tolist()
                    first, last = out[2, key].item(), out[3, key].item()
                    assert reach == list(range(first, last)), (rule, n, key)
                count += 1
                for d in (1, 2) if n in (1, 13) and s in (1, 3) else ():
                    rule, mode = Neighborhood.create(1, k, s, d, causal), modes(rule, (n,))[2]
                    check_tiles(rule, mode, n * d, 4, 2)
                    if d * k < n * d:
                        check_tiles(rule, mode, n * d - 1, 2, 8)
print("windows", count)
"""


def test_kernels_know_the_definition(tmp_path):
    """``window`` is Neighborhood's; ``queries_of`` and ``tiles_that_attend`` say the inverse."""
    script = tmp_path / "windows.py"  # Triton reads a kernel's source from its file
    script.write_text(WINDOWS)
    code = f"import runpy; runpy.run_path({str(script)!r})"
    assert "windows 292" in interpreted(code)


ORDER = """
import torch, triton, triton.language as tl
from natten.backends.triton.windows import CAUSAL, SLIDING, STRIDED, UNIT, lpt_order
from natten.neighborhood import Neighborhood
from natten.tiling import reach

@triton.jit
def order(out, tiles, k, SIZE: tl.constexpr, MODES: tl.constexpr, N: tl.constexpr):
    t = tl.arange(0, N)
    tl.store(out + t, lpt_order(t, tiles, k, SIZE, MODES))

def tiles_of(n, k, size, *modes):
    out = torch.full((128,), -1, dtype=torch.int32)
    order[(1,)](out, -(-n // size), k, SIZE=size, MODES=[mode.value for mode in modes], N=128)
    return out[: -(-n // size)].tolist()

def first_come(costs, slots):
    ends = [0] * slots
    for cost in costs:
        ends[ends.index(min(ends))] += cost
    return max(ends)

count = 0
for n, k in ((1, 1), (16, 16), (300, 7), (300, 299), (777, 512), (1000, 100), (1024, 1024)):
    for size in (16, 64):
        found = tiles_of(n, k, size, UNIT, UNIT, (SLIDING, STRIDED)[count % 2])
        assert sorted(found) == list(range(-(-n // size))), (n, k, size, found)
        count += 1
for modes in ((UNIT, UNIT, CAUSAL), (UNIT, SLIDING, SLIDING), (STRIDED, UNIT, SLIDING)):
    assert tiles_of(1000, 100, 16, *modes) == list(range(63)), modes
first, last = reach(Neighborhood.create(1, 256), 0, 2048, 2048, True)
costs = [int(last[a + 15] - first[a]) for a in range(0, 2048, 16)]
balanced = sum(costs) / 66
found = first_come([costs[t] for t in tiles_of(2048, 256, 16, UNIT, UNIT, SLIDING)], 66)
assert found < 1.1 * balanced < 1.2 * balanced < first_come(costs, 66)
print("orders", count)
"""


def test_no_long_tile_of_keys_starts_last(tmp_path):
    """Every tile comes once; 66 processors are busy to the end."""
    script = tmp_path / "order.py"
    script.write_text(ORDER)
    assert "orders 14" in interpreted(f"import runpy; runpy.run_path({str(script)!r})")


@pytest.mark.parametrize("kind", ["forward", "dq", "dkdv"])
def test_tiles_are_valid(kind):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    for rank in (1, 2, 3):
        for dim, value_dim, itemsize in ((1, 1, 2), (32, 64, 2), (128, 128, 4), (256, 512, 2)):
            shape = (40, 9, 3)[:rank]
            rule = Neighborhood.create(rank, (7, 3, 2)[:rank], 1, (2, 1, 1)[:rank])
            found = tiles.choose(kind, rule, shape, shape, dim, value_dim, itemsize)
            for tile in (found.q_block, found.kv_block):
                assert len(tile) == 3 and all(n & (n - 1) == 0 for n in tile)
                assert 16 <= torch.Size(tile).numel() <= 128
            assert found.num_warps in (4, 8)


@pytest.mark.parametrize("capability", [0, 86], ids=["AMD", "consumer"])
@pytest.mark.parametrize("kind", ["forward", "dq", "dkdv"])
def test_tiles_fit_the_gpu(kind, capability, monkeypatch):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule, shape = Neighborhood.create(2, 13), (64, 64)
    before = tiles.candidates(kind, rule, shape, shape, 64, 64, 2)
    gpu = tiles.gpu_of(capability)
    monkeypatch.setattr(tiles, "gpu", lambda: gpu)
    for dim, itemsize in ((64, 2), (128, 2), (256, 2), (64, 4), (128, 4)):
        for each in tiles.candidates(kind, rule, shape, shape, dim, dim, itemsize):
            rows, cols = (torch.Size(x).numel() for x in each[:2])
            if kind == "dkdv":
                rows, cols = cols, rows
            sizes = kind, rows, cols, dim, dim, itemsize, each.num_stages
            assert tiles._shared(*sizes, gpu) <= gpu.shared
    monkeypatch.undo()
    assert tiles.candidates(kind, rule, shape, shape, 64, 64, 2) == before


@pytest.mark.skipif(FOUND < (3, 6), reason="benchmarks/compiled.py needs Triton 3.6 or newer")
@pytest.mark.parametrize("target", ["80", "90", "gfx942"])
def test_kernels_compile_without_a_gpu(target):
    """The NAT variants; `make kernels` compiles the whole list."""
    command = [sys.executable, "benchmarks/kernels.py", "--target", target, "--variants", "NAT"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| NAT |") == 6


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_sweep_on_a_gpu():
    done = subprocess.run(
        [sys.executable, "tests/sweep.py", "--problems", "40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert " 0 failures" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_gpus_have_tiles_of_their_own(monkeypatch):
    tiles = pytest.importorskip("natten.backends.triton.tiles")
    rule, shape, found = Neighborhood.create(2, 80), (256, 256), []
    for gpu in map(tiles.gpu_of, (90, 86)):
        monkeypatch.setattr(tiles, "gpu", lambda gpu=gpu: gpu)
        found.append(tiles.choose("dq", rule, shape, shape, 128, 128, 2))
    large, small = found
    assert large != small


def test_tiles_asked_for_are_used(caplog):
    plan = pytest.importorskip("natten.backends.triton.plan")
    rule, x = Neighborhood.create(2, 5), torch.empty(1, 30, 20, 1, 64, dtype=torch.bfloat16)

    def used(*tiles):
        found = plan.plan_for(x, x, x, None, None, rule, 1.0, tiles=tiles)
        return [
            (each.arguments["Q_BLOCK"], each.arguments["KV_BLOCK"])
            for each in (found.forward, found.dkdv)
        ]

    _, backward = used()
    assert used(2, 16, 8, 8, 0, 0, 0, 0) == [((1, 2, 16), (1, 8, 8)), backward]
    assert used(4, 8, 0, 0, 8, 4, 4, 16) == [((1, 4, 8), used(4, 8)[0][1]), ((1, 8, 4), (1, 4, 16))]
    with caplog.at_level("DEBUG", logger="natten"):
        assert used(3, 5, 0, 0, 0, 0, 0, 0) == used()
    assert "the forward kernel has no tiles (3, 5)" in caplog.text
