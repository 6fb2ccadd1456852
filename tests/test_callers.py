"""Calls as public programs make them, and cases of wrong numbers that users have met."""

import math

import pytest
import torch
from helpers import Case, assert_close, masked_attention, reference, tiled

import natten
from natten import functional as NF
from natten.inputs import Inputs
from natten.neighborhood import window_mask


def expected(q, k, v, rule, scale):
    """Masked attention over heads-last ``[batch, *space, heads, dim]``."""
    space = q.shape[1:-2]
    out = masked_attention(
        *(x.flatten(1, -3) for x in (q, k, v)), window_mask(rule, space, space), scale
    )
    return out.view(*q.shape[:-1], v.shape[-1])


# --- callers ---


def test_nat():
    """NAT chooses the name of the bias by the era, and passes dilation=None."""
    extra = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
    module = natten.NeighborhoodAttention2D(
        dim=16, kernel_size=3, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None,
        attn_drop=0.0, proj_drop=0.0, **extra,
    )  # fmt: skip
    assert module(torch.randn(1, 6, 7, 16)).shape == (1, 6, 7, 16) and module.rpb is not None


def test_hdit():
    """k-diffusion asks has_fused_na(), then passes views and scale=1.0."""
    assert natten.has_fused_na() is torch.cuda.is_available()
    qkv = torch.randn(2, 6, 7, 3 * 2 * 8).double()
    q, k, v = qkv.view(2, 6, 7, 3, 2, 8).unbind(3)
    q, k = (x.movedim(-2, 1).contiguous().movedim(1, -2) for x in (q, k))
    assert not q.is_contiguous() and not v.is_contiguous()
    out = NF.na2d(q, k, v, 5, scale=1.0)
    assert_close("fused", expected(q, k, v, natten.Neighborhood.create(2, 5), 1.0), out, 1e-12)
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    attn = NF.na2d_qk(q, k, 5).softmax(-1)
    assert_close("unfused", out, NF.na2d_av(attn, v, 5).movedim(1, -2), 1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"),
    [
        ((-1, 4, 16), 1, (1, 2, 1)),
        ((-1, 4, 8), (1, 4, 1), (1, 1, 2)),
        ((-1, 8, 12), (1, 4, 8), 1),
    ],
)
def test_cosmos(kernel_size, stride, dilation):
    """Its caller resolves -1 to the whole axis; backend and tiles are hints."""
    space = (3, 11, 20)
    kernel_size = tuple(n if k == -1 else k for n, k in zip(space, kernel_size))
    q, k, v = (torch.randn(1, *space, 2, 16).bfloat16() for _ in range(3))
    out = natten.functional.neighborhood_attention_generic(
        query=q, key=k, value=v, kernel_size=kernel_size, stride=stride, dilation=dilation,
        is_causal=False, scale=None, backend="hopper-fna", q_tile_shape=(2, 8, 8),
        kv_tile_shape=(2, 8, 8), run_persistent_kernel=True, return_lse=False,
    )  # fmt: skip
    rule = natten.Neighborhood.create(3, kernel_size, stride, dilation)
    wanted = expected(*(x.double() for x in (q, k, v)), rule, 16**-0.5)
    assert_close("cosmos", wanted, out, 1e-2)


def test_ltx_2():
    """The video autoencoder passes scale=1.0 and backend=None."""
    q, k, v = (0.1 * torch.randn(1, 4, 6, 5, 2, 64) for _ in range(3))
    out = natten.na3d(q, k, v, kernel_size=(3, 5, 3), scale=1.0, backend=None)
    rule = natten.Neighborhood.create(3, (3, 5, 3))
    assert_close("ltx", expected(*(x.double() for x in (q, k, v)), rule, 1.0), out, 1e-5)


@pytest.mark.parametrize("ratio", [2, 4])
def test_naf_anyup(ratio):
    """Upsampling with 32 channels for queries, 384 for values, and the ratio as dilation."""
    q, k = (torch.randn(1, 12, 16, 1, 32) for _ in range(2))
    v = torch.randn(1, 12, 16, 1, 384)
    out = natten.na2d(q, k, v, 3, dilation=(ratio, ratio))
    rule = natten.Neighborhood.create(2, 3, 1, ratio)
    assert_close("naf", expected(*(x.double() for x in (q, k, v)), rule, 32**-0.5), out, 1e-5)


def test_all_in_one():
    """Music structure analysis on the CPU, with head dim 12, windows of 5 and growing dilation."""
    q, k, v = (torch.randn(1, 2, 50, 12).double() for _ in range(3))
    rpb = torch.randn(2, 9).double()
    for dilation in (1, 2, 8):
        with pytest.warns(DeprecationWarning):
            attn = NF.natten1dqkrpb(q, k, rpb, 5, dilation)
            out = NF.natten1dav(attn.softmax(-1), v, 5, dilation)
        inputs = [x.movedim(1, -2) for x in (q, k, v)]
        rule = natten.Neighborhood.create(1, 5, 1, dilation)
        wanted, _ = reference.forward(Inputs(*inputs, rpb), rule, 1.0)
        assert_close("all-in-one", wanted, out.movedim(1, -2), 1e-12)


def test_agileformer():
    """The bias is the third argument, and learned tokens are additional keys and values."""
    q, k, v = (torch.randn(1, 2, 6, 7, 4).double() for _ in range(3))
    tokens, bias = torch.randn(1, 2, 3, 4).double(), torch.randn(2, 5, 5).double()
    attn = NF.na2d_qk_with_bias(q, k, bias, 3, 1, tokens).softmax(-1)
    out = NF.na2d_av(attn, v, 3, 1, tokens)
    inputs = [x.movedim(1, -2) for x in (q, k, v)]
    additional = tokens.transpose(1, 2)
    wanted, _ = reference.forward(
        Inputs(*inputs, bias, additional, additional), natten.Neighborhood.create(2, 3), 1.0
    )
    assert_close("agileformer", wanted, out.movedim(1, -2), 1e-12)


def test_stylenat():
    """Heads are split in two, each half with a window and a dilation of its own."""
    q, k, v = (torch.randn(1, 4, 12, 12, 4).double() for _ in range(3))
    halves = []
    for i, (kernel_size, dilation) in enumerate([(3, 1), (5, 2)]):
        qs, ks, vs = (x.chunk(2, dim=1)[i] for x in (q, k, v))
        attn = NF.na2d_qk(qs, ks, kernel_size, dilation).softmax(-1)
        halves.append(NF.na2d_av(attn, vs, kernel_size, dilation))
        rule = natten.Neighborhood.create(2, kernel_size, 1, dilation)
        wanted = expected(*(x.movedim(1, -2) for x in (qs, ks, vs)), rule, 1.0)
        assert_close("stylenat", wanted, halves[-1].movedim(1, -2), 1e-12)
    assert torch.cat(halves, dim=1).shape == q.shape


def test_cosmos3():
    """Video tokens attend their window, and text tokens by a second attention that is merged."""
    q, k, v = (torch.randn(1, 3, 4, 5, 2, 8).double() for _ in range(3))
    text_k, text_v = (torch.randn(1, 6, 2, 8).double() for _ in range(2))
    window = natten.na3d(q, k, v, (3, 3, 3), backend="blackwell-fna", return_lse=True)
    text = natten.attention(
        q.flatten(1, 3), text_k, text_v, backend="blackwell-fmha", return_lse=True
    )
    parts = [window[0].flatten(1, 3), text[0]], [window[1].flatten(1, 3), text[1]]
    out, _ = natten.merge_attentions(*parts, torch_compile=False, use_autograd_fix=True)
    rule = natten.Neighborhood.create(3, 3)
    wanted, _ = reference.forward(Inputs(q, k, v, None, text_k, text_v), rule, 8**-0.5)
    assert_close("cosmos3", wanted.flatten(1, 3), out, 1e-12)


# --- wrong numbers that users of NATTEN met ---


def test_backward_heeds_the_gradient_of_lse():
    q, k, v = (torch.randn(1, 9, 1, 4).double().requires_grad_() for _ in range(3))
    out, lse = natten.na1d(q, k, v, 3, return_lse=True)
    with_lse = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)[0]
    without = torch.autograd.grad(out.sum(), q)[0]
    assert (with_lse - without).abs().max() > 0.1


def test_merging_does_not_overwrite_the_callers_tensors():
    q, k, v = (torch.randn(1, 8, 1, 4, requires_grad=True) for _ in range(3))
    parts = [
        natten.attention(q, x, y, return_lse=True) for x, y in zip(k.chunk(2, 1), v.chunk(2, 1))
    ]
    kept = [[x.detach().clone() for x in part] for part in parts]
    out, lse = natten.merge_attentions(*zip(*parts))
    (out.sum() + lse.sum()).backward()
    for part, before in zip(parts, kept):
        assert all(torch.equal(a, b) for a, b in zip(part, before))


def test_wide_values_with_large_dilation():
    case = Case(
        (33, 40), (2, 2), dilation=(16, 16), batch=1, heads=1, kv_heads=1, dim=8, value_dim=384
    )
    q, k, v, *_ = case.inputs()
    out = natten.na2d(q, k, v, 2, dilation=16)
    assert_close("wide", expected(q, k, v, case.rule, 8**-0.5), out, 1e-12)


@pytest.mark.parametrize("length", [17, 63, 65, 129])
def test_partial_tiles_hold_no_garbage(length, monkeypatch):
    """Every buffer starts as NaN, so that an entry that is not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(make):
        def function(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return function

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    case = Case((length,), (7,), batch=1, dim=4, value_dim=5)
    inputs = case.inputs()
    out, lse = tiled.forward(Inputs(*inputs), case.rule, 0.5)
    grads = tiled.backward(torch.ones_like(out), None, inputs, out, lse, case.rule, 0.5)
    for x in (out, lse, *grads[:3]):
        assert torch.isfinite(x).all()


def test_non_contiguous_inputs():
    x = torch.randn(2, 3, 9, 8, 5).double()  # heads first in memory
    view = x.movedim(1, -2)
    out = natten.na2d(view, view, view, 3)
    assert torch.equal(out, natten.na2d(*(view.contiguous(),) * 3, 3))


def test_far_from_the_start():
    """In a long 1-D input, offsets and phases far from the start are right."""
    q = torch.randn(1, 5000, 1, 2).double()
    out = natten.na1d(q, q, q, 5, dilation=3)
    end = natten.na1d(*(q[:, -600:],) * 3, 5, dilation=3)
    assert_close("end", end[:, -50:], out[:, -50:], 1e-12)
