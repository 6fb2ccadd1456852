"""Where 0.17.4 had fused operators that work with torch.compile; all of them do here.

Only 0.17 had this module, so the arguments are in 0.17's order: ``dilation`` is the fifth.
"""

from natten.compat.v017.functional import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]
