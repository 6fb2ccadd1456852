"""Names of NATTEN 0.14 to 0.21, as translations onto this package.

Nothing else depends on it, except the thin files that stand where old code imports from.
"""

from .._submodules import getter as _getter

__getattr__ = _getter(__name__)
