"""0.21's loggers: :func:`get_logger` is the package's own."""

from __future__ import annotations

import enum
from typing import Any

import torch

from .._logging import get_logger, log_format

__all__ = ["LogLevel", "NattenLogger", "get_logger", "log_format"]


class LogLevel(enum.Enum):
    """Names of levels."""

    Default = 0
    Debug = 1
    Info = 2
    Warnings = 3
    Errors = 4
    Critical = 5


class NattenLogger:
    """The logger of :func:`get_logger`, silent while PyTorch compiles."""

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
