"""Stand-ins for ``import natten`` of an older era, where eras contradict each other.

    import natten.compat.v017 as natten

``v014`` is 0.14.1 to 0.14.4, ``v015`` 0.14.5 to 0.15.1, ``v017`` 0.17.0 to 0.17.5. They differ from
the top level in the order of positional arguments and in defaults; everything else is the same
objects. Each has all modules of its era, as :mod:`natten.legacy.imports` lists them, so that
replacing ``natten`` in every import of a program is enough.
"""

from .._submodules import getter as _getter

__getattr__ = _getter(__name__)
