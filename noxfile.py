"""The tests with other releases of PyTorch and Python, each with its Triton.

    pip install nox
    nox --list
    nox -s "tests(torch='2.6')"                            # one release of PyTorch
    nox -s "tests(torch='2.6')" -- tests/test_compile.py   # some of its tests
    nox                                                    # all: gigabytes, and hours

`make test` runs the release that the Makefile pins, with the releases of other packages that go
with it. Kernels run in Triton's interpreter, and some are compiled.
"""

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"

# Releases of PyTorch, each with its Triton and a Python: together they meet all of them.
RELEASES = {
    "2.6": ("3.2", "3.10"),
    "2.7": ("3.3", "3.10"),
    "2.8": ("3.4", "3.12"),
    "2.11": ("3.6", "3.13"),
    "2.13": ("3.7", "3.11"),
    "2.14": ("3.8", "3.14"),
}
NEEDED = (
    *("pytest", "pytest-xdist", "hypothesis", "expecttest", "fvcore", "rich", "matplotlib"),
    *("scikit-learn", "onnx", "onnxscript", "onnxruntime", "setuptools", "pyyaml"),
    "numpy<2.5; python_version >= '3.14'",
    "numpy<2.3; python_version < '3.14'",  # the interpreters up to Triton 3.6
)


@nox.session
@nox.parametrize(
    ("python", "torch", "triton"),
    [
        nox.param(python, torch, triton, id=f"torch={torch!r}")
        for torch, (triton, python) in RELEASES.items()
    ],
)
def tests(session: nox.Session, torch: str, triton: str) -> None:
    """All tests, or those that are named after ``--``."""
    # PyTorch goes first, so that nothing that depends on it picks another release.
    session.install(f"torch=={torch}.*")
    # Builds of PyTorch for CPUs bring no Triton.
    wanted = f"triton=={triton}.*; platform_system == 'Linux'"
    session.install(f"torch=={torch}.*", wanted, *NEEDED, "-e", ".")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests"]))
