"""What each module imports: from below, in no circle, and no private name of PyTorch.

The modules' sources are read, imports inside of functions too; those under ``TYPE_CHECKING`` do not
count, as nobody runs them.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import natten
from natten.legacy import imports as imports_of_old

ROOT = Path(natten.__file__).parent

# Modules, or folders of them, from bottom to top. A module imports from its own layer and below.
LAYERS = (
    "errors version softmax inputs caches compiling tuning"
    " _dtensors _hints _library _keywords _logging _numbers _ranks _submodules _torch _tracing"
    " _warnings",
    "neighborhood tiling documents sequences nested _checks",
    "backends",
    "gather operators",
    "unfused varlen functional modules",
    "distributed",
    "explaining ahead export flops tools",
    "tools.cli tools.profiler.__main__ __main__",
    # The names of old eras.
    "legacy compat",
    # `natten` itself.
    "",
)

# Imports upwards that are made when a name is asked for, each with its reason.
LAZY = {
    ("backends", "explaining"): "`natten.backends.explain` checks arguments as the call does",
}

# What a backend may know of the others.
BACKENDS = {"hopper": {"triton"}, "sdpa": {"tiled"}}


def module_name(path: Path) -> str:
    """Without the package's own name, which is ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            seen = node.body if ast.unparse(node.test).startswith("not ") else node.orelse
            for each in seen:
                yield each
                yield from executed(each)
        else:
            yield node
            yield from executed(node)


def absolute(name: str, relative: str) -> str:
    """The module that ``name`` calls ``relative``, which begins with dots."""
    inner = relative.lstrip(".")
    parts = name.split(".") if name else []
    if MODULES[name].name != "__init__.py":
        parts = parts[:-1]
    up = len(relative) - len(inner) - 1
    assert up <= len(parts), f"{name} imports {relative}"
    return ".".join([*parts[: len(parts) - up], *([inner] if inner else [])])


def imports(name: str, text: str) -> Iterator[str]:
    """Our modules that a module imports."""
    for node in executed(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not [each for each in node.names if each.name.split(".")[0] == "natten"], name
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                assert node.module and node.module.split(".")[0] != "natten", name
                continue
            home = absolute(name, "." * node.level + (node.module or ""))
            for each in node.names:
                child = f"{home}.{each.name}".lstrip(".")
                yield child if child in MODULES else home
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            given = node.args[0]
            if isinstance(given, ast.Constant):
                assert given.value.startswith("."), f"{name} imports {given.value}"
                yield absolute(name, given.value)


GRAPH = {name: set(imports(name, path.read_text())) - {name} for name, path in MODULES.items()}


LAYER = {name: number for number, row in enumerate(LAYERS) for name in row.split(" ")}


def layer(name: str) -> int:
    """The number of a module's layer: its own, or its folder's."""
    return LAYER[name] if name in LAYER else layer(name.rpartition(".")[0])


def test_every_module_has_a_layer_and_every_exception_is_needed():
    assert set(LAYER) <= set(MODULES)
    assert {name.partition(".")[0] for name in MODULES} <= set(LAYER)
    for lower, upper in LAZY:
        assert upper in GRAPH[lower] and layer(lower) < layer(upper)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    for other in GRAPH[name]:
        if (name, other) not in LAZY:
            assert layer(other) <= layer(name), f"{name} imports {other}"


def test_there_is_no_circle():
    lazy = {lower: {upper} for lower, upper in LAZY}
    graph = {name: found - lazy.get(name, set()) for name, found in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("nested", "def f():\n    from .legacy.types import *\n    import torch", {"legacy.types"}),
        ("backends", "importlib.import_module('..tools', __name__)", {"tools"}),
        ("tools.draw", "if TYPE_CHECKING:\n    from ... import legacy", set()),
        ("tools.draw", "from ... import export, ArgumentError", {"export", ""}),
    ],
)
def test_imports_are_found(name, text, found):
    assert set(imports(name, text)) == found


def backend(name: str) -> str:
    """The backend that a module is of, or ""."""
    path = name.split(".")
    own = path[:1] == ["backends"] and len(path) > 1 and path[1] != "interface"
    return path[1] if own else ""


@pytest.mark.parametrize("name", list(filter(backend, MODULES)))
def test_backends_do_not_know_each_other(name):
    allowed = {"", backend(name)} | BACKENDS.get(backend(name), set())
    for other in GRAPH[name]:
        assert other != "backends" and backend(other) in allowed, f"{name} imports {other}"


# --- names of old eras ---

OLD = (".legacy", ".compat")
TODAYS = {name for name in MODULES if name and not f".{name}".startswith(OLD)}

# Old names that our modules mention, each with its reason.
MENTIONED = {
    (
        "_tracing",
        "NeighborhoodAttention",
    ): "the names for which programs register fvcore's handlers",
    ("functional", "natten.compat"): "the error of a call in an old order says where that works",
}


def bound(text: str) -> set[str]:
    """The names that a module binds anywhere."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def old_names() -> set[str]:
    """What old code imports and no module of today has, and the folders where it is."""
    tables = (*imports_of_old.MODULES.values(), imports_of_old.NAMES)
    sources = {each for table in tables for row in table.values() for each in row.split()}
    homes = [importlib.import_module(each, "natten") for each in sources if each.startswith(OLD)]
    names = {name for home in homes for name in imports_of_old.names_of(home)}
    todays = set().union(*(bound(MODULES[name].read_text()) for name in TODAYS))
    return names - todays | {"natten.legacy", "natten.compat"}


def mentioned(text: str, names: set[str]) -> set[str]:
    """Those of the names that stand in a text as words; PyTorch's own names do not count."""
    return {name for name in names if re.search(rf"(?<!torch\.)\b{re.escape(name)}\b", text)}


def test_nothing_depends_on_names_of_old_eras():
    names = old_names()
    assert {"use_fused_na", "natten2dqkrpb", "KernelSchedule", "qk_2d_rpb_flop"} < names
    for name in TODAYS:
        assert not [each for each in GRAPH[name] if f".{each}".startswith(OLD)], name
    found = {(name, old) for name in TODAYS for old in mentioned(MODULES[name].read_text(), names)}
    assert found == MENTIONED.keys()


def test_mentions_are_found():
    names = {"use_fna", "NattenContext", "natten.compat"}
    text = "import natten.compat.v017\nuse_fna()  # torch.NattenContext, NattenContexts"
    assert mentioned(text, names) == {"use_fna", "natten.compat"}
    assert bound("from .types import x as y\nclass z: ...\ndef f(): w = 1") == {*"yzfw"}


# --- PyTorch's private names ---


def torch_names(text: str) -> Iterator[str]:
    """Names of PyTorch that a module imports, or reaches from what it imports."""
    tree, known = ast.parse(text), {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    yield from known.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in known:
                yield f"{known[root]}.{rest}"


def private(text: str) -> set[str]:
    """The names of those that have a part with an underscore before it, but ``__version__``."""
    return {each for each in torch_names(text) if re.match(r"torch(\.\w+)*?\._(?!_)", each)}


@pytest.mark.parametrize("name", MODULES)
def test_private_names_of_pytorch_stand_in_one_file(name):
    assert bool(private(MODULES[name].read_text())) == (name == "_torch")


def test_private_names_are_found():
    for text in (
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "from torch import _VF",
        "from torch.autograd import forward_ad as ad\nad._current_level",
        "def f():\n    return torch._C._functorch.x",
        "torch.ops.aten._softmax.default",
    ):
        assert private(text), text
    assert not private("import torch\ntorch.__version__, own._name, torch.ops.aten.add")
