"""Copies of the package under other module names, alone and beside the installed one.

Hugging Face's ``kernels`` loads packages so, some by a name that is no identifier.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import natten
from natten._library import NAMESPACE, namespace

LOAD = '''
import contextlib, importlib, importlib.util, io, json, sys, types
import torch
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)


class Blocked:
    """Nobody may import the installed package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "natten":
            raise AssertionError(f"{name} is imported")


def load(name, folder):
    """The copy in a folder, as a package called ``name``."""
    parent = name.rpartition(".")[0]
    if parent:
        sys.modules[parent] = types.ModuleType(parent)
        sys.modules[parent].__path__ = []
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_all():
    """The copies, by name; unless they are to be alone, the installed package is among them."""
    mode, copies = sys.argv[1], json.loads(sys.argv[2])
    if mode == "alone":
        sys.meta_path.insert(0, Blocked)
        return {name: load(name, folder) for name, folder in copies.items()}
    import natten
    return {name: load(name, folder) for name, folder in copies.items()} | {"natten": natten}
'''

USE = """
def use(name, natten):
    '''Numbers, texts and names that do not depend on a package's name.'''
    torch.manual_seed(0)
    found = {}
    shapes = (1, 6, 7, 4, 8), (1, 6, 7, 2, 8), (1, 6, 7, 2, 4), (4, 5, 5)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    q, k, v, rpb = inputs
    with FlopCounterMode(display=False) as counter:
        out, lse = natten.na2d(q, k, v, 3, is_causal=(True, False), rpb=rpb, return_lse=True)
        grads = torch.autograd.grad((out.sin() * lse[..., None]).sum(), inputs)
    found["fused"] = [x.tolist() for x in (out, lse, *grads)]
    found["flops"] = counter.get_total_flops()
    attn = natten.na2d_qk(q.movedim(-2, 1), q.movedim(-2, 1), 3, rpb=rpb)
    (grad,) = torch.autograd.grad(natten.na2d_av(attn.softmax(-1), q.movedim(-2, 1), 3).sum(), rpb)
    found["unfused"] = grad.tolist()
    row, lengths = torch.randn(1, 9, 2, 8, requires_grad=True), torch.tensor([4, 5])
    out = natten.attention(row, row, row, seqlens_Q=lengths, seqlens_KV=lengths)
    found["sequences"] = [x.tolist() for x in (out, *torch.autograd.grad(out.sin().sum(), row))]
    layout = natten.VarlenLayout([(3,), (6,)])
    found["documents"] = natten.na1d_varlen(row[0], row[0], row[0], layout, kernel_size=3).tolist()

    layer = natten.NeighborhoodAttention1D(16, 2, kernel_size=3).eval()
    given = torch.randn(1, 8, 16)
    program = torch.export.export(layer, (given,))
    ours = [str(node.target) for node in program.graph.nodes if "attention" in str(node.target)]
    found["export"] = [layer(given).tolist(), program.module()(given).tolist()]
    plain = program.run_decompositions(natten.export.decompositions())
    assert not any("attention" in str(node.target) for node in plain.graph.nodes)

    found["explain"] = natten.backends.explain(q, k, v, kernel_size=3)
    found["draw"] = natten.draw.draw_mask((4, 4), kernel_size=3)
    found["simulate"] = repr(natten.simulator.simulate((16, 16), (4, 4)))
    tune = natten.profiler.tune
    found["tiles"] = [tune.tile_chooser(each) is None for each in ("tiled", "sdpa", "reference")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert natten.cli.main(["simulate", "-i", "16", "-w", "4"]) == 0
    found["cli"] = printed.getvalue()

    assert natten.functional.natten1dqk and natten.context.NattenContext and natten.use_fused_na
    for old in ("natten2d", "utils.tensor", "compat.v014.natten2d", "compat.v017.ops"):
        module = importlib.import_module(f"{name}.{old}")
        for each in module.__all__:
            home = getattr(getattr(module, each), "__module__", None) or name
            foreign = home.partition(".")[0] == "natten" and name != "natten"
            assert not foreign, f"{old}.{each} is of {home}"
    assert natten.compat.v017.functional.na1d.__module__.startswith(name)
    return found, ours


results = {name: use(name, module) for name, module in load_all().items()}
if sys.argv[1] == "alone":
    assert not [name for name in sys.modules if name.partition(".")[0] == "natten"]
print(json.dumps(results))
"""

ON_GPU = """
def use(natten):
    torch.manual_seed(0)
    inputs = torch.randn(3, 1, 6, 9, 8, 2, 64, device="cuda").bfloat16().requires_grad_().unbind()
    found = {}
    for backend in (None, "triton"):
        out = natten.na3d(*inputs, kernel_size=(3, 5, 5), backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), inputs)
        found[str(backend)] = [x.tolist() for x in (out, *grads)]
    return found


print(json.dumps({name: use(module) for name, module in load_all().items()}))
"""

NAMES = "natten_copy", "kernels_of.natten", "1f30-c7"


def run(program: str, mode: str, copies: dict[str, str]) -> dict:
    """What each package found."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD + program, mode, json.dumps(copies)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, str]:
    """Folders of copies, by the names of their modules."""
    source, found = Path(natten.__file__).parent, {}
    for number, name in enumerate(NAMES):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        found[name] = str(folder)
    return found


def test_copies_work_beside_the_installed_package(copies):
    results = run(USE, "beside", copies)
    wanted, operators = results.pop("natten")
    assert operators == ["natten.attention.default"]
    for name, (found, operators) in results.items():
        assert operators == [f"{namespace(name)}.attention.default"]
        assert found == wanted, name


def test_copies_need_no_installed_package(copies):
    assert list(run(USE, "alone", copies)) == list(NAMES)


@pytest.mark.gpu
def test_copies_run_the_gpu_kernels(copies):
    """All with the same bits, beside the installed package."""
    results = run(ON_GPU, "beside", copies)
    wanted = results.pop("natten")
    assert len(results) == len(NAMES) and all(found == wanted for found in results.values())


def test_names_of_operators():
    assert NAMESPACE == namespace("natten") == "natten"
    assert [namespace(name) for name in NAMES] == [
        "natten_copy",
        "kernels_of_natten",
        "natten_1f30_c7",
    ]
