"""Where 0.17 had operators that work with torch.compile; all of them do here."""

from natten.functional import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]
