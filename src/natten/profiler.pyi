"""For type checkers, which do not see that this is `natten.tools.profiler`."""

from .tools.profiler import *
