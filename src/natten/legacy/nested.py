"""0.17's ``na*d_{qk,av}_nested``: the unfused operators, which accept nested tensors themselves."""

from natten.functional import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

na1d_qk_nested, na2d_qk_nested, na3d_qk_nested = na1d_qk, na2d_qk, na3d_qk
na1d_av_nested, na2d_av_nested, na3d_av_nested = na1d_av, na2d_av, na3d_av
