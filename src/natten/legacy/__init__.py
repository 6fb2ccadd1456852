"""Names of NATTEN 0.14 to 0.21, as translations onto this package.

Nothing else depends on it, except the thin files that stand where old code imports from.
"""

from natten.legacy.functional import (
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from natten.legacy.switches import *  # noqa: F403
