"""Layers: both signatures, dropout, bias, checkpoints, windows larger than the input."""

import warnings

import pytest
import torch
from helpers import assert_close, masked_attention

import natten
from natten import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    _warnings,
)
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
    """If it drops nothing, it gives the fused path's result; evaluation takes the fused path."""
    module = NeighborhoodAttention2D(
        8, 2, 3, rel_pos_bias=True, attn_drop=1e-15, **options
    ).double()
    x = torch.randn(1, 7, 6, 8).double()
    expected = module.eval()(x)
    monkeypatch.setattr("natten.modules.attend", None)
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


# --- hints ---


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize(
    "wrong", [{"backend": "no such"}, {"nonsense": 1}, {"q_tile_shape": "x"}, {"return_lse": True}]
)
def test_hints_are_checked_with_and_without_dropout(rank, wrong):
    module = MODULES[rank](8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, *(6,) * rank, 8)
    for _ in range(2):
        for mode in (True, False):
            with pytest.raises(natten.ArgumentError, match=next(iter(wrong))):
                module.train(mode)(x, **wrong)


@pytest.mark.parametrize("rank", MODULES)
def test_additional_tokens_with_and_without_dropout(rank):
    """They change the result and the gradients, so dropout must not lose them."""
    module = MODULES[rank](8, 2, 3, attn_drop=1e-15, rel_pos_bias=True, is_causal=True).double()
    x = torch.randn(2, *(5,) * rank, 8).double()
    additional = [torch.randn(2, 3, 2, 4).double().requires_grad_() for _ in range(2)]
    hints = dict(zip(("additional_keys", "additional_values"), additional))
    results = []
    for mode in (False, True):
        out = module.train(mode)(x, **hints)
        results.append((out, *torch.autograd.grad(out.square().sum(), additional)))
    for name, a, b in zip(("out", *hints), *results):
        assert_close(name, a, b, 1e-12)
    assert (results[0][0] - module.eval()(x)).abs().max() > 0.01
    with pytest.raises(natten.ArgumentError, match="given together"):
        module.train()(x, additional_keys=additional[0])


def test_a_backend_is_not_heeded_where_weights_are_dropped_out(monkeypatch):
    monkeypatch.setattr(_warnings, "_given", set())
    module, x = NeighborhoodAttention1D(8, 2, 3, attn_drop=0.5), torch.randn(1, 6, 8)
    with pytest.warns(UserWarning, match="`backend` has no effect in training with `attn_drop`"):
        module(x, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, backend="reference")  # warns here, and not again
        module(x, backend="cutlass-fna")
        module.eval()(x, backend="reference")


@pytest.mark.parametrize("rank", MODULES)
def test_names_of_the_bias_that_contradict_each_other(rank):
    for new, old in ((True, False), (False, True)):
        with pytest.raises(natten.ArgumentError, match=r"`rel_pos_bias` and `bias`.*contradict"):
            MODULES[rank](8, 2, 3, rel_pos_bias=new, bias=old)
    for new, old, has in (
        (None, None, False), (None, True, True), (None, False, False), (True, None, True),
        (False, None, False), (True, True, True), (False, False, False),
    ):  # fmt: skip
        module = MODULES[rank](8, 2, 3, rel_pos_bias=new, bias=old)
        assert (module.rpb is not None) is has


# --- layouts ---


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_channels_first(rank, drop):
    module = MODULES[rank](8, 2, 3, attn_drop=drop)
    space = ", ".join(("depth", "height", "width")[-rank:] if rank > 1 else ["length"])
    said = rf"\[batch, {space}, 8\], channels last"
    with pytest.raises(natten.ArgumentError, match=rf"{said}.*x\.movedim\(1, -1\)"):
        module(torch.randn(2, 8, *(6,) * rank))
    with pytest.raises(natten.ArgumentError, match=said) as caught:
        module(torch.randn(2, *(6,) * rank, 7))
    assert "movedim" not in str(caught.value)
    with pytest.raises(natten.ArgumentError, match=f"rank-{rank + 2} input.*{said}"):
        module(torch.randn(*(6,) * rank, 8))
    with pytest.raises(natten.ArgumentError, match=r"`x` must be a torch\.Tensor, got.*list"):
        module([1.0])
    with pytest.raises(NotImplementedError, match="`x` must not be a nested tensor"):
        module(torch.nested.nested_tensor([torch.randn(*(6,) * rank, 8)]))


# --- checkpoints into projections that are no longer plain ---


class Adapted(torch.nn.Module):
    """A frozen projection with a small trained one beside it, whose parameters come first."""

    def __init__(self, linear):
        super().__init__()
        self.down = torch.nn.Linear(linear.in_features, 1, bias=False)
        self.up = torch.nn.Linear(1, linear.out_features, bias=False)
        self.wrapped = linear.requires_grad_(False)

    def forward(self, x):
        return self.wrapped(x) + self.up(self.down(x)).to(x.dtype)


class Coded(torch.nn.Module):
    """Eight-bit weights, whose dtype a bias can not have."""

    def __init__(self, linear, dtype):
        super().__init__()
        scaled = linear.weight.detach() * (1 if dtype.is_floating_point else 100)
        self.weight = torch.nn.Parameter(scaled.to(dtype), requires_grad=False)
        self.register_buffer("scale", scaled.abs().max())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def biased_state(rank, dtype):
    return MODULES[rank](8, 2, 3, rel_pos_bias=True).to(dtype).state_dict()


def load_bias(module, state):
    """Load only the bias, as loaders do that know the wrapped projections."""
    given = module.state_dict()
    given["rpb"] = state["rpb"]
    module.load_state_dict(given, strict=True)
    assert_close("rpb", state["rpb"], module.rpb.to(state["rpb"].dtype), 1e-2)
    return module.rpb


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bias_of_a_checkpoint_into_wrapped_projections(rank, dtype):
    """It has the dtype of the wrapped weight, and is frozen if that is."""
    x, state = torch.randn(1, *(5,) * rank, 8).to(dtype), biased_state(rank, torch.float32)
    plain = MODULES[rank](8, 2, 3).to(dtype)
    assert load_bias(plain, state).requires_grad and plain.rpb.dtype == dtype
    frozen = MODULES[rank](8, 2, 3).to(dtype).requires_grad_(False)
    assert not load_bias(frozen, state).requires_grad
    adapted = MODULES[rank](8, 2, 3).to(dtype)
    adapted.qkv, adapted.proj = Adapted(adapted.qkv), Adapted(adapted.proj)
    assert not load_bias(adapted, state).requires_grad and adapted.rpb.dtype == dtype
    for coded in (torch.int8, torch.float8_e4m3fn):
        module = MODULES[rank](8, 2, 3).to(dtype)
        module.qkv = Coded(module.qkv, coded)
        assert not load_bias(module, state).requires_grad and module.rpb.dtype == dtype
        assert module(x).isfinite().all()


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_bias_of_a_checkpoint_into_quantized_projections(rank):
    module, state = MODULES[rank](8, 2, 3), biased_state(rank, torch.float32)
    x = torch.randn(1, *(5,) * rank, 8)
    linear = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, torch.qint8)
    assert not list(linear.parameters())
    before = linear(x)
    rpb = load_bias(linear, state)
    assert rpb.dtype == torch.float32 and not rpb.requires_grad
    assert not torch.equal(before, linear(x))
