"""The Hopper kernel of the bias's gradient, beside the reference: its own code, on tensors that are
fetched by a stand-in for TMA."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", "3.6")  # the first with Gluon for Hopper

import gluon
import torch
import triton
import triton.language as tl
from helpers import reference
from hopper_problems import name_of, rule_of
from triton.runtime.interpreter import TensorHandle

from natten.backends.hopper import bias_gradient, costs, products, sets_plan
from natten.backends.hopper import plan as planning
from natten.inputs import Inputs
from natten.tiling import padded

SCALE = 0.5
# shape, window, stride, dilation, causal
SMALL = [
    ((19,), 7, 1, 1, False),
    ((12,), 5, 2, 3, True),
    ((9, 11), (5, 7), 1, 1, False),
    ((4, 6), (2, 3), (1, 2), (2, 1), (False, True)),
    ((3, 4, 5), (2, 3, 3), 1, 1, (True, False, False)),
]


class Tensor:
    """What TMA finds: a tensor ``[batch, *space, heads, channels]``, and its bases."""

    def __init__(self, x: torch.Tensor, dilation: Any) -> None:
        batch, *space, heads, channels = x.shape
        self.x, self.dilation = x.reshape(batch, *padded(space, 1), heads, channels), dilation

    def tma_base(self, batch: Any, group: Any, head: Any, half_aligned: bool = False) -> Any:
        assert not half_aligned
        return batch, group, head

    def store(self, base: Any, place: Any, buffer: Any) -> None:
        """Write a box, as far as it is in the layout."""
        batch, group, head = base
        rows = torch.from_numpy(buffer.value.handle.data).reshape(*buffer.shape, -1)
        for inside in itertools.product(*map(range, buffer.shape)):
            at = [
                (int(p) + i) * d + int(g) for p, i, d, g in zip(place, inside, self.dilation, group)
            ]
            if all(x < n for x, n in zip(at, self.x.shape[1:4])):
                assert self.x[(int(batch), *at, int(head))].isnan().all()  # written once
                self.x[(int(batch), *at, int(head))] = rows[inside]

    @property
    def descriptor(self) -> Any:
        return SimpleNamespace(dtype=tl.float32)

    def box(self, base: Any, place: Any, shape: Any) -> torch.Tensor:
        """``[tokens, channels]`` of a box, zeros beyond the layout."""
        batch, group, head = base
        found, real = self.x[int(batch), ..., int(head), :], torch.tensor(True)
        for axis in range(3):
            token = (int(place[axis]) + torch.arange(shape[axis])) * self.dilation[axis]
            token += int(group[axis])
            own = (token >= 0) & (token < self.x.shape[axis + 1])
            found = found.index_select(axis, token.clamp(0, self.x.shape[axis + 1] - 1))
            real = real[..., None] & own
        return torch.where(real[..., None], found, 0.0).flatten(0, 2)


class Pipeline:
    """Boxes of tensors by stage."""

    def __init__(self, shape: Any) -> None:
        self.shape, self.stages = shape, {}

    def produce(self, stage: Any, tensors: Any, bases: Any, places: Any) -> None:
        (place,) = places
        self.stages[int(stage)] = [
            x.box(base, place, self.shape) for x, base in zip(tensors, bases)
        ]

    def masker_wait(self, stage: Any) -> None:
        assert int(stage) in self.stages

    consumer_wait = masker_wait

    def masker_release(self, stage: Any) -> None:
        pass

    consumer_release = masker_release

    def matrix(self, stage: Any, which: int = 0) -> Any:
        return block(self.stages[int(stage)][which])


def block(x: torch.Tensor) -> Any:
    """A tensor as kernels have it."""
    return tl.tensor(TensorHandle(x.numpy(), tl.float32), tl.block_type(tl.float32, list(x.shape)))


def cleared(tokens: Any, masked: Any, lane: Any) -> None:
    """Set rows to zero that words of 32 say."""
    for row in range(tokens.shape[0]):
        if int(masked[row // 32]) >> row % 32 & 1:
            tokens.handle.data[row] = 0.0


class StageNumbers:
    """Numbers that go with the blocks of a pipeline."""

    def __init__(self, *_: Any) -> None:
        self.stages: dict[int, torch.Tensor] = {}
        self.words: dict[tuple[int, int], Any] = {}

    def produce(self, stage: Any, numbers: Any) -> None:
        self.stages[int(stage)] = torch.from_numpy(numbers.handle.data)

    def lay(self, stage: Any, at: int, number: Any) -> None:
        self.words[int(stage), at] = number

    def consumer_wait(self, stage: Any) -> None:
        assert int(stage) in self.stages

    def load(self, stage: Any, axis: int, at: int, layout: Any) -> Any:
        if self.words:
            return self.words[int(stage), at]
        return block(self.stages[int(stage)].narrow(axis, at, 1).contiguous())


@triton.jit
def gradient_kernel(
    lse_delta, sums, of_offsets, bias_tables, key_mask, TENSORS: tl.constexpr,
    ARGUMENTS: tl.constexpr,
):  # fmt: skip
    """A program of the kernel, whose warps run one after another."""
    constants = (
        "MODES", "TILE", "BLOCK", "STAGES", "FETCH_REGISTERS", "BIAS_STRIDES", "QK_CHUNKS",
        "V_CHUNKS", "HAS_KEY_MASK", "BLOCKS", "BLOCK_STAGES", "HAS_DQ",
    )  # fmt: skip
    numbers = {
        name: tl.full([], x, tl.float32 if isinstance(x, float) else tl.int32)
        for name, x in ARGUMENTS.items()
        if name not in constants
    }
    bias_gradient.bias_gradient_kernel.fn(
        **TENSORS, lse_delta=lse_delta, sums=sums, of_offsets=of_offsets, bias_tables=bias_tables,
        key_mask=key_mask,
        **{**ARGUMENTS, **numbers},
    )  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the kernel's own module calls, in terms of PyTorch."""

    def one_after_another(roles: Any, *_: Any) -> None:
        compute, *fetch = roles
        for role, arguments in [*fetch, compute]:
            role(*arguments)

    def replace(dilation: Any, tile: Any, other: Any) -> None:
        shapes = itertools.cycle((tile, other))  # of a program's two pipelines
        buffers = SimpleNamespace(index=lambda _: SimpleNamespace(shape=tile))
        monkeypatch.setattr(bias_gradient, "TmaTensor", lambda x, *_: Tensor(x, dilation))
        monkeypatch.setattr(bias_gradient, "allocate", lambda *_: buffers)
        monkeypatch.setattr(bias_gradient, "tma_pipeline", lambda *_: Pipeline(next(shapes)))

    monkeypatch.setattr(bias_gradient, "stage_numbers", StageNumbers)
    monkeypatch.setattr(bias_gradient, "clear_rows", cleared)
    monkeypatch.setattr(bias_gradient, "lane_of_warp", lambda number: number)

    def store(acc: Any, buffer: Any, *_: Any) -> None:
        buffer.value = acc[0]

    monkeypatch.setattr(bias_gradient, "barrier", lambda: None)
    monkeypatch.setattr(bias_gradient, "store", store)
    monkeypatch.setattr(bias_gradient, "store_wait", lambda number: None)
    for module in (bias_gradient, products):
        monkeypatch.setattr(
            module, "warpgroup_mma_wait",
            lambda number, deps: deps[0] if len(deps) == 1 else deps,
        )  # fmt: skip
    monkeypatch.setattr(gluon.Language, "warp_specialize", staticmethod(one_after_another), False)
    return replace


@pytest.mark.parametrize("has_dq", [False, True], ids=["alone", "dq"])
@pytest.mark.parametrize("problem", SMALL, ids=name_of)
def test_gradient_of_the_bias(problem: Any, has_dq: bool, stand_ins: Any) -> None:
    shape, *parameters = problem
    dim = 32 if has_dq else 8
    rule, heads = rule_of(shape, *parameters), 2
    torch.manual_seed(0)
    q, grad_out = (torch.randn(2, *shape, heads, dim) for _ in range(2))
    k, v = (torch.randn(2, *shape, 1, dim) for _ in range(2))
    rpb = torch.randn(heads, *(2 * n - 1 for n in rule.kernel_size))
    key_mask = None
    if rule.rank == 2:
        key_mask = torch.rand(2, *shape) < 0.6
        key_mask[1, : shape[0] // 2] = False  # some queries attend nothing
        k[~key_mask], v[~key_mask] = math.nan, math.inf
    exact = Inputs(q.double(), k.double(), v.double(), rpb.double(), key_mask=key_mask)
    out, lse = reference.forward(exact, rule, SCALE)
    grads = reference.backward(grad_out.double(), None, exact, out, lse, rule, SCALE)
    delta = (out * grad_out).sum(-1)
    exponent = torch.where(lse == -math.inf, math.inf, lse / math.log(2))
    lse_delta = torch.stack([exponent, delta, delta * 0, delta * 0], -1).float()

    half = (x.to(torch.bfloat16) for x in (q, k, v))
    masks = key_mask, None
    found = planning.plan_for(*half, None, rule, SCALE, rpb.dtype, None, masks)
    gradient = found.dq_and_bias if has_dq else found.bias_gradient
    assert gradient is not None
    biased = gradient.launch
    arguments = biased.arguments
    stand_ins(padded(rule.dilation, 1), arguments["TILE"], arguments["BLOCK"])
    tables = biased.room(rpb)
    biased.fill(tables, rpb)
    sums = torch.full(gradient.shape, math.nan)
    of_offsets = torch.full(gradient.offsets_shape, math.nan)
    dq = torch.full_like(q, math.nan)
    tensors = {"query": q, "key": k, "value": v, "grad_out": grad_out, "grad_query": dq}
    gradient_kernel[biased.grid](
        lse_delta, sums, of_offsets, tables, key_mask, tensors, arguments
    )  # fmt: skip
    grad = torch.full_like(rpb, math.nan)
    gradient.add_up.run(of_offsets=of_offsets, grad_rpb=grad)
    assert grads.rpb is not None
    torch.testing.assert_close(grad.double(), grads.rpb, rtol=1e-4, atol=1e-4)
    if has_dq:
        torch.testing.assert_close(dq.double(), grads.query, rtol=1e-4, atol=1e-4)


def test_sums_that_take_too_much_memory_are_left_to_the_portable_kernels() -> None:
    cut = sets_plan.cut(rule_of((64, 64), 41, 1, 1, False), (64, 64), (costs.ROWS,))
    blocks = math.prod(cut.blocks)
    assert sets_plan.splits_of(cut, 1, 2, 396) >= 1
    assert sets_plan.splits_of(cut, 1, 2**14 // blocks + 1, 396) == 0
