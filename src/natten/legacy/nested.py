"""0.17's ``na*d_{qk,av}_nested``: the unfused operators, which accept nested tensors themselves.

``na*d_qk_nested(query, key, bias, kernel_size, dilation, ...)`` has the bias in third place.
"""

from natten import functional as F

na1d_qk_nested, na1d_av_nested = F.na1d_qk_with_bias, F.na1d_av
na2d_qk_nested, na2d_av_nested = F.na2d_qk_with_bias, F.na2d_av
na3d_qk_nested, na3d_av_nested = F.na3d_qk_with_bias, F.na3d_av
