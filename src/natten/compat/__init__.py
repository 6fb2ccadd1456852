"""Stand-ins for ``import natten`` of an older era, where eras contradict each other.

    import natten.compat.v017 as natten

``v014`` is 0.14.1 to 0.14.4, ``v015`` 0.14.5 to 0.15.1, ``v017`` 0.17.0 to 0.17.5. They differ from
the top level in the order of positional arguments and in defaults; everything else is the same
objects.
"""

from __future__ import annotations

import sys
from types import ModuleType

from natten.modules import NeighborhoodAttentionGeneric


def add_submodules(package: str, **modules: ModuleType) -> None:
    """Let ``import package.name`` find a module that lives elsewhere."""
    for name, module in modules.items():
        sys.modules[f"{package}.{name}"] = module


class OneWindow(NeighborhoodAttentionGeneric):
    """0.14's and 0.15's modules: one window for all axes, told by integers."""

    @property
    def kernel_size(self) -> int:  # type: ignore[override]
        """Window of the last axis; all are alike, but for 3-D modules' first."""
        return self.neighborhood.kernel_size[-1]

    @property
    def dilation(self) -> int:  # type: ignore[override]
        """Dilation of the last axis."""
        return self.neighborhood.dilation[-1]

    @property
    def window_size(self) -> int:
        """What an axis must hold; smaller inputs are padded."""
        return self.kernel_size * self.dilation
