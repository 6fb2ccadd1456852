"""``python -m natten.cli`` is ``natten``."""

import sys

from natten.cli import main

if __name__ == "__main__":
    sys.exit(main())
