"""``natten.functional`` of 0.14: the names of :mod:`natten.legacy.operators`, which do not warn.

Up to 0.14.4 windows came from the shapes of the bias and of the weights. Both forms are accepted.
"""

from ...legacy.operators import *  # noqa: F403
