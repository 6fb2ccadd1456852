"""For type checkers, which do not see that this is `natten.tools.draw`."""

from .tools.draw import *
