"""Modules: both signatures, dropout, bias, checkpoints, windows larger than the input."""

import pytest
import torch
from helpers import assert_close, masked_attention

import natten
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.neighborhood import window_mask

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


@pytest.mark.parametrize("rank", MODULES)
def test_is_masked_attention_between_projections(rank):
    space = (8, 7, 6)[:rank]
    module = MODULES[rank](12, 3, 3, stride=2, dilation=2, is_causal=True).double()
    x = torch.randn(2, *space, 12).double()
    rule = natten.Neighborhood.create(rank, 3, 2, 2, True)
    q, k, v = module.qkv(x).flatten(1, -2).unflatten(-1, (3, 3, 4)).unbind(2)
    out = masked_attention(q, k, v, window_mask(rule, space, space), 4**-0.5)
    assert_close("module", module.proj(out.flatten(-2)).view(x.shape), module(x), 1e-12)


def test_signatures():
    new = NeighborhoodAttention2D(8, 2, (3, 5), (1, 2), (2, 1), (True, False), False, 0.5, 0.1)
    assert (new.kernel_size, new.stride, new.dilation) == ((3, 5), (1, 2), (2, 1))
    assert (new.is_causal, new.scale, new.proj_drop.p) == ((True, False), 0.5, 0.1)
    assert new.qkv.bias is None and new.rpb is None
    old = NeighborhoodAttention2D(
        dim=8, num_heads=2, kernel_size=3, dilation=None, bias=True, attn_drop=0.2,
        use_experimental_ops=True,
    )  # fmt: skip
    assert old.rpb.shape == (2, 5, 5) and old.attn_drop_rate == 0.2 and old.dilation == (1, 1)
    deep = NeighborhoodAttention3D(dim=8, num_heads=2, kernel_size=5, kernel_size_d=3, dilation_d=2)
    assert (deep.kernel_size, deep.dilation) == ((3, 5, 5), (2, 1, 1))
    assert natten.NeighborhoodAttention is NeighborhoodAttention2D
    text = "head_dim=4, num_heads=2, kernel_size=(3, 5), stride=(1, 2), dilation=(2, 1)"
    assert text in repr(new) and "has_bias=False" in repr(new)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"stride": 2, "dilation": 2}])
def test_dropout_takes_the_unfused_path(options, monkeypatch):
    """Without dropping anything it gives what the fused path gives; eval mode is fused."""
    module = NeighborhoodAttention2D(
        8, 2, 3, rel_pos_bias=True, attn_drop=1e-15, **options
    ).double()
    x = torch.randn(1, 7, 6, 8).double()
    expected = module.eval()(x)
    monkeypatch.setattr("natten.modules.neighborhood_attention_generic", None)
    assert_close("unfused", expected, module.train()(x), 1e-12)


def test_dropout_may_be_changed():
    module = NeighborhoodAttention1D(8, 2, 3)
    module.attn_drop.p = 1.0
    x = torch.randn(1, 6, 8)
    assert torch.equal(module(x), module.proj.bias.expand(1, 6, 8))
    assert not torch.equal(module.eval()(x), module.proj.bias.expand(1, 6, 8))


def test_dropout_drops():
    module = NeighborhoodAttention1D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 9, 8)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize("built_with_bias", [False, True])
def test_checkpoints_of_every_era(rank, built_with_bias):
    """``rpb`` in a checkpoint creates the parameter; loading is strict otherwise."""
    old = MODULES[rank](8, 2, 3, rel_pos_bias=True)
    state = old.state_dict()
    assert list(state) == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    new = torch.nn.Sequential(MODULES[rank](8, 2, 3, rel_pos_bias=built_with_bias))
    new.load_state_dict({f"0.{name}": x for name, x in state.items()}, strict=True)
    x = torch.randn(1, *(6,) * rank, 8)
    assert torch.equal(new(x), old(x))
    assert new[0].rpb.requires_grad and "0.rpb" in dict(new.named_parameters())
    plain = MODULES[rank](8, 2, 3)
    plain.load_state_dict(MODULES[rank](8, 2, 3).state_dict(), strict=True)
    assert plain.rpb is None


def test_checkpoint_that_does_not_fit_is_refused():
    module = NeighborhoodAttention1D(8, 2, 5)
    state = NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for rpb"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*rpb"):
        biased = NeighborhoodAttention1D(8, 2, 5, rel_pos_bias=True)
        biased.load_state_dict(NeighborhoodAttention1D(8, 2, 5).state_dict())


def test_bias_is_trained():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    assert 0 < module.rpb.std() < 0.05
    module(torch.randn(1, 5, 5, 8)).square().sum().backward()
    assert (module.rpb.grad != 0).all()


def test_oversize_error():
    with pytest.raises(ValueError, match="must not exceed the input"):
        NeighborhoodAttention2D(8, 2, 7)(torch.randn(1, 5, 9, 8))


def test_oversize_clamp():
    module = NeighborhoodAttention2D(8, 2, 5, 2, 3, rel_pos_bias=True, oversize="clamp").double()
    x = torch.randn(1, 7, 20, 8).double()
    kernel, stride, dilation = natten.fit_window((7, 20), 5, 2, 3)
    assert kernel == (2, 5)
    small = NeighborhoodAttention2D(8, 2, kernel, stride, dilation, rel_pos_bias=True).double()
    state = module.state_dict() | {"rpb": module.rpb[:, 3:6]}
    small.load_state_dict(state)
    assert torch.equal(module(x), small(x))
    assert module(torch.randn(1, 1, 1, 8).double()).shape == (1, 1, 1, 8)


def test_oversize_pad():
    module = NeighborhoodAttention2D(8, 2, 3, dilation=3, oversize="pad").double()
    x = torch.randn(1, 5, 12, 8).double()
    padded = torch.cat([x, torch.zeros(1, 4, 12, 8).double()], dim=1)
    assert torch.equal(module(x), module(padded)[:, :5])
