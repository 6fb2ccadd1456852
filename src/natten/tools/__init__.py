"""Tools around the operators: pictures, counting, measuring, and the command ``natten``.

All of them are also found without this folder's name, as ``natten.draw`` and so on.
"""

from .._submodules import getter as _getter

__getattr__ = _getter(__name__)
