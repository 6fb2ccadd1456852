"""The program ``natten``, which explains itself without importing PyTorch.

``import natten`` registers operators with PyTorch, whose import takes more than a second. Help and
the version need neither, so the package stays unexecuted for them. It can not decide that itself.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run the command line of the process; the exit code is that of ``natten.cli.main``."""
    words = sys.argv[1:]
    try:
        if not words or words[0] == "help" or {"-h", "--help", "--version"} & {*words}:
            spec = importlib.util.find_spec("natten")
            assert spec is not None
            sys.modules["natten"] = importlib.util.module_from_spec(spec)  # its folder, no names
        from natten.tools.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("natten: interrupted", file=sys.stderr)
        return 130
