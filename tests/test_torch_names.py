"""Releases of PyTorch that have one of its private names no more: slower, with the same numbers."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import natten
from natten import _torch

# Where each name is, as a path from torch; all that `natten._torch` looks up.
NAMES = (
    "_C._are_functorch_transforms_active",
    "_C._len_torch_dispatch_stack",
    "_ops._len_torch_dispatch_stack_pre_dispatch",
    "_C._get_tracing_state",
    "_C._is_any_autocast_enabled",
    "_C._get_dispatch_mode",
    "_C._TorchDispatchModeKey",
    "_subclasses.FakeTensor",
    "autograd.forward_ad._current_level",
    "_functorch.eager_transforms.JVP_NESTING",
    "_functorch.eager_transforms",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.unwrap_if_dead",
    "_assert_async",
    "ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "distributed.distributed_c10d._get_default_store",
)


@pytest.fixture(scope="module", params=NAMES)
def without(request):
    """The package, as it is where PyTorch lacks a name."""
    name = request.param
    *path, last = name.split(".")
    home = torch
    for each in path:
        home = getattr(home, each)
    with pytest.MonkeyPatch.context() as patch:
        if home is torch.ops.aten:  # which makes what it is asked for
            patch.setattr(home, "_hidden", last, raising=False)
            found = type(home).__getattr__
            patch.delattr(home, last, raising=False)

            def hiding(self, name):
                if self is home and name == last:
                    raise AttributeError(name)
                return found(self, name)

            patch.setattr(type(home), "__getattr__", hiding)
        else:
            patch.delattr(home, last)
        package = "natten_without_" + re.sub(r"\W", "_", name)
        origin = Path(natten.__file__)
        spec = importlib.util.spec_from_file_location(package, origin)
        module = sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.backends.sdpa  # noqa: B018  # imported while the name is hidden
    return module


def test_every_private_name_is_hidden_once():
    source = Path(_torch.__file__).read_text()
    found = set(re.findall(r'_private\(\s*"([\w.]+)"', source))
    found |= {f"ops.aten.{each}" for each in re.findall(r'_overload\("(\w+)"\)', source)}
    found |= {"autograd.forward_ad._current_level", "_functorch.eager_transforms.JVP_NESTING"}
    found = {"_C._TorchDispatchModeKey" if "ModeKey" in each else each for each in found}
    assert found == set(NAMES)


Q, T = torch.randn(2, 1, 5, 6, 2, 4, generator=torch.Generator().manual_seed(0)).double()
RPB = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(1)).double()


def functions(package):
    """Functions of ``q [batch, height, width, heads, dim]``, fused, unfused, packed and wide."""

    def fused(q):
        out, lse = package.na2d(q, q.sin(), q.cos(), 3, is_causal=True, rpb=RPB, return_lse=True)
        return out * lse[..., None]

    def unfused(q):
        q = q.movedim(-2, 1)
        attn = package.na2d_qk(q, q.sin(), 3, rpb=RPB)
        return package.na2d_av(attn.softmax(-1), q.cos(), 3)

    def packed(q):
        q, lengths = q.flatten(1, 2), torch.tensor([10, 20])
        return package.attention(q, q.sin(), q.cos(), seqlens_Q=lengths, seqlens_KV=lengths)

    return {"fused": fused, "unfused": unfused, "packed": packed}


KINDS = ("fused", "unfused", "packed")


def derivatives(function):
    q = Q.clone().requires_grad_()
    out = function(q)
    (first,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(Q, T))).tangent
    return out, first, second, tangent


def transformed(function):
    loss = lambda q: function(q).sin().sum()  # noqa: E731
    return (
        vmap(grad(loss))(torch.stack([Q, T])),
        jacobian(lambda q: function(q)[..., 0].sum((0, 1)), Q, vectorize=True),
    )


def pushed(function):
    zero = torch.zeros((), dtype=torch.float64)
    return (
        jvp(function, (Q,), (T,))[1],
        jacfwd(lambda t: function(Q + t))(zero),
        hessian(lambda t: function(Q + t * T).sin().sum())(zero),
    )


def recorded(function):
    """What several tracers make of it, for other numbers than those they saw."""
    traced = torch.jit.trace(function, Q, check_trace=False)
    return make_fx(function)(Q)(T), traced(T)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numbers", [derivatives, transformed, pushed, recorded])
def test_numbers(without, kind, numbers):
    expected = numbers(functions(natten)[kind])
    if numbers is pushed and "eager_transforms" in without.__name__:
        # One `jvp` may be inside of another one, so even one alone is an error there.
        with pytest.raises(without.errors.UnsupportedError, match="differentiated twice"):
            numbers(functions(without)[kind])
        return
    for index, (wanted, found) in enumerate(zip(expected, numbers(functions(without)[kind]))):
        assert_close(f"{numbers.__name__} {index}", wanted, found, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_second_tangents_are_refused(without, kind):
    function = functions(without)[kind]
    with pytest.raises(without.errors.UnsupportedError, match="differentiated twice"):
        jvp(lambda q: jvp(function, (q,), (T,))[1], (Q,), (T,))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_data(without, kind):
    wanted = functions(natten)[kind](Q)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert functions(without)[kind](mode.from_tensor(Q)).shape == wanted.shape


def test_wide_windows(without):
    """Of 32-bit numbers, which the backend `sdpa` would run."""
    q = torch.randn(1, 400, 2, 32, requires_grad=True)
    found = [each.na1d(q, q, q, kernel_size=300) for each in (natten, without)]
    grads = [torch.autograd.grad(out.sin().sum(), q)[0] for out in found]
    assert_close("out", *found, 1e-5)
    assert_close("grad", *grads, 1e-5)
    kernels = without._torch.cpu_attention, without._torch.cpu_attention_backward
    assert ("sdpa: runs" in without.backends.explain(q, kernel_size=300)) == all(kernels)


def test_lengths_are_checked(without):
    starts = torch.tensor([0, 2, 5])
    without.sequences.check_starts("Q", 5, starts, 3)
    with pytest.raises(RuntimeError):
        without.sequences.check_starts("Q", 6, starts, 3)
