"""Neighborhood attention: sliding-window self attention over 1-D, 2-D and 3-D token layouts."""

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
from natten.neighborhood import Neighborhood, fit_window
from natten.varlen import VarlenLayout
