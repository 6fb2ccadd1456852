"""Neighborhood attention: sliding-window self attention over 1-D, 2-D and 3-D token layouts."""

import sys as _sys
import typing as _typing

from . import _dtensors, _logging, _submodules, compat, flops, functional, legacy
from .ahead import compile_ahead
from .errors import ArgumentError
from .functional import (
    attention,
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na1d_varlen,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_varlen,
    na3d,
    na3d_av,
    na3d_qk,
    na3d_varlen,
    neighborhood_attention_generic,
)
from .legacy import imports as _imports
from .modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from .neighborhood import Neighborhood, fit_window
from .varlen import VarlenLayout
from .version import __version__


def _run_dtensors() -> object:
    from .distributed import dtensors

    return dtensors


_dtensors.runner = _run_dtensors
_logging.get_logger()
_shortcut = _submodules.Shortcut(__name__, "tools", ("cli", "draw", "profiler", "simulator"))
_sys.meta_path.insert(0, _shortcut)  # ahead of the finder that would import files once more
if _typing.TYPE_CHECKING:  # what comes from `__getattr__`
    from . import backends, draw, export, profiler, simulator, tuning
    from .legacy.configs import *  # noqa: F403
    from .legacy.switches import *  # noqa: F403

    HAS_LIBNATTEN: bool

NeighborhoodAttention = NeighborhoodAttention2D  # 0.14's name

__all__ = [
    "ArgumentError",
    "Neighborhood",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "VarlenLayout",
    "__version__",
    "attention",
    "compile_ahead",
    "fit_window",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_varlen",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_varlen",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_varlen",
    "neighborhood_attention_generic",
]


def __dir__() -> list[str]:
    """The names of today's package; those of old eras are found when they are asked for."""
    return [*__all__, "backends", "compat", "errors", "flops", "functional", "modules", "utils"]


_submodule = _submodules.getter(__name__)


if not _typing.TYPE_CHECKING:  # otherwise every name would exist for type checkers

    def __getattr__(name: str) -> object:
        """Import submodules when they are asked for."""
        if name == "HAS_LIBNATTEN":  # it says here whether there is a GPU
            return legacy.switches.has_cuda()
        return _submodule(name)


_imports.install(__name__)  # which lets this module, too, find names of old eras
