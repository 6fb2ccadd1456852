"""Where 0.17 to 0.21 had test decorators; they live in :mod:`natten.legacy.testing`."""

from ..legacy.testing import *  # noqa: F403
