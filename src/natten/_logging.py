"""The package's logger, "natten", and the variables that set it up.

``NATTEN_LOG_LEVEL`` (debug, info, warning, error, critical) sets its level. ``NATTEN_LOG_PIPE`` is
"stdout", "stderr" or a file to write to. Without it the program sets up handlers.
"""

from __future__ import annotations

import logging
import os
import sys

log_format = "%(asctime)s %(name)s %(levelname)s: %(message)s"
_PIPE = "NATTEN_LOG_PIPE"


def get_logger(name: str = "natten") -> logging.Logger:
    """A logger below "natten", which the environment's variables set up."""
    package = logging.getLogger("natten")
    level = os.environ.get("NATTEN_LOG_LEVEL", "").upper()
    if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        package.setLevel(level)
    pipe = os.environ.get(_PIPE)
    if pipe and all(handler.get_name() != _PIPE for handler in package.handlers):
        package.addHandler(_handler(pipe))
    return logging.getLogger(name if name.startswith("natten") else f"natten.{name}")


def _handler(pipe: str) -> logging.Handler:
    handler: logging.Handler
    try:
        if pipe.lower() in ("stdout", "stderr"):
            handler = logging.StreamHandler(getattr(sys, pipe.lower()))
        else:
            handler = logging.FileHandler(pipe)
    except OSError:  # what can not be written is not worth a program's end
        handler = logging.NullHandler()
    handler.set_name(_PIPE)
    handler.setFormatter(logging.Formatter(log_format))
    return handler
