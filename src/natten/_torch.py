"""PyTorch's private names, all of them, and what is done in a release that has one no more.

Each is looked up once, when the package is imported, and named here by the question that it
answers. Where it is gone, the answer is the one that leads to the general path, which is slower and
gives the same numbers, so that no release breaks ``import natten``. What eager calls ask is the
private function itself, because one more Python function would be noticed in small calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def _private(path: str, otherwise: Any) -> Any:
    """What is at ``torch.<path>``, or ``otherwise`` where nothing is."""
    found: Any = torch
    for name in path.split("."):
        if not hasattr(found, name):
            return otherwise
        found = getattr(found, name)
    return found


# --- what watches or changes an eager call ------------------------------------------------------

#: Whether a transform of ``torch.func`` is active; where nobody can say, one may be.
is_transformed: Callable[[], bool] = _private("_C._are_functorch_transforms_active", lambda: True)

#: How many dispatch modes are active, as those that trace or count; one, where nobody can say.
dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", lambda: 1)

#: The same of modes that see calls before autograd does, as those of ``torch.export``.
pre_dispatch_modes: Callable[[], int] = _private(
    "_ops._len_torch_dispatch_stack_pre_dispatch", lambda: 1
)

#: What ``torch.jit``'s tracer records calls in, None if it does not record; otherwise whether.
is_jit_tracing: Callable[[], Any] = _private("_C._get_tracing_state", torch.jit.is_tracing)

#: Whether autocast may be on for any kind of device; of MPS some releases do not say so.
may_autocast: Callable[[], bool] = (
    _private("_C._is_any_autocast_enabled", lambda: True)
    if not torch.backends.mps.is_built()
    else lambda: True
)


def _has_proxy_mode() -> bool:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return mode is not None


#: Whether calls are written into a graph, as by ``make_fx``; otherwise whether any mode is active.
is_recorded: Callable[[], bool] = (
    _has_proxy_mode
    if _private("_C._get_dispatch_mode", None)
    and _private("_C._TorchDispatchModeKey.PROXY", None) is not None
    else lambda: bool(dispatch_modes())
)

_FakeTensor = _private("_subclasses.FakeTensor", None)


def has_fake(tensors: Iterable[Any]) -> bool:
    """Whether any tensor has a shape and no data; otherwise whether any is of a subclass."""
    if _FakeTensor is not None:
        return any(isinstance(x, _FakeTensor) for x in tensors)
    return any(isinstance(x, Tensor) and type(x) not in PLAIN_TYPES for x in tensors)


PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


# --- derivatives --------------------------------------------------------------------------------


def _has_dual_level() -> bool:
    return forward_ad._current_level >= 0


def _refuses_dual_level() -> bool:
    # There is at most one level, and entering another one is an error.
    try:
        with forward_ad.dual_level():
            return False
    except RuntimeError:
        return True


#: Whether tensors may carry tangents.
in_forward_mode: Callable[[], bool] = (
    _has_dual_level if hasattr(forward_ad, "_current_level") else _refuses_dual_level
)

_transforms = _private("_functorch.eager_transforms", None)


def _has_nested_jvp() -> bool:
    return _transforms.JVP_NESTING > 1


#: Whether a ``jvp`` is inside of another one; otherwise whether there is any transform, because
#: one ``jvp`` or ``dual_level`` alone is right and a second one would be silently wrong.
in_nested_forward_mode: Callable[[], bool] = (
    _has_nested_jvp if hasattr(_transforms, "JVP_NESTING") else is_transformed
)


def _has_no_storage(x: Tensor) -> bool:
    try:
        x.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return True
    return False


#: Whether a tensor is a batch of the older vmap (``is_grads_batched``); those have no storage.
is_legacy_batch: Callable[[Tensor], bool] = _private(
    "_C._functorch.is_legacy_batchedtensor", _has_no_storage
)


_unwrap_if_dead = _private("_C._functorch.unwrap_if_dead", None)


def plain_apply(function: Any) -> Callable[..., Any]:
    """``function.apply`` of an ``autograd.Function`` for calls that no transform watches.

    ``Function.apply`` asks for transforms, though who calls knows the answer, which takes as long
    as the rest of it. What is left to do here is to unwrap tensors that were kept from a transform
    that is over.
    """
    if _unwrap_if_dead is None:
        return function.apply
    apply = super(torch.autograd.Function, function).apply

    def applied(*args: Any) -> Any:
        return apply(*[_unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args])

    return applied


# --- checks, compilation, operators -------------------------------------------------------------


def _assert_now(condition: Tensor) -> None:
    if not condition:
        raise RuntimeError("the lengths of packed sequences do not add up")


#: Fail, at the next synchronisation, unless a tensor is true; otherwise wait for the tensor.
assert_later: Callable[[Tensor], None] = _private("_assert_async", _assert_now)


def run_while_compiling(function: Function) -> Function:
    """Have ``torch.compile`` run a function of constants instead of tracing it.

    It is what ``torch.compiler.assume_constant_result`` does, which would import the compiler. A
    release that does not know the mark breaks the graph where the function is called.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _overload(name: str) -> Any:
    try:
        return getattr(torch.ops.aten, name).default
    except AttributeError:
        return None


#: Attention on CPUs with the LSE, and its gradient; None where the backend ``sdpa`` can not run on
#: them. They are overloads, because looking one up takes as long as half a call.
cpu_attention = _overload("_scaled_dot_product_flash_attention_for_cpu")
cpu_attention_backward = _overload("_scaled_dot_product_flash_attention_for_cpu_backward")

#: By PyTorch's number of a kernel: attention on GPUs with the LSE.
FLASH, EFFICIENT, CUDNN = 1, 2, 3
gpu_attention = {
    number: _overload(f"_scaled_dot_product_{name}_attention")
    for number, name in ((FLASH, "flash"), (EFFICIENT, "efficient"), (CUDNN, "cudnn"))
}

#: Which of these numbers PyTorch would take; and the gradient of the second kernel, which has an
#: argument for how many splits of the keys there are.
attention_choice, efficient_attention_backward = map(
    _overload, ("_fused_sdp_choice", "_efficient_attention_backward")
)


def allows_tf32() -> bool:
    """Whether float32 products may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # 2.9's, which also knows what allow_tf32 was set to
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


# --- several ranks ------------------------------------------------------------------------------

#: The store through which the default process group was made; where nobody can say, ranks do not
#: compare their calls.
default_store: Callable[[], Any] = _private(
    "distributed.distributed_c10d._get_default_store", lambda: None
)

#: PyTorch's functional collectives, in every release since 2.3.
collectives: Any = torch.ops._c10d_functional

if TYPE_CHECKING:
    from torch._ops import OpOverload
else:  # the type of what ``torch.ops`` holds, for annotations
    OpOverload = type(torch.ops.aten.add.Tensor)
