"""``natten.functional`` of 0.14: :mod:`natten.legacy.operators`, which does not warn.

To 0.14.4 windows came from the shapes of the bias and of the weights; both forms are accepted.
"""

from ...legacy.operators import *  # noqa: F403
