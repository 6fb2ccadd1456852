"""Neighborhood attention: sliding-window self attention over 1-D, 2-D and 3-D token layouts."""

from typing import Any as _Any

from natten import _submodules, compat, context, flops, functional, legacy, types, utils
from natten.errors import ArgumentError
from natten.functional import (
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
from natten.legacy.configs import *  # noqa: F403
from natten.legacy.switches import *  # noqa: F403
from natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from natten.neighborhood import Neighborhood, fit_window
from natten.utils import log as _log
from natten.varlen import VarlenLayout
from natten.version import __version__

NeighborhoodAttention = NeighborhoodAttention2D

_log.get_logger()

__all__ = [
    "ArgumentError",
    "Neighborhood",
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "VarlenLayout",
    "__version__",
    "attention",
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
    *legacy.configs.__all__,
    *legacy.switches.__all__,
]


def __getattr__(name: str) -> _Any:
    """``HAS_LIBNATTEN``, whether there is a GPU, is asked only when needed, as submodules are."""
    if name == "HAS_LIBNATTEN":
        return legacy.switches.has_cuda()
    return _submodules.getter(__name__)(name)
