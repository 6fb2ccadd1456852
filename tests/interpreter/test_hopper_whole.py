"""Whole Hopper kernels, roles and pipelines and all, against the reference in float64."""

import math

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import machine  # before the kernels
import torch
from helpers import reference
from hopper_problems import rule_of
from masked import check_masks

from natten.backends.hopper import fused, uneven
from natten.backends.hopper import tiles as tiling
from natten.backends.interface import KINDS
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood

# Of NaN and infinity, which masked numbers are; and of arrays of one number, in the interpreter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Blocks of 10x6 keys in matrices of 64; a window, a stride, a dilation.
NOT_FULL = (16, 24), ((16, 12), (4, 8), 1, False)
# Heads, heads of keys, channels, additional tokens.
TENSORS = {
    "a warp clears, as many additional tokens as a matrix has": (2, 1, 24, 64),
    "half aligned": (2, 2, 20, 0),
    "two chunks": (1, 1, 96, 3),
}


def tensors(shape, heads, kv_heads, dim, num_additional):
    torch.manual_seed(0)
    sizes = [(1, *shape, n, dim) for n in (heads, kv_heads, kv_heads)]
    sizes += [(1, num_additional, kv_heads, dim)] * 2 * (num_additional > 0)
    q, k, v, *additional = [torch.randn(size, dtype=torch.float16) for size in sizes]
    return Inputs(q, k, v, None, *additional)


def check(inputs, rule):
    scale, grad = inputs.query.shape[-1] ** -0.5, torch.randn_like(inputs.query)
    with machine.launched():
        out, lse = fused.forward(inputs, rule, scale)
        grads = fused.backward(grad, None, inputs, out, lse, rule, scale)
    exact = Inputs(*(None if x is None else x.double() for x in inputs))
    right = reference.forward(exact, rule, scale)
    wanted = reference.backward(grad.double(), None, exact, *right, rule, scale)
    for a, b in zip((*right, *wanted), (out, lse, *grads)):
        if a is not None:
            assert (a - b).square().mean() < 4e-6 * a.square().mean()


@pytest.mark.parametrize("name", TENSORS)
def test_blocks_that_are_not_full(name):
    shape, parameters = NOT_FULL
    heads, kv_heads, dim, num_additional = TENSORS[name]
    rule = rule_of(shape, *parameters)
    assert tiling.choose("forward", rule, shape, shape, dim, dim).kv_block == (1, 10, 6)
    check(tensors(shape, heads, kv_heads, dim, num_additional), rule)


@pytest.mark.parametrize(
    ("window", "shape", "offset", "is_causal"),
    [((3, 5, 3), (4, 5, 8), (2, 3, 0), False), ((4, 5, 4), (5, 6, 6), (1, 0, 2), True)],
)
def test_parts_have_tiles_that_are_not_full(monkeypatch, window, shape, offset, is_causal):
    """Of large layouts, as which this one counts."""
    monkeypatch.setattr(uneven, "LARGE", 1)
    rule = Neighborhood.create(3, window, 1, 1, is_causal, query_offset=offset)
    keys = (7, 9, 8)
    sizes = [tiling.choose(kind, rule, shape, keys, 64, 64)[:2] for kind in KINDS]
    assert any(math.prod(tile) < 64 for both in sizes for tile in both)
    inputs = tensors(keys, 2, 2, 64, 0)
    check(inputs._replace(query=torch.randn(1, *shape, 2, 64, dtype=torch.float16)), rule)


def test_masks_of_keys():
    inputs = tensors((19,), 2, 1, 32, 70)
    masks = [torch.rand(1, n) < 0.6 for n in (19, 70)]
    rule = rule_of((19,), 7, 1, 1, False)
    with machine.launched():
        inputs = inputs._replace(key_mask=masks[0], additional_mask=masks[1])
        check_masks(inputs, rule, 32**-0.5, (fused, fused))


def test_a_kernel_that_would_hang_is_an_error():
    def wait(barrier):
        machine.Barrier.wait(barrier, 0)

    barrier = machine.Shared.poisoned(machine.tl.int64, [1])
    machine.Barrier.init(barrier, math.inf)
    with pytest.raises(RuntimeError, match="waits for another"):
        machine.warp_specialize([(wait, (barrier,))] * 2, None, None)
