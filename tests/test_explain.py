"""explain says what a call does, for any call, and raises an error where the call does."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import natten
from natten import ArgumentError, backends
from natten.backends import explain

GENERIC = natten.neighborhood_attention_generic
NAMES = (None, None, *(each.name for each in backends.BACKENDS), "cutlass-fna", "cuda")


@pytest.fixture
def who_runs(monkeypatch):
    """The names of the backends that ran forward and backward."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    natten.functional._calls.clear()
    ran = []

    def noted(name, what, function):
        def noting(*args, **kwargs):
            ran.append((what, name))
            return function(*args, **kwargs)

        return noting

    for each in backends.BACKENDS:
        if each.name not in ("hopper", "triton"):  # they do not run on a CPU
            for what in ("forward", "backward"):
                function = noted(each.name, what, getattr(each, what))
                monkeypatch.setattr(each, what, function)
    yield ran
    natten.functional._calls.clear()


def outcome(function, *args, **kwargs):
    """The result of a call, or the type and text of its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs), None
    except Exception as error:
        return None, (type(error), str(error))


def check(function, ran, *tensors, **options):
    """Compare a call with what explain says of it, and return whether the call ran."""
    ran.clear()
    out, error = outcome(function, *tensors, **options)
    if error is None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.sum().backward()
    text, said = outcome(explain, *tensors, **options)
    if error is not None:
        assert said is not None, f"explain says {text!r} of a call that raises {error}"
        name = f"no argument of {function.__name__}"
        assert said == (error[0], error[1].replace(name, "no argument of explain"))
        return False
    assert said is None, f"explain raises {said} where the call runs"
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    around = " with keys padded around"
    padded = {name for name, line in lines.items() if around in line}
    lines = {name: line.replace(around, "") for name, line in lines.items()}
    assert list(lines) == [each.name for each in backends.BACKENDS]
    assert {what for what, _ in ran} == (
        {"forward", "backward"} if out.requires_grad else {"forward"}
    )
    for what, name in ran:
        assert lines[name].startswith("runs") and (lines[name] == "runs" or what in lines[name])
    running = {name for name, line in lines.items() if line == "runs" or line.startswith("runs ")}
    running = {name for name in running if not lines[name].startswith("runs on GPUs")}
    assert running == {name for _, name in ran}
    is_ring = has_rings(tensors[1].shape[1:-2], options)
    without = {each.name for each in backends.BACKENDS if is_ring and not each.circular}
    assert running & without == running & padded and padded <= without
    return True


def has_rings(space, options):
    """Whether windows go around; one that fills a ring need not, unless there is a bias."""
    if "boundary" not in options:
        return False
    kernel, boundary = options["kernel_size"], options["boundary"]
    rule = natten.Neighborhood.create(len(space), kernel, boundary=boundary)
    rings = zip(rule.boundary, rule.kernel_size, space)
    return any(b == "circular" and (k < n or "rpb" in options) for b, k, n in rings)


def requiring(*tensors):
    return [x.requires_grad_() if x.is_floating_point() else x for x in tensors]


@st.composite
def fused_calls(draw):
    """Draw tensors and keywords of a call, most of which are allowed."""
    rank, pick = draw(st.integers(1, 3)), lambda *values: draw(st.sampled_from(values))
    space = tuple(draw(st.integers(2, 5)) for _ in range(rank))
    heads, dim, dtype = 2, 4, pick(torch.float32, torch.float64, torch.bfloat16)
    shape = (1, *space, heads, dim)
    tensors = [torch.zeros(shape, dtype=dtype) for _ in range(3)]
    options = {
        "kernel_size": pick(1, 2, (2,) * rank, np.int64(2)),
        "backend": pick(*NAMES[:-1]),
        "scale": pick(None, 0.5, np.float32(1)),
        "is_causal": pick(False, True),
    }
    if draw(st.booleans()):
        rpb = torch.zeros(heads, *(3,) * rank)
        options |= {"kernel_size": 2, "rpb": rpb}
    if draw(st.booleans()):
        additional = torch.zeros(1, 3, heads, dim, dtype=dtype)
        options |= {"additional_keys": additional, "additional_values": additional}
    if draw(st.booleans()):
        # In one dimension all keys may be attended, in others a half or a third of them.
        options["key_mask"] = (torch.arange(math.prod(space)) % rank == 0).view(1, *space)
    if draw(st.booleans()):
        options |= {
            "boundary": pick("truncate", "circular", ("shift", "circular", "truncate")[:rank])
        }
    if draw(st.booleans()):
        options |= {"queries_per_key": (r := pick(1, 2)), "query_offset": 1}
        part = (1, *(n * r - 1 for n in space), heads, dim)
        tensors[0] = torch.zeros(part, dtype=dtype)
    wrong = {
        "offset": {"query_offset": pick(30, -1, "1", True)},
        "fine": {"queries_per_key": pick(0, 3, 1.5)},
        "boundary": {"boundary": pick("mirror", 1, ("shift",) * 4)},
        "window": {"kernel_size": 30},
        "type": {"kernel_size": pick("3", 3.0, True)},
        "stride": {"stride": 4},
        "dilation": {"dilation": pick(9, True)},
        "scale": {"scale": pick("x", float("nan"), True)},
        "causal": {"is_causal": 1},
        "backend": {"backend": "cuda"},
        "tiles": {"q_tile_shape": (0,) * rank},
        "rpb": {"rpb": torch.zeros(1, *(3,) * rank)},
        "additional": {
            "additional_keys": torch.zeros(1, 3, heads, dim + 1),
            "additional_values": None,
        },
        "mask": {"key_mask": pick(torch.ones(1, *space), torch.ones(3, *space, dtype=torch.bool))},
        "kwargs": {"attention_kwargs": 3},
        "keyword": {pick("kernel_sise", "attn_mask", "dropout_p"): 1},
    }
    tensor = {
        "shape": torch.zeros(*shape[:-1], dim + 1, dtype=dtype),
        "rank": torch.zeros(shape[1:], dtype=dtype),
        "dtype": torch.zeros(shape, dtype=torch.float16),
        "integers": torch.zeros(shape, dtype=torch.int64),
        "device": torch.zeros(shape, dtype=dtype, device="meta"),
        "sparse": torch.zeros(shape, dtype=dtype).to_sparse(),
        "scalar": torch.zeros((), dtype=dtype),
        "list": [1.0],
    }
    for name in draw(st.lists(st.sampled_from([*wrong, *tensor]), max_size=2)):
        if name in wrong:
            options |= wrong[name]
        else:
            tensors[draw(st.integers(0, 2))] = tensor[name]
    if draw(st.booleans()):
        tensors = [x.requires_grad_() if is_float(x) else x for x in tensors]
    return tensors, options


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout is torch.strided


def test_fused_calls(who_runs):
    ran = []

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(fused_calls())
    def run(call):
        tensors, options = call
        ran.append(check(GENERIC, who_runs, *tensors, **options))

    run()
    assert ran.count(True) > 50 and ran.count(False) > 50  # calls that run, and calls that do not


LENGTHS = {
    "none": {},
    "seqlens": {"seqlens_Q": torch.tensor([2, 0, 4]), "seqlens_KV": torch.tensor([1, 3, 3])},
    "sums": {
        "cumulative_seqlen_Q": torch.tensor([0, 2, 6]),
        "cumulative_seqlen_KV": torch.tensor([0, 3, 7]),
        "max_seqlen_Q": 4,
        "max_seqlen_KV": 4,
    },
    "one side": {"seqlens_Q": torch.tensor([6])},
    "too few": {"seqlens_Q": torch.tensor([2, 3]), "seqlens_KV": torch.tensor([3, 4])},
    "no tensor": {"seqlens_Q": [6], "seqlens_KV": [7]},
    "longest": {
        "seqlens_Q": torch.tensor([2, 4]), "seqlens_KV": torch.tensor([3, 4]), "max_seqlen_Q": 3
    },
}  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", NAMES[1:])
def test_plain_attention(lengths, backend, who_runs):
    q, k, v = requiring(*(torch.zeros(1, n, 2, 4) for n in (6, 7, 7)))
    options = LENGTHS[lengths] | {"backend": backend}
    runs = check(natten.attention, who_runs, q, k, v, **options)
    assert runs == (lengths in ("none", "seqlens", "sums") and backend != "cuda")
    for wrong in ({"is_causal": 1}, {"scale": "x"}, {"q_tile_size": 0}, {"attn_mask": None}):
        assert not check(natten.attention, who_runs, q, k, v, **options, **wrong)
    assert not check(natten.attention, who_runs, q, k, v[:, :3], **options)
    assert not check(natten.attention, who_runs, q.long(), k.long(), v.long(), **options)


def test_autocast_counts(who_runs):
    q = torch.zeros(1, 8, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        check(GENERIC, who_runs, q, q, q.double(), kernel_size=3)
        assert check(GENERIC, who_runs, q, q.bfloat16(), q, kernel_size=3)
    assert not check(GENERIC, who_runs, q, q.bfloat16(), q, kernel_size=3)


def test_rings_of_backends_without_them():
    q = torch.zeros(1, 8, 2, 4)
    lines = explain(q, kernel_size=3, boundary="circular", backend="tiled").splitlines()
    assert "tiled: runs with keys padded around" in lines
    assert "reference: can run, `backend` asks for tiled" in lines
    part = explain(q[:, :3], q, kernel_size=3, query_offset=4, backend="tiled").splitlines()
    assert "tiled: runs" in part


def test_arguments_by_position_and_left_out(who_runs):
    q = torch.zeros(1, 8, 8, 2, 4)
    text = explain(q, kernel_size=3)
    assert explain(q, q, q, 3) == explain(q, q, kernel_size=3) == text
    assert explain(q, q, q, 3, 2, 1, (True, False), 0.5) == text
    with pytest.raises(ArgumentError, match="`stride` must be"):
        explain(q, q, q, 3, 4)
    with pytest.raises(ArgumentError, match=r"`query` must be \[batch, length, heads, head_dim\]"):
        explain(q)
    with pytest.raises(ArgumentError, match="with 1 to 3 axes of tokens"):
        explain(torch.tensor(1.0), kernel_size=3)
    with pytest.raises(ArgumentError, match=r"`query` must be a torch\.Tensor"):
        explain([1.0])
    with pytest.raises(ArgumentError, match="no argument of explain: did you mean `kernel_size`"):
        explain(q, kernel_sise=3, kernel_size=3)


def test_nothing_is_computed_and_nobody_is_warned(who_runs):
    q = torch.zeros(1, 8, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = explain(q, kernel_size=3, backend="triton")
    assert "triton: runs on GPUs, not on cpu" in text and who_runs == []


def test_documents_in_one_launch(monkeypatch):
    """The backend that takes packed documents runs them, unless another one is asked for."""

    class Tables(backends.Backend):
        name, operations = "tables", ("packed",)

    packs = [each for each in backends.BACKENDS if each.name != "reference"]
    monkeypatch.setattr(natten.operators, "backend_for", lambda *_: Tables())
    taken = [
        Tables(),
        *packs,
    ]
    monkeypatch.setattr(backends, "BACKENDS", tuple(taken))
    q = torch.zeros(1, 6, 2, 4)
    natten.tuning._forget_choices()
    lines = explain(q, **LENGTHS["seqlens"] | {"seqlens_KV": torch.tensor([2, 0, 4])}).splitlines()
    natten.tuning._forget_choices()
    assert lines[0] == "tables: runs"
    assert lines[-1] == "tiled: has no packed documents in one launch"
