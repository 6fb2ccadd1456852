"""What a backend is: a class that says what it can run, and runs it.

A backend derives from :class:`Backend`. Its capabilities are class attributes, so that the choice
of a backend, :func:`natten.backends.explain` and the table of the documentation can read them.
Methods of operations that it does not list are never called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..documents import Documents, roomy_layout
from ..inputs import Gradients, Inputs
from ..neighborhood import Neighborhood, Rule

# What the operations of a problem are called.
OPERATIONS = {
    "attention": "fused forward",
    "gradient": "fused backward",
    "packed": "packed documents in one launch",
    "unfused": "unfused operators",
}

Shape = tuple[int, ...]


class Problem(NamedTuple):
    """What decides which backend runs.

    Attributes:
        operation: "attention", its "gradient", "packed" documents, or "unfused": qk, av,
            av_transposed and the bias.
        device, dtype: of the tensors.
        head_dim, value_dim: channels of a head.
        shape: of the query, heads-last; of attention and its gradient only, as what follows.
        rule: the neighborhood, None where only tensors are asked about.
        scale: factor on the scores.
        bias: whether there is a relative positional bias.
        key_shape: token layout of the keys.
        additional: whether there are additional keys.
        masked: whether there is a mask of keys.
        kv_heads: heads of keys and values, 0 for as many as the query has.
    """

    operation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0
    value_dim: int = 0
    shape: Shape = ()
    rule: Rule | None = None
    scale: float = 1.0
    bias: bool = False
    key_shape: Shape = ()
    additional: bool = False
    masked: bool = False
    kv_heads: int = 0

    @property
    def has_rings(self) -> bool:
        """Whether windows go on at the other end of an axis."""
        return isinstance(self.rule, Neighborhood) and "circular" in self.rule.boundary

    @classmethod
    def of(
        cls, operation: str, inputs: Inputs, rule: Rule | None = None, scale: float = 1.0
    ) -> Problem:
        """The problem of an operation on these tensors; of a part of a layout, the one that stands
        for all parts of about its size, as :func:`roomy_part` says."""
        query, key, value, rpb, additional_keys, *_ = inputs
        shape: Shape = query.shape
        key_shape: Shape = key.shape[1:-2]
        if isinstance(rule, Neighborhood) and rule.query_offset is not None:
            rule, space, key_shape = roomy_part(rule, shape[1:-2], key_shape)
            shape = (shape[0], *space, *shape[-2:])
        return cls(
            operation, query.device, query.dtype, query.shape[-1], value.shape[-1], shape, rule,
            scale, rpb is not None, key_shape, additional_keys is not None, inputs.is_masked,
            key.shape[-2],
        )  # fmt: skip


def roomy_part(
    rule: Neighborhood, shape: Shape, key_shape: Shape
) -> tuple[Neighborhood, Shape, Shape]:
    """The part that backends are asked about for all parts of a layout that are about as large: the
    first queries, of layouts that are rounded up.

    So a new offset, a longer cache of keys or another part mostly has an answer already, and what
    runs it does not depend on calls before. Limits that count tokens say no to fewer tokens only if
    they say no to more.
    """
    shape, key_shape = roomy_layout(shape), roomy_layout(key_shape)
    lengths = []
    for axis, length in enumerate(key_shape):
        length = max(length, -(-shape[axis] // rule.queries_per_key[axis]))
        if rule.boundary[axis] == "circular":  # a multiple, as it has to be
            unit = rule.stride[axis] * rule.dilation[axis]
            length = -(-length // unit) * unit
        lengths.append(length)
    return replace(rule, query_offset=(0,) * rule.rank), shape, tuple(lengths)


class Tiles(NamedTuple):
    """How a kernel cuts a problem, and how it runs; shapes have three axes.

    Attributes:
        q_block, kv_block: queries and keys that meet in one step. Of the kernel of dK and dV, the
            keys stay and the blocks of queries pass; of the others, it is the reverse.
        num_warps: warps that compute.
        num_stages: blocks in flight.
        split_axis: the axis along which the tiles of two warpgroups are neighbors.
        resident_programs: programs that share a multiprocessor.
    """

    q_block: Shape
    kv_block: Shape
    num_warps: int
    num_stages: int
    split_axis: int = 0
    resident_programs: int = 1


# Kinds of kernels, by what they give: output and LSE, dQ, dK and dV.
KINDS = ("forward", "dq", "dkdv")


class TileChooser(Protocol):
    """How a backend with tiles chooses them; a module may be one.

    The arguments of a problem are the kind of kernel, the rule, the token layouts of queries and of
    keys, the channels of a head and of its values, and the bytes of a number.
    """

    def key(
        self, kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, dim: int,
        value_dim: int, itemsize: int,
    ) -> str:  # fmt: skip
        """The name of a problem in :mod:`natten.tuning`."""

    def candidates(
        self, kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, dim: int,
        value_dim: int, itemsize: int,
    ) -> Sequence[Tiles]:  # fmt: skip
        """Tiles that the kernel can run: the usual ones, then the others by estimate."""

    def choose(
        self, kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, dim: int,
        value_dim: int, itemsize: int,
    ) -> Tiles:  # fmt: skip
        """The tiles that were measured to be fastest, else the first candidate."""

    def computed_pairs(
        self, kind: str, rule: Neighborhood, shape: Shape, key_shape: Shape, tiles: Tiles
    ) -> int:
        """Query-key pairs that the kernel computes per batch entry and head."""


class Backend:
    """Base class of the backends.

    Attributes:
        name: what users call it.
        devices: where it runs, for people.
        operations: keys of ``OPERATIONS``.
        dtypes: None for every floating-point dtype.
        head_dims, value_dims: None for all.
        bias: whether fused operators take a relative positional bias.
        masks: whether fused operators take masks of keys.
        circular: whether windows may go on at the other end of an axis. Where :meth:`pads` says
            so, keys and values are padded around (:mod:`natten.backends.rings`).
        takes_tiles: whether fused operators take tile shapes.
        compiles: whether it launches kernels that are compiled when they first run.
    """

    name: str
    devices: str
    operations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: range | None = None
    value_dims: range | None = None
    bias: bool = True
    masks: bool = False
    circular: bool = False
    takes_tiles: bool = False
    compiles: bool = False

    # --- what it can run ---

    def missing(self, problem: Problem) -> str | None:
        """What a problem's device or this machine lacks, None if nothing."""
        return None

    def limits(self, problem: Problem) -> str | None:
        """A further reason why it can not run a problem, on any machine, or None."""
        return None

    def slower(self, problem: Problem) -> str | None:
        """Why a problem that it can run is left to the next backend, or None.

        A backend that is asked for by name runs all the same.
        """
        return None

    def lacks(self, problem: Problem) -> str | None:
        """Why it can not run a problem, on any machine, or None."""
        dtype, fused = problem.dtype, problem.operation != "unfused"
        if problem.operation not in self.operations:
            return f"has no {OPERATIONS[problem.operation]}"
        if not dtype.is_floating_point:
            return f"needs a floating-point dtype, not {dtype}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"has no kernels for {dtype}"
        for name, dims, dim in (
            ("head_dim", self.head_dims, problem.head_dim),
            ("value head_dim", self.value_dims, problem.value_dim),
        ):
            if fused and dims is not None and dim not in dims:
                return f"has kernels for {name} {describe(dims)}"
        if problem.bias and not self.bias:
            return "has no relative positional bias"
        if problem.masked and not self.masks:
            return "has no masks of keys"
        if problem.operation == "packed" and problem.has_rings and not self.circular:
            return "has no circular axes of packed documents"
        return self.limits(self._own(problem))

    def unsupported(self, problem: Problem) -> str | None:
        """Why it can not run a problem here, or None."""
        missing = self.missing(problem)
        return self.lacks(problem) if missing is None else missing

    def declined(self, problem: Problem) -> str | None:
        """Why it does not run a problem unless it is asked for by name, or None."""
        reason = self.unsupported(problem)
        return self.slower(self._own(problem)) if reason is None else reason

    def pads(self, problem: Problem) -> bool:
        """Whether it runs a problem's circular axes with keys and values that are padded around;
        by default, unless it is ``circular``."""
        return problem.has_rings and not self.circular

    def _own(self, problem: Problem) -> Problem:
        """The problem that it runs: without circular axes, if it pads."""
        rule = problem.rule
        if not isinstance(rule, Neighborhood) or not problem.key_shape or not self.pads(problem):
            return problem
        rule, margins = rule.unrolled()
        return problem._replace(rule=rule, key_shape=padded_shape(problem.key_shape, margins))

    # --- fused attention ---

    def forward(
        self, inputs: Inputs, rule: Rule, scale: float, tiles: Shape = ()
    ) -> tuple[Tensor, Tensor]:
        """Output ``[batch, *space, heads, value_dim]`` and LSE ``[batch, *space, heads]``.

        Args:
            inputs: the tensors, with any strides.
            rule: who attends whom.
            scale: factor on the scores.
            tiles: sizes along every axis, of tiles of queries and of keys in the forward pass, and
                of both in the backward pass; 0 leaves the choice. () unless ``takes_tiles``.
        """
        raise NotImplementedError

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        rule: Rule, scale: float, tiles: Shape = (),
    ) -> Gradients:  # fmt: skip
        """Gradients of the inputs from those of the output and, if it has one, of the LSE."""
        raise NotImplementedError

    def packed_forward(
        self, inputs: Inputs, documents: Documents, rule: Rule, scale: float
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward` inside each document; the batch is 1, space are all tokens."""
        raise NotImplementedError

    def packed_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor,
        documents: Documents, rule: Rule, scale: float,
    ) -> Gradients:  # fmt: skip
        """As :meth:`backward` inside each document."""
        raise NotImplementedError

    # --- unfused attention: maps that are linear in each tensor. Tensors are heads-last,
    # [batch, *space, heads, channels], and weights [batch, *space, heads, window tokens]. ---

    def qk(self, query: Tensor, key: Tensor, rule: Neighborhood) -> Tensor:
        """Products of every query with its window's keys; 0 in masked slots."""
        raise NotImplementedError

    def av(self, attn: Tensor, value: Tensor, rule: Neighborhood) -> Tensor:
        """Sum of the window's values, weighted; masked slots are ignored."""
        raise NotImplementedError

    def av_transposed(
        self, attn: Tensor, x: Tensor, key_shape: Shape, rule: Neighborhood
    ) -> Tensor:
        """For every key, the sum of ``x`` at the queries that attend it, weighted."""
        raise NotImplementedError

    def rpb_bias(self, rpb: Tensor, shape: Shape, key_shape: Shape, rule: Neighborhood) -> Tensor:
        """``rpb`` in every window slot, ``[*space, heads, window tokens]``; 0 in masked slots."""
        raise NotImplementedError

    def rpb_bias_transposed(self, grad: Tensor, key_shape: Shape, rule: Neighborhood) -> Tensor:
        """The gradient of ``rpb`` from ``grad [*space, heads, window tokens]``."""
        raise NotImplementedError

    # --- tiles ---

    def tile_chooser(self) -> TileChooser | None:
        """How its kernels' tiles are chosen, None if it has none to choose.

        Raises:
            ModuleNotFoundError: a package that the backend needs is not installed.
        """
        return None

    def computed_pairs(
        self, rule: Neighborhood, shape: Shape, key_shape: Shape, matrices: int, dim: int
    ) -> int | None:
        """Query-key pairs that the forward pass computes per batch entry and head.

        Args:
            rule, shape, key_shape: the neighborhood, the token layouts of queries and keys.
            matrices: batch entries times heads.
            dim: channels of a head, the mean of keys and values.

        Returns:
            The number; None where it depends on tiles, which :meth:`tile_chooser` knows.
        """
        return None


def padded_shape(shape: Shape, margins: Sequence[tuple[int, int]]) -> Shape:
    """A token layout with margins before and after each axis."""
    return tuple(before + length + after for length, (before, after) in zip(shape, margins))


def describe(dims: range | None) -> str:
    """Head dims for people."""
    if dims is None:
        return "any"
    return f"{dims[0]} to {dims[-1]}" + (f", multiples of {dims.step}" if dims.step > 1 else "")
