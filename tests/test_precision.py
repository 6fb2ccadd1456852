"""Gradients in half precision where values are alike, compared with PyTorch's attention."""

import pytest
import torch
from helpers import masked_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import natten

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
SPACE, WINDOW = {1: (256,), 2: (16, 16), 3: (8, 4, 8)}, {1: 63, 2: 9, 3: (5, 4, 5)}


def leaves(rank, dtype, mean, device):
    """Query, key, values with a common mean, and the gradient of the output."""
    shapes = [(2, *SPACE[rank], 2, 64)] * 4
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    tensors[2] += mean
    return [x.to(dtype) for x in tensors]


def grads_of(function, q, k, v, grad):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(function(*inputs), inputs, grad)


def errors(rank, dtype, mean, window, backend, yardstick, device):
    """Relative RMS errors of dQ, dK and dV, for ours and for PyTorch's ``yardstick``."""
    q, k, v, grad = leaves(rank, dtype, mean, device)
    wide = [x.cpu().double() for x in (q, k, v, grad)]
    rule = natten.Neighborhood.create(rank, window)
    mask = natten.neighborhood.window_mask(rule, SPACE[rank], SPACE[rank], device)

    def ours(q, k, v, backend=backend):
        return natten.neighborhood_attention_generic(q, k, v, window, backend=backend)

    def theirs(q, k, v):
        flat = [x.flatten(1, -3) for x in (q, k, v)]
        some = None if mask.all() else mask
        with sdpa_kernel(yardstick):
            return masked_attention(*flat, some, 64**-0.5).view_as(q)

    exact = grads_of(lambda *qkv: ours(*qkv, backend="reference"), *wide)

    def error(found):
        return [
            ((a - b.cpu().double()).square().mean() / a.square().mean()).sqrt().item()
            for a, b in zip(exact, found)
        ]

    return error(grads_of(ours, q, k, v, grad)), error(grads_of(theirs, q, k, v, grad))


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("backend", ["tiled", "reference", None])
def test_as_exact_as_pytorchs_math(backend, rank, dtype, mean):
    ours, theirs = errors(rank, dtype, mean, WINDOW[rank], backend, SDPBackend.MATH, "cpu")
    assert all(a <= 2 * b for a, b in zip(ours, theirs)), (ours, theirs)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_as_exact_as_cudnn(backend, rank, dtype, mean):
    """cuDNN has no windows, so both attend the whole layout."""
    ours, theirs = errors(
        rank, dtype, mean, SPACE[rank], backend, SDPBackend.CUDNN_ATTENTION, "cuda"
    )
    assert all(a <= 1.1 * b for a, b in zip(ours, theirs)), (ours, theirs)
