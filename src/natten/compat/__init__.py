"""Stand-ins for ``import natten`` of an older era, for code on which eras contradict each other.

    import natten.compat.v017 as natten

``v014`` is 0.14.1 to 0.14.4, ``v015`` is 0.14.5 to 0.15.1, and ``v017`` is 0.17.0 to 0.17.5. They
differ from the top level in the order of positional arguments and in defaults; all other objects
are the same. Each has all modules of its era, as :mod:`natten.legacy.imports` lists them. So it is
enough to replace ``natten`` in every import of a program.
"""

from .._submodules import getter as _getter

__getattr__ = _getter(__name__)
