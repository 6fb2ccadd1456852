"""One attention problem: its tensors, and the least work that it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...errors import ArgumentError
from ...neighborhood import Neighborhood
from ...tiling import axis_pairs
from ..layouts import by, query_layout, words

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """A call of ``na1d``, ``na2d`` or ``na3d``.

    Attributes:
        shape: token layout of the keys.
        rule: which keys a query attends.
        batch, heads, kv_heads, dim, value_dim: sizes of ``[batch, *shape, heads, dim]``; ``heads``
            is a multiple of ``kv_heads``.
        num_additional: how many additional keys and values there are.
        dtype, device: those of all tensors.
        query_shape: token layout of the queries; None means all from the rule's ``query_offset``
            on. ``queries`` is the layout in either case.

    Example:
        >>> rule = Neighborhood.create(2, kernel_size=3)
        >>> problem = Problem((8, 8), rule, dim=16, value_dim=16)
        >>> problem.needed_pairs, problem.flops(), problem.bytes()
        (576, 36864, 16384)
    """

    shape: tuple[int, ...]
    rule: Neighborhood
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dim: int = 64
    value_dim: int = 64
    num_additional: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    query_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        query_layout(self.rule, self.shape, self.query_shape)
        for name, least in (
            ("batch", 1), ("heads", 1), ("kv_heads", 1), ("dim", 1), ("value_dim", 1),
            ("num_additional", 0),
        ):  # fmt: skip
            size = getattr(self, name)
            if type(size) is not int or size < least:
                raise ArgumentError(
                    f"`{name}` must be an integer of at least {least}, got {size!r}."
                )
        if self.heads % self.kv_heads != 0:
            raise ArgumentError(
                f"`heads` must be a multiple of `kv_heads`, got {self.heads} and {self.kv_heads}."
            )

    @cached_property
    def queries(self) -> tuple[int, ...]:
        """Token layout of the queries."""
        return query_layout(self.rule, self.shape, self.query_shape)

    @property
    def num_queries(self) -> int:
        """Queries of one batch entry."""
        return math.prod(self.queries)

    @property
    def num_keys(self) -> int:
        """Keys of one batch entry, without additional ones."""
        return math.prod(self.shape)

    @property
    def all_pairs(self) -> int:
        """Query-key pairs of dense attention, per batch entry and head."""
        return self.num_queries * (self.num_keys + self.num_additional)

    @cached_property
    def window_pairs(self) -> int:
        """Pairs of a query and a key of its window, per batch entry and head."""
        axes = enumerate(zip(self.queries, self.shape))
        return math.prod(axis_pairs(self.rule, axis, *lengths) for axis, lengths in axes)

    @property
    def needed_pairs(self) -> int:
        """Query-key pairs that attend each other, per batch entry and head."""
        return self.window_pairs + self.num_queries * self.num_additional

    def question(self, operation: str) -> backends.Problem:
        """The problem by which :mod:`natten.backends` chooses for "attention" or its "gradient"."""
        return backends.Problem(
            operation, self.device, self.dtype, self.dim, self.value_dim,
            (self.batch, *self.queries, self.heads, self.dim),
            self.rule.without_full_rings(self.shape), self.dim**-0.5,
            key_shape=self.shape, additional=self.num_additional > 0, kv_heads=self.kv_heads,
        )  # fmt: skip

    @property
    def is_self_attention(self) -> bool:
        """Whether every query attends every key."""
        return self.needed_pairs == self.all_pairs

    def flops(self, pairs: int | None = None, backward: bool = False) -> int:
        """Operations of the matrix products, 2 per multiply-add.

        Args:
            pairs: query-key pairs per batch entry and head; None means the needed ones.
            backward: add the backward pass, which computes the scores again and four gradients.
        """
        pairs = self.needed_pairs if pairs is None else pairs
        per_pair = self.dim + self.value_dim
        if backward:
            per_pair += 3 * self.dim + 2 * self.value_dim
        return 2 * self.batch * self.heads * pairs * per_pair

    def bytes(self, backward: bool = False) -> int:
        """Bytes of inputs and output, each moved once.

        Args:
            backward: add the backward pass, which reads all again and writes the gradients.
        """
        channels = self.dim + self.value_dim
        queries = self.num_queries * self.heads * channels  # and outputs
        keys = (self.num_keys + self.num_additional) * self.kv_heads * channels  # and values
        passes = 3 if backward else 1  # the backward reads everything again and writes gradients
        return passes * self.batch * (queries + keys) * self.dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """The problem for JSON."""
        rule = self.rule
        return {
            "shape": self.shape,
            "kernel_size": rule.kernel_size,
            "stride": rule.stride,
            "dilation": rule.dilation,
            "is_causal": rule.is_causal,
            "boundary": rule.boundary,
            "queries_per_key": rule.queries_per_key,
            "query_offset": rule.query_offset,
            "query_shape": self.queries,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "dim": self.dim,
            "value_dim": self.value_dim,
            "num_additional": self.num_additional,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def inputs(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Random arguments of :func:`natten.neighborhood_attention_generic`, heads-last.

        Args:
            requires_grad: whether they require a gradient.
        """
        sizes = {
            "query": (*self.queries, self.heads, self.dim),
            "key": (*self.shape, self.kv_heads, self.dim),
            "value": (*self.shape, self.kv_heads, self.value_dim),
        }
        if self.num_additional:
            sizes["additional_keys"] = (self.num_additional, self.kv_heads, self.dim)
            sizes["additional_values"] = (self.num_additional, self.kv_heads, self.value_dim)
        return {
            name: torch.randn(
                self.batch, *size, device=self.device, dtype=self.dtype, requires_grad=requires_grad
            )
            for name, size in sizes.items()
        }

    def dense_inputs(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Random arguments of ``scaled_dot_product_attention`` over all tokens, heads-first.

        Args:
            requires_grad: whether they require a gradient.
        """
        keys = self.num_keys + self.num_additional
        sizes = {
            "query": (self.heads, self.num_queries, self.dim),
            "key": (self.kv_heads, keys, self.dim),
            "value": (self.kv_heads, keys, self.value_dim),
        }
        return {
            name: torch.randn(
                self.batch, *size, device=self.device, dtype=self.dtype, requires_grad=requires_grad
            )
            for name, size in sizes.items()
        }

    def __str__(self) -> str:
        rule = self.rule
        parts = [
            f"{len(self.shape)}-D {by(self.shape)}",
            f"window {by(rule.kernel_size)}",
            f"stride {by(rule.stride)}" if max(rule.stride) > 1 else "",
            f"dilation {by(rule.dilation)}" if max(rule.dilation) > 1 else "",
            f"causal {by([int(c) for c in rule.is_causal])}" if any(rule.is_causal) else "",
            *words(rule, self.queries),
            f"batch {self.batch}",
            f"heads {self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else ""),
            f"dim {self.dim}" + (f"/{self.value_dim}" if self.value_dim != self.dim else ""),
            f"{self.num_additional} additional tokens" if self.num_additional else "",
            str(self.dtype).removeprefix("torch."),
        ]
        return ", ".join(part for part in parts if part)
