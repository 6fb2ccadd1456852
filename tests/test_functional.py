"""The public operators: fused, unfused, plain and packed attention, and merging."""

import math

import pytest
import torch
from helpers import CASES, Case, assert_close, name_of, reference
from torch.nn.functional import scaled_dot_product_attention as sdpa

import natten
from natten import (
    VarlenLayout,
    attention,
    fit_window,
    merge_attentions,
    na1d,
    na2d,
    neighborhood_attention_generic,
)
from natten import functional as NF
from natten.backends import HINTS
from natten.inputs import Inputs
from natten.neighborhood import Dense, crop_rpb
from natten.utils.varlen import generate_varlen_parameters

FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
QK = {1: natten.na1d_qk, 2: natten.na2d_qk, 3: natten.na3d_qk}
AV = {1: natten.na1d_av, 2: natten.na2d_av, 3: natten.na3d_av}


def window(case):
    return {
        "kernel_size": case.kernel_size,
        "stride": case.stride,
        "dilation": case.dilation,
        "is_causal": case.is_causal,
    }


# --- fused ---


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fused(case):
    inputs = case.inputs()
    q, k, v, rpb, ak, av = inputs.differentiable
    expected = reference.forward(Inputs(*inputs), case.rule, case.dim**-0.5)
    options = window(case) | {"additional_keys": ak, "additional_values": av, "rpb": rpb}
    out, lse = FUSED[len(case.space)](q, k, v, **options, return_lse=True)
    assert_close("out", expected[0], out, 1e-12)
    assert_close("lse", expected[1], lse, 1e-12)
    assert torch.equal(neighborhood_attention_generic(q, k, v, **options), out)


def test_hints_do_not_change_the_result():
    q, k, v, *_ = Case((8, 8), (3, 3)).inputs()
    plain = natten.na2d(q, k, v, 3)
    for backend in sorted(HINTS):
        assert torch.equal(natten.na2d(q, k, v, 3, backend=backend), plain)
    hinted = natten.na2d(
        q, k, v, 3, q_tile_shape=(8, 8), kv_tile_shape=(8, 8), backward_q_tile_shape=(8, 8),
        backward_kv_tile_shape=(8, 8), backward_kv_splits=(1, 1), backward_use_pt_reduction=True,
        run_persistent_kernel=False, kernel_schedule=natten.types.KernelSchedule.NonPersistent,
        torch_compile=True, attention_kwargs={"backend": "cutlass-fmha"},
    )  # fmt: skip
    assert torch.equal(hinted, plain)


def test_scale_of_zero_is_zero():
    q, k, v, *_ = Case((9,), (3,)).inputs()
    out = natten.na1d(q, k, v, 3, scale=0.0)
    assert_close("mean", v[:, :3].mean(1), out[:, 0], 1e-12)
    assert torch.equal(natten.na1d(q, k, v, 3), natten.na1d(q, k, v, 3, scale=8**-0.5))


def test_lse_is_float32_for_half_precision():
    q, k, v, *_ = Case((9,), (3,)).inputs(torch.bfloat16)
    out, lse = natten.na1d(q, k, v, 3, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


# --- unfused ---

UNFUSED = [c._replace(kv_heads=c.heads, value_dim=c.dim) for c in CASES]


@pytest.mark.parametrize("case", UNFUSED, ids=name_of)
def test_unfused_is_fused(case):
    q, k, v, rpb, ak, av = case.inputs().differentiable
    expected = reference.forward(Inputs(q, k, v, rpb, ak, av), case.rule, case.dim**-0.5)[0]
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    ak, av = (None if x is None else x.transpose(1, 2) for x in (ak, av))
    rank, options = len(case.space), window(case)
    attn = QK[rank](case.dim**-0.5 * q, k, **options, additional_keys=ak, rpb=rpb)
    assert attn.shape == (*q.shape[:-1], math.prod(case.kernel_size) + case.num_additional)
    assert attn.is_contiguous()
    out = AV[rank](attn.softmax(-1), v, **options, additional_values=av)
    assert out.is_contiguous()
    assert_close("out", expected, out.movedim(1, -2), 1e-12)


def test_slots_and_masked_weights():
    """Masked slots hold -inf in the result of qk; av ignores them and gives them gradient 0."""
    q = torch.randn(1, 1, 4, 2).double()
    attn = natten.na1d_qk(q, q, 3, is_causal=True)
    products = (q @ q.mT)[0, 0]
    for i in range(4):
        start = max(i - 2, 0)
        expected = [products[i, j].item() for j in range(start, i + 1)]
        assert attn[0, 0, i, : len(expected)].tolist() == pytest.approx(expected)
        assert (attn[0, 0, i, len(expected) :] == -math.inf).all()
    weights = torch.randn(1, 1, 4, 3).double().requires_grad_()
    masked = attn[0, 0] == -math.inf
    out = natten.na1d_av(weights, q, 3, is_causal=True)
    changed = weights.detach().masked_fill(masked, 1e9)
    assert torch.equal(natten.na1d_av(changed, q, 3, is_causal=True), out)
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert (grad[0, 0][masked] == 0).all() and (grad[0, 0][~masked] != 0).all()


def test_additional_weights_come_last():
    q, additional = torch.randn(1, 2, 5, 3).double(), torch.randn(1, 2, 4, 3).double()
    attn = natten.na1d_qk(q, q, 3, additional_keys=additional)
    assert_close("additional", q @ additional.mT, attn[..., 3:], 1e-12)
    assert_close("window", natten.na1d_qk(q, q, 3), attn[..., :3], 1e-12)


def test_with_bias():
    q, rpb = torch.randn(1, 2, 5, 6, 3), torch.randn(2, 5, 5)
    assert torch.equal(
        NF.na2d_qk_with_bias(q, q, rpb, 3, 1), natten.na2d_qk(q, q, 3, dilation=1, rpb=rpb)
    )
    assert torch.equal(NF.na2d_qk_with_bias(q, q, None, 3), natten.na2d_qk(q, q, 3))


def test_half_precision_unfused():
    q = torch.randn(1, 2, 8, 4)
    for dtype in (torch.bfloat16, torch.float16):
        half = q.to(dtype)
        attn = natten.na1d_qk(half, half, 3)
        assert attn.dtype == dtype
        assert_close("qk", natten.na1d_qk(half.double(), half.double(), 3), attn, 1e-2)
        # Weights of another dtype are cast to the values'.
        assert natten.na1d_av(attn.float(), half, 3).dtype == dtype


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_nested(rank):
    """0.17 returned an empty result for nested qk without additional keys."""
    shapes = [(7, 6, 5)[:rank], (9, 5, 6)[:rank]]
    items = [torch.randn(2, 2, *shape, 4) for shape in shapes]
    additional = [torch.randn(2, 2, n, 4) for n in (1, 3)]
    nest = torch.nested.nested_tensor
    for keys in (None, additional):
        attn = QK[rank](nest(items), nest(items), 3, additional_keys=keys and nest(keys))
        out = AV[rank](attn, nest(items), 3, additional_values=keys and nest(keys))
        assert attn.is_nested and attn.size(0) == 2
        for i, (x, found) in enumerate(zip(items, out.unbind())):
            option = {"additional_keys": keys[i]} if keys else {}
            expected = QK[rank](x, x, 3, **option)
            option = {"additional_values": keys[i]} if keys else {}
            assert torch.equal(AV[rank](expected, x, 3, **option), found)


# --- plain attention ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(6, 6), (9, 4), (3, 8)])
def test_attention(causal, length, keys):
    q, k, v = torch.randn(2, length, 4, 3), torch.randn(2, keys, 2, 3), torch.randn(2, keys, 2, 5)
    out = attention(q, k, v, is_causal=causal)
    expected = sdpa(
        *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=causal, enable_gqa=True
    )
    assert_close("out", expected.transpose(1, 2), out, 1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", ["seqlens", "cumulative"])
def test_attention_over_packed_sequences(causal, given):
    lengths, lengths_kv = [3, 0, 5], [4, 2, 1]
    q, k, v = (torch.randn(1, sum(n), 2, 3) for n in (lengths, lengths_kv, lengths_kv))
    if given == "seqlens":
        options = {"seqlens_Q": torch.tensor(lengths), "seqlens_KV": torch.tensor(lengths_kv)}
    else:
        names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
        seqlens = (torch.tensor(lengths), torch.tensor(lengths_kv))
        found = generate_varlen_parameters(q, k, v, *seqlens)
        assert found[2:] == (5, 4)
        options = dict(zip(names, found))
    out, lse = attention(q, k, v, is_causal=causal, return_lse=True, **options)
    for qs, ks, vs, part, part_lse in zip(
        q.split(lengths, 1), k.split(lengths_kv, 1), v.split(lengths_kv, 1),
        out.split(lengths, 1), lse.split(lengths, 1),
    ):  # fmt: skip
        expected, expected_lse = attention(qs, ks, vs, is_causal=causal, return_lse=True)
        assert torch.equal(expected, part) and torch.equal(expected_lse, part_lse)


def test_no_sequences_at_all():
    q, none = torch.randn(1, 0, 2, 3), torch.zeros(0, dtype=torch.int32)
    out, lse = attention(q, q, q, seqlens_Q=none, seqlens_KV=none, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 0, 2)


def test_nothing_to_attend_gives_zero_and_minus_infinity():
    q, k = torch.randn(1, 3, 1, 2), torch.randn(1, 0, 1, 2)
    out, lse = attention(q, k, k, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    merged, _ = merge_attentions([out, out], [lse, lse])
    assert (merged == 0).all()


# --- merging ---


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merging_is_attention_over_the_union(parts):
    """Values and gradients agree, with the gradient through the LSE."""
    q, k, v = (torch.randn(1, 12, 2, 4).double().requires_grad_() for _ in range(3))
    grad, grad_lse = torch.randn(1, 12, 2, 4).double(), torch.randn(1, 12, 2).double()
    expected = attention(q, k, v, return_lse=True)
    expected_grads = torch.autograd.grad(expected, (q, k, v), (grad, grad_lse))
    pieces = [
        attention(q, a, b, return_lse=True) for a, b in zip(k.chunk(parts, 1), v.chunk(parts, 1))
    ]
    kept = [x.clone() for piece in pieces for x in piece]
    merged = merge_attentions(*zip(*pieces))
    grads = torch.autograd.grad(merged, (q, k, v), (grad, grad_lse))
    for a, b in zip((*expected, *expected_grads), (*merged, *grads)):
        assert_close("merged", a, b, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x for piece in pieces for x in piece)))


def test_merging_keeps_its_precision_where_exponents_are_large():
    q = torch.full((1, 4, 1, 2), 1e3)
    k, v = torch.randn(1, 6, 1, 2) * 1e-3 + 1e3, torch.ones(1, 6, 1, 2)
    parts = [attention(q, k[:, i:], v[:, i:], return_lse=True) for i in (0, 3)]
    assert min(lse.min() for _, lse in parts) > 1e6
    assert_close("merged", torch.ones(1, 4, 1, 2), merge_attentions(*zip(*parts))[0], 1e-6)
    out, lse = merge_attentions(*([x.half(), y.half() / 1e4] for x, y in zip(*parts)))
    assert lse.dtype == torch.float32 and out.dtype == torch.float16


def test_views_that_negate():
    x, y = torch.randn(2, 1, 5, 1, 17).half()
    assert torch.equal(na1d(y, y, x, 1), na1d(y, y, torch._neg_view(-x), 1))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_no_heads(backend):
    x = torch.randn(1, 6, 2, 4, requires_grad=True)
    out, lse = na1d(x[:, :, :0], x, x, 3, return_lse=True, backend=backend)
    assert out.shape == (1, 6, 0, 4) and lse.shape == (1, 6, 0)
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


def test_keywords_in_any_order():
    q, rpb = torch.randn(1, 8, 8, 2, 4), torch.randn(2, 5, 5)
    expected = na2d(q, q, q, 3, rpb=rpb)
    assert torch.equal(na2d(rpb=rpb, kernel_size=3, value=q, key=q, query=q), expected)


def test_merging_parts_without_an_lse_gradient_warns():
    out = torch.randn(1, 4, 1, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="incomplete"):
        merge_attentions([out], [torch.zeros(1, 4, 1)])


# --- packed documents ---


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_varlen(rank):
    shapes = [(9, 4, 5)[:rank], (2, 7, 3)[:rank], (6, 6, 1)[:rank]]
    layout = VarlenLayout(shapes)
    total = layout.total_tokens
    assert total == sum(math.prod(shape) for shape in shapes) and len(layout) == 3
    q, k, v = torch.randn(total, 4, 3), torch.randn(total, 2, 3), torch.randn(total, 2, 5)
    rpb = torch.randn(4, *(5,) * rank)
    function = (natten.na1d_varlen, natten.na2d_varlen, natten.na3d_varlen)[rank - 1]
    options = {"kernel_size": 3, "dilation": 2, "rpb": rpb}
    out, lse = function(q, k, v, layout, **options, return_lse=True)
    assert torch.equal(function(q, k, v, layout, **options), out)
    documents = zip(shapes, *(layout.unpack(x) for x in (q, k, v, out, lse)))
    for shape, qs, ks, vs, part, part_lse in documents:
        kernel, stride, dilation = fit_window(shape, 3, 1, 2)
        bias = crop_rpb(rpb, (3,) * rank, kernel)
        expected = FUSED[rank](
            qs[None], ks[None], vs[None], kernel, stride, dilation, rpb=bias, return_lse=True
        )
        assert torch.equal(expected[0][0], part) and torch.equal(expected[1][0], part_lse)


EMPTY = {1: (0,), 2: (0, 3), 3: (2, 0, 0)}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_empty_documents(backend, rank):
    """Results, gradients, forward mode and second derivatives are the same without them."""
    shapes = [(4, 3, 5)[:rank], (5, 4, 2)[:rank]]
    full = VarlenLayout(shapes)
    layout = VarlenLayout([EMPTY[rank], shapes[0], EMPTY[rank], shapes[1], EMPTY[rank]])
    function = (natten.na1d_varlen, natten.na2d_varlen, natten.na3d_varlen)[rank - 1]
    total = layout.total_tokens
    q = torch.randn(total, 4, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(total, 2, n).double().requires_grad_() for n in (3, 5))
    rpb = torch.randn(4, *(5,) * rank, dtype=torch.float64, requires_grad=True)

    def run(layout):
        out, lse = function(q, k, v, layout, 3, 2, rpb=rpb, backend=backend, return_lse=True)
        loss = out.sin().sum() + lse.sin().sum()
        first = torch.autograd.grad(loss, (q, k, v, rpb), create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), (q, k, v, rpb))
        tangent = torch.func.jvp(lambda q: function(q, k, v, layout, 3), (q,), (q,))[1]
        return out, lse, tangent, *first, *second

    for expected, actual in zip(run(full), run(layout), strict=True):
        assert torch.equal(expected, actual)
    rule, cpu = natten.Neighborhood.create(rank, 3, 2), torch.device("cpu")
    ours, theirs = (each.documents(rule, cpu) for each in (layout, full))  # GPUs read these
    assert torch.equal(ours.table, theirs.table) and ours[1:] == theirs[1:]
    documents = [torch.randn(*shape, 1, 2) for shape in layout]
    assert VarlenLayout.from_tensor_list(documents)[0].shapes == layout.shapes
    unpacked = layout.unpack(layout.pack(documents))
    assert all(torch.equal(a, b) for a, b in zip(documents, unpacked, strict=True))
    assert layout.offsets.tolist()[:2] == [0, 0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_document_has_tokens(rank):
    layout = VarlenLayout([EMPTY[rank]] * 2)
    function = (natten.na1d_varlen, natten.na2d_varlen, natten.na3d_varlen)[rank - 1]
    q = torch.randn(0, 4, 3, requires_grad=True)
    k, v = torch.randn(0, 2, 3, requires_grad=True), torch.randn(0, 2, 5, requires_grad=True)
    out, lse = function(q, k, v, layout, 3, return_lse=True)
    assert out.shape == (0, 4, 5) and lse.shape == (0, 4)
    found = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("boundary", ["shift", "truncate", "circular"])
def test_documents_with_additional_tokens_and_masks(rank, boundary):
    """Each document is as it is alone, and so are gradients; what is masked may hold NaN."""
    shapes = [(6, 4, 5)[:rank], EMPTY[rank], (2, 7, 3)[:rank], (5, 5, 1)[:rank]]
    lengths = [3, 2, 0, 4]
    layout, total = VarlenLayout(shapes), sum(lengths)
    function = (natten.na1d_varlen, natten.na2d_varlen, natten.na3d_varlen)[rank - 1]

    def make(*shape):
        return torch.randn(shape, dtype=torch.float64)

    key_mask, additional_mask = torch.rand(layout.total_tokens) < 0.5, torch.rand(total) < 0.5
    key_mask[: math.prod(shapes[0])], additional_mask[:3] = False, False  # nothing is left there
    tokens = [make(layout.total_tokens, heads, dim) for heads, dim in ((4, 3), (2, 3), (2, 5))]
    additional = [make(total, 2, dim) for dim in (3, 5)]
    for x in tokens[1:]:
        x[~key_mask] = math.nan
    for x in additional:
        x[~additional_mask] = math.nan
    rpb = make(4, *(5,) * rank)
    tensors = [x.requires_grad_() for x in (*tokens, *additional, rpb)]
    q, k, v, ak, av, rpb = tensors
    options = {"boundary": boundary, "return_lse": True}
    out, lse = function(
        q, k, v, layout, 3, rpb=rpb, additional_keys=ak, additional_values=av,
        additional_lengths=lengths, key_mask=key_mask, additional_mask=additional_mask, **options,
    )  # fmt: skip
    expected = []
    unpacked = zip(*(layout.unpack(x) for x in (q, k, v, key_mask)))
    for shape, own, extra, mask in zip(
        shapes, unpacked, zip(ak.split(lengths), av.split(lengths)), additional_mask.split(lengths)
    ):
        if 0 in shape:
            continue
        kernel, stride, _ = fit_window(shape, 3, boundary=boundary)
        qs, ks, vs, own_mask, keys, values = (x[None] for x in (*own, *extra))
        found = FUSED[rank](
            qs, ks, vs, kernel, stride, additional_keys=keys, additional_values=values,
            rpb=crop_rpb(rpb, (3,) * rank, kernel), key_mask=own_mask, additional_mask=mask[None],
            **options,
        )  # fmt: skip
        expected.append([x[0].flatten(0, rank - 1) for x in found])
    expected = [torch.cat(x) for x in zip(*expected)]
    assert_close("out", expected[0], out, 1e-12)
    assert_close("lse", expected[1], lse, 1e-12)
    assert lse.isneginf().any() and out.isfinite().all()

    def loss(out, lse):
        return out.sin().sum() + lse.masked_fill(lse.isneginf(), 0.0).sin().sum()

    names = ("q", "k", "v", "ak", "av", "rpb")
    grads = (torch.autograd.grad(loss(*x), tensors) for x in (expected, (out, lse)))
    for name, a, b in zip(names, *grads):
        assert b.isfinite().all()
        assert_close(name, a, b, 1e-12)


def test_derivatives_of_documents_with_additional_tokens_and_masks():
    layout = VarlenLayout([4, 0, 3])
    tokens = [torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    additional = [torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    key_mask = torch.tensor([1, 0, 1, 1, 0, 0, 0]).bool()
    additional_mask = torch.tensor([1, 0, 1, 0, 0]).bool()

    def run(q, k, v, keys, values):
        return natten.na1d_varlen(
            q, k, v, layout, 3, additional_keys=keys, additional_values=values,
            additional_lengths=[2, 1, 2], key_mask=key_mask, additional_mask=additional_mask,
        )  # fmt: skip

    inputs = (*tokens, *additional)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_documents_that_nothing_is_taken_from():
    """Masks that are all true change no bit, and additional tokens may be those of one document."""
    layout = VarlenLayout([(4, 5), (3, 3)])
    q, k, v = torch.randn(3, layout.total_tokens, 2, 4)
    ak, av = torch.randn(2, 2, 2, 4)

    def run(**options):
        return natten.na2d_varlen(q, k, v, layout, 3, backend="tiled", **options)

    plain = run()
    assert torch.equal(run(key_mask=torch.ones(layout.total_tokens, dtype=torch.bool)), plain)
    added = {"additional_keys": ak, "additional_values": av, "additional_lengths": (0, 2)}
    out = run(**added)
    assert torch.equal(out[:20], plain[:20]) and (out[20:] - plain[20:]).abs().max() > 0.1
    assert_close("masked", plain, run(**added, additional_mask=torch.zeros(2).bool()), 1e-6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"additional_lengths": None}, "given together, but `additional_lengths` is None"),
        ({"additional_values": None}, "given together, but `additional_values` is None"),
        ({"additional_lengths": [5]}, r"must be 2 integers from 0 on, one per document, got \[5\]"),
        ({"additional_lengths": [-1, 6]}, "must be 2 integers from 0 on"),
        ({"additional_lengths": 5}, "must be 2 integers from 0 on"),
        ({"additional_lengths": [2.5, 2.5]}, "must be 2 integers from 0 on"),
        ({"additional_lengths": [2, 2]}, r"`additional_keys` must be \[total.* = \(4, 2, 4\)"),
        ({"additional_values": torch.zeros(5, 1, 4)}, r"`additional_values` must be \[total"),
        ({"additional_keys": torch.zeros(1, 5, 2, 4)}, r"got \(1, 5, 2, 4\)"),
        ({"additional_keys": torch.zeros(5, 2, 4).double()}, "must have the dtype of `query`"),
        ({"key_mask": torch.ones(1, 12, dtype=torch.bool)}, r"`key_mask` must be \[tokens\]"),
        ({"key_mask": torch.ones(12)}, "`key_mask` must be a tensor of torch.bool.*float32"),
        ({"key_mask": [True] * 12}, "`key_mask` must be a tensor of torch.bool.*list"),
        ({"key_mask": torch.ones(12, dtype=torch.bool, device="meta")}, "on the device of `key`"),
        ({"additional_mask": torch.ones(4, dtype=torch.bool)}, r"must be \[total\] = \(5,\)"),
    ],
)  # fmt: skip
def test_wrong_additional_tokens_and_masks_of_documents(wrong, message):
    q = torch.zeros(12, 2, 4)
    right = {
        "additional_keys": torch.zeros(5, 2, 4),
        "additional_values": torch.zeros(5, 2, 4),
        "additional_lengths": [2, 3],
    }
    with pytest.raises(natten.ArgumentError, match=message):
        natten.na1d_varlen(q, q, q, VarlenLayout([4, 8]), 3, **right | wrong)


def test_a_mask_of_no_additional_tokens():
    q, mask = torch.zeros(12, 2, 4), torch.ones(5, dtype=torch.bool)
    with pytest.raises(natten.ArgumentError, match="`additional_mask` needs `additional_keys`"):
        natten.na1d_varlen(q, q, q, VarlenLayout([4, 8]), 3, additional_mask=mask)


def test_layout():
    documents = [torch.randn(2, 3, 1, 4), torch.randn(5, 1, 1, 4)]
    layout, joined = VarlenLayout.from_tensor_list(documents)
    assert layout.shapes == ((2, 3), (5, 1)) and layout.offsets.tolist() == [0, 6, 11]
    packed = layout.pack(documents)
    assert packed.shape == (11, 1, 4) and torch.equal(packed, joined)
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(packed), documents))
    assert VarlenLayout([4, 5]).rank == 1 and "(4,)" in repr(VarlenLayout([4]))


def test_dense_rule_through_the_operator():
    q = torch.randn(1, 5, 1, 2)
    direct = reference.forward(Inputs(q, q, q), Dense(), 0.5)[0]
    assert_close("out", direct, attention(q, q, q, scale=0.5), 1e-6)
