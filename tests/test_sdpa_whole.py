"""The sdpa backend on GPUs: plain attention, and windows of the whole layout.

Without a GPU, stand-ins in plain PyTorch take and return what PyTorch's kernels do.
"""

import math
from functools import partial

import pytest
import torch
from helpers import RATIO, assert_close, reference, sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel

import natten
from natten import backends, tuning
from natten._torch import CUDNN, EFFICIENT, FLASH
from natten.backends import Problem
from natten.backends.sdpa import whole
from natten.backends.triton import releases
from natten.inputs import Gradients, Inputs
from natten.neighborhood import Dense, Neighborhood, as_dense, window_mask

GPU = torch.device("cuda", 0)
PLAIN, CAUSAL = Dense(), Dense(True)
# Layouts of queries and keys, the rule, heads of queries and keys.
CASES = {
    "plain": ((70,), (150,), PLAIN, 4, 4),
    "shared-heads": ((150,), (70,), PLAIN, 6, 2),
    "causal": ((130,), (130,), CAUSAL, 4, 2),
    "causal-more-keys": ((70,), (150,), CAUSAL, 3, 3),
    "causal-more-queries": ((150,), (70,), CAUSAL, 2, 1),
    "window": ((9, 11), (9, 11), Neighborhood.create(2, (9, 11), stride=(2, 1)), 4, 2),
    "causal-window": ((67,), (67,), Neighborhood.create(1, 67, is_causal=True), 2, 2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize(
    ("options", "shape", "key_shape", "expected"),
    [
        ({"kernel_size": (5, 6)}, (5, 6), (5, 6), PLAIN),
        ({"kernel_size": (5, 5)}, (5, 6), (5, 6), None),
        ({"kernel_size": (5, 6), "stride": 3}, (5, 6), (5, 6), PLAIN),
        ({"kernel_size": (5, 3), "dilation": (1, 2)}, (5, 6), (5, 6), None),
        (
            {"kernel_size": (9, 1), "dilation": (1, 2), "boundary": "truncate"},
            (5, 1),
            (5, 1),
            PLAIN,
        ),
        ({"kernel_size": 11, "boundary": "truncate"}, (6,), (6,), PLAIN),
        ({"kernel_size": 10, "boundary": "truncate"}, (6,), (6,), None),
        ({"kernel_size": 6, "boundary": "circular"}, (6,), (6,), PLAIN),
        ({"kernel_size": 5, "boundary": "circular"}, (6,), (6,), None),
        ({"kernel_size": (3, 4), "queries_per_key": (1, 2)}, (3, 8), (3, 4), PLAIN),
        ({"kernel_size": 9, "query_offset": 4}, (5,), (9,), PLAIN),
        ({"kernel_size": 6, "is_causal": True}, (6,), (6,), CAUSAL),
        ({"kernel_size": 9, "is_causal": True, "boundary": "truncate"}, (6,), (6,), CAUSAL),
        ({"kernel_size": 5, "is_causal": True}, (6,), (6,), None),
        ({"kernel_size": 6, "is_causal": True, "query_offset": 2}, (4,), (6,), None),
        ({"kernel_size": (5, 6), "is_causal": (True, False)}, (5, 6), (5, 6), None),
    ],
)
def test_windows_that_are_plain_attention(options, shape, key_shape, expected):
    rule = Neighborhood.create(len(shape), **options)
    assert as_dense(rule, shape, key_shape) == expected
    everything = window_mask(rule, shape, key_shape)
    if expected is None:  # a causal part, or a causal axis of several, may be none all the same
        assert not everything.all()
    else:
        flat = (math.prod(shape),), (math.prod(key_shape),)
        assert torch.equal(everything, window_mask(expected, *flat))


def scores_of(q, k, scale, causal):
    """Scores of ``[batch, heads, tokens, channels]``, from the first query and key on."""
    scores = q @ k.transpose(-1, -2) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool() & causal, -math.inf)


def attend(q, k, v, causal, scale):
    assert q.shape[1] == k.shape[1] == v.shape[1]
    scores = scores_of(q, k, scale, causal)
    # Kernels write tokens before heads.
    out = (scores.softmax(-1) @ v).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return out.transpose_(1, 2), scores.logsumexp(-1)


def flash(q, k, v, dropout, causal, *, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (*attend(q, k, v, causal, scale), "other results")


def efficient(q, k, v, bias, has_lse, dropout, causal, *, scale):
    out, lse = attend(q, k, v, causal, scale)
    assert bias is None and has_lse
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan), "others"


def cudnn(q, k, v, bias, has_lse, dropout, causal, *, scale):
    assert bias is None and has_lse
    out, lse, _ = flash(q, k, v, dropout, causal, scale=scale)
    return out, lse[..., None], "others"


def efficient_backward(
    grad, q, k, v, bias, out, q_starts, k_starts, queries, keys, lse, dropout, seed, offset,
    mask_type, bias_requires_grad, *, scale, num_splits_key,
):  # fmt: skip
    assert num_splits_key == 1 and lse.shape[-1] % 32 == 0 and (queries, keys) == (
        q.shape[1], k.shape[1],
    )  # fmt: skip
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    scores = scores_of(q, k, scale, mask_type == 1)
    weights = (scores - lse[..., :queries, None]).exp()
    ds = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    grads = ds @ k, ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    return (*(x.transpose(1, 2) for x in grads), None)


@pytest.fixture
def stand_ins(monkeypatch):
    """Have a kernel run on a CPU, the one of a number."""

    def chosen(number):
        monkeypatch.setattr(
            whole,
            "find",
            lambda rule, device, dtype, shape, key_shape, value_dim: (
                number, as_dense(rule, shape[1:-2], key_shape).causal,
            ),
        )  # fmt: skip

    kernels = {FLASH: flash, EFFICIENT: efficient, CUDNN: cudnn}
    monkeypatch.setattr(whole, "gpu_attention", kernels)
    monkeypatch.setattr(whole, "efficient_attention_backward", efficient_backward)
    return chosen


def inputs_of(case, dtype, device="cpu", dim=16, value_dim=24):
    shape, key_shape, rule, heads, kv_heads = case

    def random(*sizes):
        return torch.randn(2, *sizes, device=device, dtype=dtype)

    return Inputs(
        random(*shape, heads, dim), random(*key_shape, kv_heads, dim),
        random(*key_shape, kv_heads, value_dim),
    ), rule  # fmt: skip


def results(module, inputs, rule, grad, grad_lse, backward=True):
    out, lse = module.forward(inputs, rule, 0.3)
    found = {"out": out, "lse": lse}
    if backward:
        grads = module.backward(grad, grad_lse, inputs, out, lse, rule, 0.3)
        found |= dict(zip(Gradients._fields[:3], grads))
    return found


@pytest.mark.parametrize("number", [FLASH, EFFICIENT, CUDNN])
@pytest.mark.parametrize("grad_lse", [False, True])
@cases
def test_what_is_done_around_kernels(case, number, grad_lse, stand_ins):
    stand_ins(number)
    inputs, rule = inputs_of(case, torch.float64)
    # Kernels read memory in pieces of 16 bytes; the first of these does not begin at one.
    shifted = torch.empty(inputs.query.numel() + 1, dtype=torch.float64)[1:]
    inputs = inputs._replace(
        query=shifted.view(inputs.query.shape).copy_(inputs.query),
        key=inputs.key.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    grad = torch.randn(*inputs.query.shape[:-1], inputs.value.shape[-1], dtype=torch.float64)
    exponents = torch.randn(grad.shape[:-1], dtype=torch.float64) if grad_lse else None
    expected, found = (
        results(module, inputs, rule, grad, exponents) for module in (reference, whole)
    )
    for name, x in expected.items():
        assert_close(name, x, found[name], 1e-6 if name == "lse" else 2e-6)  # LSE is float32
        assert found[name].is_contiguous()
    # A Function with forward mode must not return views.
    assert not found["out"]._is_view() and not found["lse"]._is_view()


def found(number, rule, device, dtype, shape, key_shape, value_dim):
    assert len(shape) > 3 and as_dense(rule, shape[1:-2], key_shape) is not None
    return number, False


@pytest.fixture
def with_gpu(monkeypatch):
    """Have the backends believe in a GPU whose kernel for everything is the one of a number."""

    def chosen(number, capability=(8, 0)):
        tuning._forget_choices()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(whole, "_multiprocessors", lambda _: 132)
        monkeypatch.setattr(whole, "find", partial(found, number))

    yield chosen
    tuning._forget_choices()


def problem(rule=PLAIN, operation="attention", dtype=torch.bfloat16, dim=64, **others):
    size = (2, 512, 8, dim)
    return Problem(operation, GPU, dtype, dim, dim, size, rule, 0.125, key_shape=(512,), **others)


@pytest.mark.skipif(releases.version() is None, reason="needs Triton")
def test_choice(with_gpu, monkeypatch):
    window, float32 = Neighborhood.create(1, 512), torch.float32

    def chosen(question):
        return backends.choose("", question).name

    with_gpu(FLASH)
    for rule in (PLAIN, CAUSAL, window):
        assert chosen(problem(rule)) == "sdpa"
        assert chosen(problem(rule, "gradient")) == "triton"
    for other in (
        problem(Neighborhood.create(1, 511)),
        problem(Neighborhood.create(1, 512, query_offset=0)),
        problem(masked=True),
        problem(additional=True),
        problem()._replace(scale=-1.0),
    ):
        assert chosen(other) == "triton"
    with_gpu(EFFICIENT)
    assert chosen(problem()) == "triton"
    assert chosen(problem(dtype=float32)) == "sdpa"
    assert chosen(problem(operation="gradient", dtype=float32)) == "triton"  # for want of heads
    many = problem(operation="gradient", dtype=float32)._replace(shape=(6, 512, 8, 64))
    assert chosen(many) == "sdpa"
    monkeypatch.setattr(whole, "allows_tf32", lambda: True)
    with_gpu(EFFICIENT)
    assert chosen(problem(dtype=float32)) == chosen(many) == "triton"
    with_gpu(0)
    assert chosen(problem()) == "triton"
    # Of what has no shape here, nothing is known but this.
    for operation, rule in (("packed", PLAIN), ("packed", window), ("unfused", None)):
        question = Problem(operation, GPU, float32, 64, 64, rule=rule, scale=0.125)
        assert chosen(question) == "triton"


@pytest.mark.skipif(releases.version() is None, reason="needs Triton")
def test_choice_on_newer_gpus(with_gpu):
    """Flash attention's products are those of compute capability 8.0."""

    def chosen(question):
        return backends.choose("", question).name

    with_gpu(FLASH, (9, 0))
    assert chosen(problem()) == "hopper"
    assert chosen(problem(dtype=torch.float64)) == "tiled"
    for number, capability, name in (
        (FLASH, (10, 0), "triton"), (CUDNN, (10, 0), "sdpa"), (FLASH, (12, 0), "sdpa"),
    ):  # fmt: skip
        with_gpu(number, capability)
        assert chosen(problem()) == name


def test_explanations(with_gpu):
    with_gpu(FLASH)
    questions = problem(), problem(operation="gradient")
    sdpa_says = [sdpa.unsupported(each) for each in questions]
    assert sdpa_says == [
        None,
        "has no gradient of half precision with the same bits on every run on GPUs",
    ]
    assert "whole layout" in sdpa.unsupported(problem(Neighborhood.create(1, 7)))
    assert "positive scale" in sdpa.unsupported(problem()._replace(scale=0.0))
    assert "additional tokens" in sdpa.unsupported(problem(additional=True))
    with_gpu(0)
    assert sdpa.unsupported(problem()) == "finds no kernel for this in PyTorch"


@pytest.fixture
def only(request):
    """Have PyTorch take one of its kernels where it can."""
    tuning._forget_choices()
    with sdpa_kernel([request.param, SDPBackend.MATH]):
        yield
    tuning._forget_choices()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (72, 72), (256, 256), (32, 80)])
@pytest.mark.parametrize(
    "only",
    [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ],
    indirect=True,
)
@cases
def test_kernels(case, only, dims, dtype):
    """Output, LSE and gradients beside float64; five runs give the same bits."""
    inputs, rule = inputs_of(case, dtype, "cuda", *dims)
    question = Problem.of("attention", inputs, rule, 0.3)
    if (reason := sdpa.unsupported(question)) is not None:
        pytest.skip(reason)
    has_gradient = sdpa.unsupported(question._replace(operation="gradient")) is None
    grad = torch.randn(*inputs.query.shape[:-1], dims[1], device="cuda", dtype=dtype)
    exact_inputs = Inputs(*(None if x is None else x.double() for x in inputs))
    for has_grad_lse in (False, True) if has_gradient else (False,):
        exponents = torch.randn(grad.shape[:-1], device="cuda") if has_grad_lse else None
        double = None if exponents is None else exponents.double()
        exact = results(reference, exact_inputs, rule, grad.double(), double, has_gradient)
        first, *others = (
            results(sdpa, inputs, rule, grad, exponents, has_gradient) for _ in range(5)
        )
        for name, x in exact.items():
            ratio = RATIO[torch.float32 if name == "lse" else dtype]
            assert_close(name, x, first[name], ratio if name in ("out", "lse") else 2 * ratio)
            assert all(torch.equal(first[name], other[name]) for other in others), name
        assert not first["out"]._is_view() and not first["lse"]._is_view()


@pytest.mark.gpu
def test_gradients_of_half_precision_are_the_other_kernels():
    q, k, v = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.float16) for n in (90, 70, 70))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = natten.attention(*leaves, backend="sdpa", return_lse=True)
    (out.float().sum() + lse.sin().sum()).backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    right, right_lse = natten.attention(*exact, backend="reference", return_lse=True)
    (right.sum() + right_lse.sin().sum()).backward()
    assert_close("out", right, out, 2e-3)
    for a, b in zip(exact, leaves):
        assert_close("gradient", a.grad, b.grad, 4e-3)
