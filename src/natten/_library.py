"""The operators' library, and the name under which PyTorch knows it.

``natten::attention`` is what saved graphs of the installed package hold. A copy of the package
under another module name has operators of its own, under a name that follows from that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch


def namespace(package: str) -> str:
    """A package's import name as what a library may be called: ``a.natten`` is ``a_natten``."""
    name = re.sub(r"\W", "_", package, flags=re.ASCII)
    return name if name[0].isalpha() else f"natten_{name}"  # some loaders name a copy by a hash


NAMESPACE = namespace(__package__)
ops: Any = getattr(torch.ops, NAMESPACE)
_library = torch.library.Library(NAMESPACE, "DEF")
define = _library.define


def implement(name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Let the operator ``name`` run ``real``, and ``fake`` where tensors have no data."""
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def differentiate(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give the operator ``name`` a gradient, as ``torch.library.register_autograd`` describes."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_library
    )
