"""For type checkers, which do not see that this is `natten.tools.simulator`."""

from .tools.simulator import *
