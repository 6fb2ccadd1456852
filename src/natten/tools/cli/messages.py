"""Errors of the package's functions in the words of the command line.

Functions name their arguments and print tuples; a person at a terminal has typed options.
"""

from __future__ import annotations

import argparse
import re

# Arguments whose option has another name.
OPTIONS = {
    "shape": "input_size",
    "kernel_size": "window_size",
    "is_causal": "causal",
    "batch": "batch_size",
    "head_dim": "dim",
    "value_dim": "dim_value",
    "kv_heads": "heads_kv",
    "num_additional": "add_kv",
    "path": "output",
}
# What a call would do, or what tensors are to a function; the first ones go first.
PHRASES = (
    ("natten.fit_window makes a window fit, ", ""),
    ("`key` must have the token layout of `query`", "`shape` and `query_shape` must be the same"),
    ("`query` must have `queries_per_key` times the token layout of `key`",
     "`query_shape` must be `queries_per_key` times `shape`"),
    ("plus the token layout of `query`", "plus `query_shape`"),
    ("times that of `key`", "times `shape`"),
    ("for the token layout", "for shape"),
    ("on an axis that `is_causal`", "on an axis that is causal"),
)  # fmt: skip
_VALUE = r"(?:\d+|True|False|'\w+')"
_TUPLE = rf"(?:\((?:{_VALUE},|{_VALUE}(?:, {_VALUE})+)\)|\[{_VALUE}(?:, {_VALUE})*\])"


def in_options(message: str, args: argparse.Namespace) -> str:
    """A message that names options where it named arguments, with values as they are typed.

    Args:
        message: of an :class:`natten.errors.ArgumentError`.
        args: what was parsed; its names are those of the options.
    """
    for phrase, ours in PHRASES:
        message = message.replace(phrase, ours)

    def option(name: str) -> str | None:
        name = OPTIONS.get(name, name)
        return f"--{name.replace('_', '-')}" if hasattr(args, name) else None

    def named(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        found = option(name)
        return match[0] if found is None else f"`{found}{f' {value}' if value else ''}`"

    def given(match: re.Match[str]) -> str:
        return f"{option(match[1]) or match[1]} "

    message = re.sub(r'`(?P<name>\w+)(?:="(?P<value>\w+)")?`', named, message)
    message = re.sub(rf"\b(\w+) (?={_TUPLE})", given, message)
    return re.sub(_TUPLE, lambda match: _typed(match[0]), message)


def _typed(values: str) -> str:
    """``56x56`` for ``(56, 56)``, and words with commas."""
    entries = [each.strip("' ").lower() for each in values.strip("()[]").split(",") if each.strip()]
    return ("x" if entries[0].isdigit() else ",").join(entries)
