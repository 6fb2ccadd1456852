"""A call is not checked again if it is like an earlier one in all that matters."""

import operator
import threading
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_close, reference, tiled

from natten import backends, functional, na1d, na2d, na3d, operators, tuning
from natten._library import ops
from natten.errors import ArgumentError, UnsupportedError
from natten.neighborhood import Neighborhood
from natten.operators import fused


@pytest.fixture(autouse=True)
def _nothing_known():
    functional._calls.clear()
    fused._calls.clear()


def inputs(*shape, dtype=torch.float32):
    return [torch.randn(shape or (1, 8, 8, 2, 4), dtype=dtype) for _ in range(3)]


def refuse(*_):
    raise AssertionError("checked again")


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 5), "stride": 2, "is_causal": (True, False)},
        {"kernel_size": [3, 5], "dilation": [1, 1], "scale": 0.5},
        {"kernel_size": 3, "backend": "reference"},
        {"kernel_size": 3, "q_tile_shape": (4, 4)},
        {"kernel_size": 3, "return_lse": True},
    ],
)
def test_a_second_call_is_not_checked(arguments, monkeypatch):
    first = na2d(*inputs(), **arguments)
    monkeypatch.setattr(functional, "check_call_of", refuse)
    second = na2d(*inputs(), **arguments)
    assert len(functional._calls) == 1
    assert [x.shape for x in first] == [x.shape for x in second]
    with pytest.raises(AssertionError, match="checked again"):
        na2d(*inputs(1, 9, 8, 2, 4), **arguments)


def test_second_calls_are_right():
    for _ in range(3):
        q, k, v = inputs()
        for kernel_size in (3, [3, 5]):
            expected = na2d(q, k, v, kernel_size, backend="reference")
            assert_close("out", expected, na2d(q, k, v, kernel_size), 1e-5)


@pytest.mark.parametrize(
    "good, bad, said",
    [
        ({"kernel_size": 3}, {"kernel_size": 3.0}, "kernel_size"),
        ({"kernel_size": 1}, {"kernel_size": True}, "kernel_size"),
        ({"kernel_size": (3, 1)}, {"kernel_size": (3, True)}, "kernel_size"),
        ({"kernel_size": [3, 1]}, {"kernel_size": [3, True]}, "kernel_size"),
        ({"stride": 1}, {"stride": 1.0}, "stride"),
        ({"dilation": 1}, {"dilation": True}, "sixth argument"),
        ({"is_causal": False}, {"is_causal": 0}, "is_causal"),
        ({"is_causal": (True, False)}, {"is_causal": (1, 0)}, "is_causal"),
        ({"scale": 1.0}, {"scale": True}, "scale"),
        ({"backend": None}, {"backend": "fast"}, "backend"),
        ({"attention_kwargs": None}, {"attention_kwargs": []}, "attention_kwargs"),
        ({"q_tile_shape": (1, 1)}, {"q_tile_shape": (1, True)}, "q_tile_shape"),
    ],
)
def test_what_is_equal_may_still_be_wrong(good, bad, said):
    q, k, v = inputs()
    for _ in range(2):
        na2d(q, k, v, **{"kernel_size": 3, **good})
        with pytest.raises(ArgumentError, match=said):
            na2d(q, k, v, **{"kernel_size": 3, **bad})


def test_numpy_has_numbers_of_the_same_bytes():
    numpy = pytest.importorskip("numpy")
    q, k, v = inputs()
    one, half = numpy.int64(1), numpy.float64(0.5)
    for _ in range(2):
        na2d(q, k, v, one, scale=half)
        for kernel_size in (one.view(numpy.float64), one.tobytes()):
            with pytest.raises(ArgumentError):
                na2d(q, k, v, kernel_size, scale=half)
        whole = half.view(numpy.int64)
        expected = na2d(q, k, v, 3, scale=int(whole), backend="reference")
        na2d(q, k, v, 3, scale=half)
        assert_close("whole", expected, na2d(q, k, v, 3, scale=whole), 1e-5)


def test_tensors_of_one_shape_may_still_be_wrong():
    q, k, v = inputs()
    rpb, more = torch.zeros(2, 5, 5), torch.zeros(1, 3, 2, 4)
    na2d(q, k, v, 3)
    na2d(q, k, v, 3, rpb=rpb)
    na2d(q, k, v, 3, additional_keys=more, additional_values=more)
    for wrong, error in (
        (k.double(), ArgumentError),
        (k.int(), ArgumentError),
        (k.to("meta"), ArgumentError),
        (k[:, 1:], ArgumentError),
        (k.to_sparse(), UnsupportedError),
        (torch.nested.nested_tensor([k[0]]), UnsupportedError),
        (None, ArgumentError),
        (k.tolist(), ArgumentError),
    ):
        with pytest.raises(error, match="key"):
            na2d(q, wrong, v, 3)
    with pytest.raises(ArgumentError, match="rpb"):
        na2d(q, k, v, 3, rpb=rpb[:1])
    with pytest.raises(ArgumentError, match="rpb"):
        na2d(q, k, v, 5, rpb=rpb)
    with pytest.raises(ArgumentError, match="additional_values"):
        na2d(q, k, v, 3, additional_keys=more)
    with pytest.raises(ArgumentError, match="additional_values"):
        na2d(q, k, v, 3, additional_keys=more, additional_values=more[:, 1:])
    with pytest.raises(ArgumentError, match="4-D"):
        na1d(q, k, v, 3)


def test_a_refused_call_is_not_kept():
    q, k, v = inputs()
    for _ in range(2):
        with pytest.raises(ArgumentError, match="9"):
            na2d(q, k, v, 9)
    assert not functional._calls


def test_autocast_is_asked_each_time():
    q, k, v = (x.requires_grad_() for x in inputs())
    for _ in range(2):
        assert na2d(q, k, v, 3).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            out = na2d(q, k, v, 3)
            assert out.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert na2d(q, k, v, 3).dtype == torch.float16
        assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_gradients_are_asked_for_each_time():
    q, k, v = inputs()
    leaf = q.clone().requires_grad_()
    for _ in range(2):
        assert not na2d(q, k, v, 3).requires_grad
        assert na2d(leaf, k, v, 3).requires_grad
        with torch.no_grad():
            assert not na2d(leaf, k, v, 3).requires_grad
        with torch.inference_mode():
            assert na2d(leaf, k, v, 3).is_inference()
        (once,) = torch.autograd.grad(na2d(leaf, k, v, 3).square().sum(), leaf, create_graph=True)
        assert once.requires_grad
        (twice,) = torch.autograd.grad(once.sum(), leaf)
        assert twice.abs().sum() > 0
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            tangent = torch.autograd.forward_ad.unpack_dual(na2d(dual, k, v, 3)).tangent
            assert tangent is not None


def test_strides_may_differ():
    q, k, v = inputs()
    expected = na2d(q, k, v, 3)
    views = [
        lambda x: x.movedim(-2, 1).contiguous().movedim(1, -2),
        lambda x: torch.randn(1, 8, 8, 2, 5)[..., 1:].copy_(x),
        lambda x: x.mT.contiguous().mT,
    ]
    for view in views:
        assert_close("out", expected, na2d(view(q), k, view(v), 3), 1e-5)
    assert len(functional._calls) == 1


def test_who_runs_is_what_was_asked_for(monkeypatch):
    q, k, v = (x.requires_grad_() for x in inputs())
    spies = {}
    for backend in (tiled, reference):
        for name in ("forward", "backward"):
            spy = Mock(wraps=getattr(backend, name))
            monkeypatch.setattr(backend, name, spy)
            spies[backend.name, name] = spy
    for _ in range(2):
        for name in ("tiled", "reference"):
            na2d(q, k, v, 3, backend=name).sum().backward()
            assert {who for who, spy in spies.items() if spy.called} == {
                (name, "forward"),
                (name, "backward"),
            }
            for spy in spies.values():
                spy.reset_mock()


def test_traced_calls_are_not_kept(monkeypatch):
    q, k, v = inputs()

    def function(q, k, v):
        return na2d(q, k, v, 3)

    expected = function(q, k, v)
    assert len(functional._calls) == 1
    # Kept calls are not used there either.
    monkeypatch.setitem(functional._calls, *functional._calls.popitem()[:1], refuse)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_close("compiled", expected, compiled(q, k, v), 1e-6)
    assert_close("vmap", expected, torch.vmap(function)(q[None], k[None], v[None])[0], 1e-6)
    _, pull = torch.func.vjp(function, q, k, v)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(x) for x in (q, k, v)))
    assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == expected.shape
    pull(expected)
    assert list(functional._calls.values()) == [refuse]


def test_operators_choose_once(monkeypatch):
    call = operators.Call(Neighborhood.create(2, kernel_size=3), 0.5, fused.ANY)
    options = (*[None] * 5, *call.arguments())

    def run(*shape):
        tensors = inputs(*shape)
        out, lse = ops.attention(*tensors, *options)
        expected = na2d(*tensors, 3, scale=0.5, backend="reference")
        assert_close("out", expected, out, 1e-5)
        return ops.attention_backward(out, None, out, lse, *tensors, *options)

    run()
    monkeypatch.setattr(backends, "choose", refuse)
    run()
    with pytest.raises(AssertionError, match="checked again"):
        ops.attention(*inputs(1, 9, 8, 2, 4), *options)
    with pytest.raises(AssertionError, match="checked again"):
        ops.attention(*inputs(dtype=torch.float64), *options)
    with pytest.raises(ArgumentError, match="kernel_size"):  # and each time
        ops.attention(*inputs(1, 2, 8, 2, 4), *options)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_scripts_of_calls():
    q, k, v = inputs()
    expected = na2d(q, k, v, 3)
    traced = torch.jit.trace(lambda q, k, v: na2d(q, k, v, 3), (q, k, v))  # it runs twice
    assert_close("traced", expected, traced(q, k, v), 1e-6)


def test_subclasses_and_modes_see_the_operator():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = inputs()
    for _ in range(2):
        na2d(q, k, v, 3)
        seen = []
        with Seen():
            na2d(q, k, v, 3)
        assert "natten.attention.default" in seen


def test_new_tiles_are_new_decisions():
    na2d(*inputs(), 3)
    assert functional._calls
    with tuning.trial("some kernel", [1]):
        assert not functional._calls
        na2d(*inputs(), 3)
    assert not functional._calls


def test_parts_that_take_turns_are_kept(monkeypatch):
    q, k, v = inputs(1, 20, 2, 4)

    def part(offset, count):
        return na1d(q[:, offset : offset + count], k, v, 5, query_offset=offset)

    parts = [(0, 6), (6, 8), (14, 6)]
    expected = [part(*each) for each in parts]
    move = Mock()
    monkeypatch.setattr(operators.Call, "moved", move)
    for _ in range(2):
        for each, out in zip(parts, expected):
            assert torch.equal(part(*each), out)
    assert not move.called
    monkeypatch.undo()
    whole = na1d(q, k, v, 5)
    for offset in range(20):
        assert_close("out", whole[:, offset : offset + 1], single(q, k, v, offset), 1e-5)
    assert all(len(each) <= functional._KEPT_PARTS for each in functional._calls.values())


def single(q, k, v, offset):
    return na1d(q[:, offset : offset + 1], k, v, 5, query_offset=offset)


def test_few_calls_are_kept():
    kept = tuning.Kept()
    for i in range(3000):
        assert kept.find(i, operator.neg, i) == -i
        assert kept.find(i, pytest.fail) == -i
        assert len(kept) <= 1024
    tuning._caches.remove(kept)


def test_threads():
    q, k, v = inputs(1, 6, 6, 6, 1, 4)
    expected = [na3d(q, k, v, size) for size in (1, 2, 3)]
    wrong = []

    def work():
        for _ in range(20):
            for size, out in zip((1, 2, 3), expected):
                if not torch.equal(na3d(q, k, v, size), out):
                    wrong.append(size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
