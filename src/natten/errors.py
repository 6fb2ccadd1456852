"""The exceptions that bad arguments raise."""


class ArgumentError(ValueError, TypeError, RuntimeError):
    """A bad argument to a public function.

    NATTEN's eras raised different classes for the same mistake (``ValueError``, ``TypeError`` or
    ``RuntimeError``); code that catches any of them keeps working.
    """


class UnsupportedError(ArgumentError, NotImplementedError):
    """A combination that no backend can run; eras raised ``NotImplementedError`` for some."""
