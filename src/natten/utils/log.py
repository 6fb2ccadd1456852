"""The package's logger, "natten", and the variables that set it up.

``NATTEN_LOG_LEVEL`` (debug, info, warning, error, critical) sets its level. ``NATTEN_LOG_PIPE`` is
"stdout", "stderr" or a file to write to. Without it the program sets up handlers.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
from typing import Any

import torch

log_format = "%(asctime)s %(name)s %(levelname)s: %(message)s"
_PIPE = "NATTEN_LOG_PIPE"


class LogLevel(enum.Enum):
    """Upstream's names of levels."""

    Default = 0
    Debug = 1
    Info = 2
    Warnings = 3
    Errors = 4
    Critical = 5


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


class NattenLogger:
    """0.21's logger: :func:`get_logger`'s, silent while PyTorch compiles."""

    def __init__(self, name: str) -> None:
        self.logger = get_logger(name)

    def is_safe_to_log(self) -> bool:
        """Whether nothing is compiled just now."""
        return not torch.compiler.is_compiling()

    def debug(self, *args: Any, **kwargs: Any) -> None:
        """``logging.Logger.debug``."""
        if self.is_safe_to_log():
            self.logger.debug(*args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> None:
        """``logging.Logger.info``."""
        if self.is_safe_to_log():
            self.logger.info(*args, **kwargs)

    def warning(self, *args: Any, **kwargs: Any) -> None:
        """``logging.Logger.warning``."""
        if self.is_safe_to_log():
            self.logger.warning(*args, **kwargs)
