"""The tests of this folder run where Triton interprets kernels: test_interpreter.py starts them."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["gluon.py"] if INTERPRETED else ["*.py"]
