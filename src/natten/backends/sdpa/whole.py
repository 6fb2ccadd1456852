"""Plain attention by PyTorch's kernels for GPUs: every query attends every key, or causally.

PyTorch says which of its kernels it would take. They differ in what is done around them here:

* Flash attention and cuDNN's share key heads among query heads; for the memory-efficient kernel,
  key heads are repeated.
* The gradients of flash attention and cuDNN's differ from run to run, unless a switch of the whole
  process is set, which is not ours to set. That of the memory-efficient kernel has the same bits
  on every run if it does not split the keys, so it is the only one that is used.
* It has no gradient of the LSE. More channels add it to what the kernel subtracts from the
  gradient of the weights, as on CPUs (:mod:`natten.backends.sdpa`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tuning
from ..._torch import (
    CUDNN,
    EFFICIENT,
    FLASH,
    allows_tf32,
    attention_choice,
    efficient_attention_backward,
    gpu_attention,
)
from ...inputs import Gradients, Inputs
from ...neighborhood import Neighborhood, Rule, as_dense
from ..interface import Problem, Shape
from .fused import heads_last, nothing_attended

UNIT = 8  # divides the channels of every kernel
_LSE_UNIT = 32  # tokens; the memory-efficient kernel reads the LSE in such pieces
_MOST = 2**16 - 1  # batch entries, and heads, that a grid can have
# Major compute capabilities with asynchronous products, which flash attention does not know.
_NEWER_PRODUCTS = 9, 10


@tuning.cached
def find(
    rule: Rule, device: torch.device, dtype: torch.dtype, shape: Shape, key_shape: Shape,
    value_dim: int,
) -> tuple[int, bool]:  # fmt: skip
    """The number of PyTorch's kernel for a problem, and whether it is causal; 0 if there is none.

    Args:
        rule: who attends whom.
        device, dtype: of the tensors.
        shape: of the query, ``[batch, *space, heads, head_dim]``.
        key_shape: token layout of the keys.
        value_dim: channels of the values.
    """
    batch, *space, heads, dim = shape
    dense = as_dense(rule, space, key_shape)
    if dense is None or max(batch, heads) > _MOST or dim % UNIT or value_dim % UNIT:
        return 0, False
    assert attention_choice is not None
    tokens, key_tokens = math.prod(space), math.prod(key_shape)
    with torch.cuda.device(device):
        # Shapes and strides are looked at, and no numbers, so that one token stands for all.
        token = torch.empty(max(dim, value_dim), dtype=dtype, device=device)
        query, key, value = (
            token[:width].expand(batch, heads, count, width)
            for count, width in ((tokens, dim), (key_tokens, dim), (key_tokens, value_dim))
        )
        number = attention_choice(query, key, value, is_causal=dense.causal)
    return (number if gpu_attention.get(number) else 0), dense.causal


def missing(problem: Problem) -> str | None:
    """What PyTorch lacks here for a problem, None if nothing."""
    if not torch.cuda.is_available():
        return "needs a GPU that PyTorch can use"
    if problem.operation == "gradient" and torch.version.hip is not None:
        return "has no gradient with the same bits on every run on AMD's GPUs"
    if attention_choice is None or (_is_whole(problem) and not _number(problem)):
        return "finds no kernel for this in PyTorch"
    return None


def limits(problem: Problem) -> str | None:
    """A reason why no kernel of PyTorch's for GPUs is one for a problem, or None."""
    rule = problem.rule
    if problem.dtype == torch.float64:
        return "has no kernels for torch.float64 on GPUs"
    if not 1e-20 < problem.scale < 1e6:
        return "needs a positive scale of usual size on GPUs"
    if problem.additional:
        return "has no additional tokens on GPUs"
    if isinstance(rule, Neighborhood) and rule.query_offset is not None:
        return "has no queries that are a part of the layout on GPUs"
    if rule is not None and problem.shape and not _is_whole(problem):
        return "has no windows on GPUs but those of the whole layout"
    if problem.operation == "gradient" and problem.dtype != torch.float32:
        return "has no gradient of half precision with the same bits on every run on GPUs"
    return None


def slower(problem: Problem) -> str | None:
    """Why a problem is left to the portable kernels, or None (``benchmarks/results/h200.md``)."""
    number, device = _number(problem), problem.device
    if number == FLASH and torch.version.hip is None and _capability(device)[0] in _NEWER_PRODUCTS:
        return "has flash attention with the products of older GPUs, where triton has newer ones"
    if number != EFFICIENT:
        return None
    if problem.dtype != torch.float32:
        return "has the memory-efficient kernel for this, which takes longer than triton's"
    if allows_tf32():
        return "does not round to TF32, which is allowed, and with which triton takes less time"
    matrices = problem.shape[0] * problem.shape[-2]
    if problem.operation == "gradient" and 3 * matrices < _multiprocessors(device):
        return "has a program for each head's gradients, and leaves most of the GPU idle here"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_whole(problem: Problem) -> bool:
    if problem.rule is None or not problem.shape or 0 in (*problem.shape, problem.value_dim):
        return False
    space = problem.shape[1:-2]
    return as_dense(problem.rule, space, problem.key_shape or space) is not None


def _number(problem: Problem) -> int:
    assert problem.rule is not None
    sizes = problem.shape, problem.key_shape or problem.shape[1:-2], problem.value_dim
    return find(problem.rule, problem.device, problem.dtype, *sizes)[0]


def _found(inputs: Inputs, rule: Rule) -> tuple[int, bool]:
    query, key, value, *_ = inputs
    shapes = query.shape, key.shape[1:-2], value.shape[-1]
    return find(rule, query.device, query.dtype, *shapes)


def _tokens(x: Tensor) -> Tensor:
    """``[batch, tokens, heads, channels]`` of ``[batch, *space, heads, channels]``, which kernels
    read in pieces of 16 bytes."""
    x = x.resolve_neg().flatten(1, -3)
    steps = [step for size, step in zip(x.shape[:-1], x.stride()) if size > 1]
    pieces = (x.data_ptr(), *(x.element_size() * step for step in steps))
    if x.stride(-1) == 1 and 0 not in steps and math.gcd(16, *pieces) == 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values of as many heads, those that share one next to each other."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def forward(inputs: Inputs, rule: Rule, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[batch, *space, heads, value dim]`` and LSE ``[batch, *space, heads]``."""
    query, key, value, *_ = inputs
    if query.numel() == 0 or key.numel() == 0:
        return nothing_attended(query, value)
    number, is_causal = _found(inputs, rule)
    q, k, v = map(_tokens, inputs[:3])
    if number == EFFICIENT:
        k, v = (_for_heads(x, q.shape[-2]) for x in (k, v))
    options = {FLASH: (0.0,), EFFICIENT: (None, True, 0.0), CUDNN: (None, True, 0.0)}[number]
    out, exponents, *_ = gpu_attention[number](
        *(x.transpose(1, 2) for x in (q, k, v)), *options, is_causal, scale=scale
    )
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    tokens = q.shape[1]  # the memory-efficient kernel's LSE has more
    lse.flatten(1, -2).copy_(exponents.flatten(2)[..., :tokens].transpose(1, 2))
    return heads_last(out, query, value.shape[-1]), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor, rule: Rule,
    scale: float,
) -> Gradients:  # fmt: skip
    """Gradients of the inputs, in float32."""
    query, key, value, *_ = inputs
    if query.numel() == 0 or key.numel() == 0:
        return Gradients.zeros(inputs)
    _, is_causal = _found(inputs, rule)
    q, k, v, own_grad, own_out = map(_tokens, (query, key, value, grad_out, out))
    if grad_lse is not None:
        v, own_grad, own_out = (F.pad(x, (0, UNIT)) for x in (v, own_grad, own_out))
        own_grad[..., value.shape[-1]] = grad_lse.flatten(1, -2)
        own_out[..., value.shape[-1]] = -1.0
    heads, kv_heads, tokens = q.shape[-2], k.shape[-2], q.shape[1]
    k, v = (_for_heads(x, heads) for x in (k, v))
    exponents = lse.flatten(1, -2).transpose(1, 2)
    exponents = F.pad(exponents, (0, -tokens % _LSE_UNIT), value=math.inf).contiguous()
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # seeds of dropout
    dq, *dkv, _ = efficient_attention_backward(
        own_grad, q, k, v, None, own_out, None, None, tokens, k.shape[1], exponents, 0.0, unused,
        unused, int(is_causal), False, scale=scale, num_splits_key=1,
    )  # fmt: skip
    if heads > kv_heads:
        dkv = [x.unflatten(2, (kv_heads, -1)).sum(3) for x in dkv]
    grads = (dq, dkv[0], dkv[1][..., : value.shape[-1]])
    return Gradients(*(x.contiguous().view(y.shape) for x, y in zip(grads, (query, key, value))))
