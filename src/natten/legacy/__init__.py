"""Names of NATTEN 0.14 to 0.21, translated to this package.

Nothing else depends on this folder, except the thin files that old code imports from.
"""

from .._submodules import getter as _getter

__getattr__ = _getter(__name__)
