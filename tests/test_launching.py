"""What the short way to launch passes to the GPU's driver, against what Triton passes."""

from __future__ import annotations

import gc
import importlib
import pathlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import hopper
from helpers import triton as portable
from torch import Tensor

pytest.importorskip("triton", "3.6")  # others have no short way

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.runtime import _allocation, driver

from natten import backends, compiling, tuning
from natten.backends import Backend
from natten.backends.hopper import plan as hopper_plan
from natten.backends.triton.launch import Launch, kernel, per_axis, strides_of
from natten.backends.triton.releases import release
from natten.inputs import Inputs
from natten.neighborhood import Neighborhood
from natten.operators.fused import Call
from natten.operators.schema import ANY

NEW = release(triton.__version__) > (3, 6)  # one function in C for all kernels
# Where the function in C takes metadata of the launch and two hooks.
HOOKS = slice(8, 11) if NEW else slice(10, 13)
RULE = Neighborhood.create(2, (7, 5), 1, (1, 2), (False, True))
ENCODE = "fill_tma_descriptor_tiled" if NEW else "fill_tma_descriptor"
Launches = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where compiled kernels are kept between tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, kernels: pathlib.Path) -> Iterator[Launches]:
    """What reaches the function in C, on a machine that believes to have an H100."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    compiled = importlib.import_module("compiled")
    found: Launches = []

    def launch(*args: Any) -> None:
        found.append(args)

    built = SimpleNamespace(launch=launch)
    for name, fake in {
        "compile_module_from_src": lambda **_: built,  # 3.6 builds a function for each kernel
        "library_dirs": lambda: [],
        "PyKernelArg": lambda nested_tuple, type: (nested_tuple, type),
        **{f"ARG_{kind}": kind for kind in ("CONSTEXPR", "KERNEL", "TUPLE")},
    }.items():
        monkeypatch.setattr(nvidia, name, fake, raising=False)
    with compiled._compiler(GPUTarget("cuda", 90, 32), 227 * 1024):
        knobs.cache.dir = str(kernels)
        active: Any = driver.active
        active.launcher_cls = nvidia.CudaLauncher
        active.utils = SimpleNamespace(
            launch=launch,
            build_signature_metadata=lambda types: " ".join(types).encode(),
            **{ENCODE: lambda *args: ("map", *args)},
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *_: (object(), 4321, 32, 0, 1024),
        )
        yield found


def attention(backend: Backend, num_additional: int = 0) -> None:
    """A forward and a backward on tensors of which nothing is read."""
    q, k, v = (torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    inputs = Inputs(q, k, v)
    if num_additional:
        tokens = q.new_empty(1, num_additional, 2, 64)
        inputs = inputs._replace(additional_keys=tokens, additional_values=tokens.clone())
    outputs = backend.forward(inputs, RULE, 0.125)
    backend.backward(q.new_empty(q.shape), None, inputs, *outputs, RULE, 0.125)


def plain(args: tuple[Any, ...]) -> list[Any]:
    """All but hooks and what is for them; tensors by their addresses."""
    *parts, last = (*args[: HOOKS.start], *args[HOOKS.stop :])
    parts += last if NEW else [last]  # all arguments of the kernel are one
    return [x.data_ptr() if isinstance(x, Tensor) else x for x in parts]


def launch_often(monkeypatch: pytest.MonkeyPatch, *before: Callable[[], None]) -> None:
    """Let each launch be done once more after each of these."""
    once = Launch.run

    def run(self: Launch, **tensors: Any) -> None:
        once(self, **tensors)
        for each in before:
            each()
            once(self, **tensors)

    monkeypatch.setattr(Launch, "run", run)


def _sums(a, b, out, n, scale, SIZE: tl.constexpr, HAS_B: tl.constexpr):
    pass


@pytest.mark.parametrize("jit", [triton.jit, gluon.jit], ids=["triton", "gluon"])
def test_numbers_of_a_kernel_are_not_specialized(jit: Any) -> None:
    made = kernel(jit, tensors="a b out")(_sums)
    assert made.tensors == ("a", "b", "out")
    assert [each.name for each in made.params if each.do_not_specialize] == ["n", "scale"]
    assert [each.name for each in made.params if each.is_constexpr] == ["SIZE", "HAS_B"]


@pytest.mark.parametrize("tensors", ["b a out", "a out", "a b out more"])
def test_tensors_are_the_first_parameters(tensors: str) -> None:
    with pytest.raises(TypeError, match="first parameters of _sums"):
        kernel(triton.jit, tensors=tensors)(_sums)


def test_arguments_are_named() -> None:
    made = kernel(triton.jit, tensors="a b out")(_sums)
    right = {"HAS_B": False, "SIZE": 4, "scale": 0.5, "n": 9}
    launch = Launch(made, (3,), right, num_warps=2)
    assert list(launch.arguments.items()) == [
        ("n", 9),
        ("scale", 0.5),
        ("SIZE", 4),
        ("HAS_B", False),
    ]
    assert launch.grid == (3, 1, 1) and launch.options["num_warps"] == 2
    for wrong, message in (
        ({"n": 9, "scale": 0.5}, r"_sums: missing \['SIZE', 'HAS_B'\], unknown \[\]"),
        (right | {"m": 1, "out": None}, r"_sums: missing \[\], unknown \['m', 'out'\]"),
    ):
        with pytest.raises(TypeError, match=message):
            Launch(made, (3,), wrong)
    with pytest.raises(TypeError, match=r"unknown \['n'\]"):
        Launch(made, (3,), right, {"n": torch.Tensor.data_ptr})


def test_tensors_are_named() -> None:
    made = kernel(triton.jit, tensors="a b out")(_sums)
    launch, x = (
        Launch(made, (3,), {"n": 9, "scale": 0.5, "SIZE": 4, "HAS_B": False}),
        torch.zeros(1),
    )
    with pytest.raises(KeyError, match="b"):
        launch.run(a=x, out=x)
    with pytest.raises(TypeError, match=r"takes \['a', 'b', 'out'\], not \['a', 'b', 'out', 'n'\]"):
        launch.run(a=x, b=None, out=x, n=x)


def test_arguments_per_axis() -> None:
    assert per_axis("K", (3, 5)) == {"K0": 1, "K1": 3, "K2": 5}
    found = strides_of("q", torch.empty(2, 7, 9, 3, 4).stride())
    assert found == {"q_b": 756, "q_0": 0, "q_1": 108, "q_2": 12, "q_h": 4}


@pytest.mark.parametrize("num_additional", [0, 3])
@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_the_short_way_passes_what_triton_passes(
    backend: Backend, num_additional: int, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = Mock()
    chain = knobs.runtime.launch_enter_hook
    launch_often(monkeypatch, lambda: None, lambda: chain.add(hook), lambda: chain.remove(hook))
    attention(backend, num_additional)
    kernels = 4 if backend is hopper else 3  # one of which makes LSE and delta
    assert len(launched) == 4 * (kernels + (num_additional > 0))
    for first, short, hooked, again in zip(*(launched[i::4] for i in range(4))):
        assert plain(first) == plain(short) == plain(hooked) == plain(again)
        # Triton always passes its chains of hooks, the short way never: it tells them apart.
        assert first[HOOKS][1] is hooked[HOOKS][1] is chain
        assert short[HOOKS] == again[HOOKS] == (None, None, None)
        assert len(first) == len(short) and (not NEW or len(short) == 16)


def run_forward(
    query: Tensor, key: Tensor, out: Tensor, lse: Tensor, rule: Neighborhood = RULE
) -> None:
    """Launch the Hopper kernel, without additional tokens."""
    plan = hopper_plan.plan_for(query, key, key, None, rule, 0.125)
    plan.forward.run(
        query=query, key=key, value=key, out=out, additional_keys=None, additional_values=None,
        query_columns=None, key_columns=None, key_at_seam=key, value_at_seam=key, lse=lse,
        bias_tables=None, tile_table=None, key_mask=None, additional_mask=None,
    )  # fmt: skip


def test_a_map_is_encoded_once_per_address(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Mock(return_value="map")
    monkeypatch.setattr(driver.active.utils, ENCODE, encode)
    q, out = (torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    lse = q.new_empty(1, 12, 16, 2, dtype=torch.float32)
    launch = hopper_plan.plan_for(q, q, q, None, RULE, 0.125).forward
    blocks = {tuple(make.block) for make in launch.tensors.values() if make is not None}
    # Four by Triton's own first launch, then one for the output, and of the query, which is also
    # key and value, one for each shape of blocks.
    every = 5 + len(blocks)
    for x, encoded in ((q, 4), (q, every), (q, every), (q.clone(), every + 1), (q, every + 1)):
        run_forward(x, q, out, lse)
        assert encode.call_count == encoded


def test_boxes_may_be_smaller_than_types(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types are powers of two. Triton and the short way encode the tokens that there are."""
    encode = Mock(return_value="map")
    monkeypatch.setattr(driver.active.utils, ENCODE, encode)
    rule = Neighborhood.create(3, (9, 15, 24), (3, 5, 8))
    q = torch.empty(1, 21, 45, 80, 1, 64, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    launch = hopper_plan.plan_for(q, q, q, None, rule, 0.125).forward
    assert launch.arguments["TILE"] == (3, 5, 4)
    of_query = launch.tensors["query"]
    assert of_query.block == [1, 1, 1, 64, 64] and of_query.box == [1, 3, 5, 4, 64]
    for _ in range(2):
        run_forward(q, q, out, lse, rule)
        boxes = [call.args[4] for call in encode.call_args_list]
        assert boxes[0] == boxes[-1] == [1, 3, 5, 4, 64]  # of queries and outputs
        assert boxes[1] == boxes[-2] == [1, *launch.arguments["BLOCK"], 64]
        encode.reset_mock()


def test_the_stream_is_asked_each_time(launched: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [5, 5, 6, 5, 6]
    current = iter(streams)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: next(current))
    q, out = (torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    lse = q.new_empty(1, 12, 16, 2, dtype=torch.float32)
    for _ in streams:
        run_forward(q, q, out, lse)
    assert [args[3] for args in launched] == streams
    first, *others = [plain(args)[4:] for args in launched]
    assert all(other == first for other in others)


def test_descriptors_do_not_keep_memory(launched: Launches) -> None:
    q, k, out = (torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    lse, alive = q.new_empty(1, 12, 16, 2, dtype=torch.float32), weakref.ref(q)
    run_forward(q, k, out, lse)
    run_forward(q, k, out, lse)
    del q
    assert alive() is None


def use_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels need memory that a profiler gives them."""
    allocator = SimpleNamespace(get=lambda: lambda *_: None)
    monkeypatch.setattr(_allocation, "_profile_allocator", allocator)
    monkeypatch.setattr(_allocation, "has_profile_allocator", lambda: True, raising=False)
    before = nvidia.CudaLauncher.__init__

    def init(self: Any, *args: Any) -> None:
        before(self, *args)
        self.profile_scratch_size = 16

    monkeypatch.setattr(nvidia.CudaLauncher, "__init__", init)


def pass_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a release that nobody looked at pass one more argument to the function in C."""
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    before = nvidia.CudaLauncher.__call__

    def call(self: Any, *args: Any) -> None:
        launch = self.launch
        self.launch = lambda *args: launch(*args, "more")
        before(self, *args)
        self.launch = launch

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", call)


def pass_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let such a release give another one of them."""
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    before = nvidia.CudaLauncher.__call__

    def call(self: Any, *args: Any) -> None:
        before(self, *args[:5], (*args[5], 1), *args[6:])

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", call)


def be_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia.CudaLauncher, "__module__", "triton.backends.amd.driver")


@pytest.mark.parametrize(
    "change", [use_scratch, be_of_amd, pass_more, pass_another], ids=lambda f: f.__name__
)
def test_triton_launches_where_its_internals_are_not_known(
    change: Callable[..., None], launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    launch_often(monkeypatch, lambda: None, lambda: None)
    attention(portable)
    assert len(launched) == 3 * 3
    assert all(args[HOOKS][1] is knobs.runtime.launch_enter_hook for args in launched)


@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_an_unknown_release_is_compared_first(
    backend: Backend, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches twice; then what it passed is known."""
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    launch_often(monkeypatch, lambda: None, lambda: None)
    attention(backend)
    for first, second, third in zip(*(launched[i::3] for i in range(3))):
        assert plain(first) == plain(second) == plain(third)
        hook = knobs.runtime.launch_enter_hook
        assert [args[HOOKS][1] is hook for args in (first, second, third)] == [True, True, not NEW]


def part(
    backend: Backend, length: int, keys: int, offset: int, step: int = 32,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """A forward and a backward of queries that are a part of a layout; ``step`` is how far apart
    heads are."""
    rule = Neighborhood.create(1, 9, 1, 2, True, "truncate", 1, offset)
    q = torch.empty(2, length, 2, step, dtype=torch.bfloat16)[..., :32]
    k = torch.empty(2, keys, 2, step, dtype=torch.bfloat16)[..., :32]
    more = torch.empty(2, 5, 2, 32, dtype=torch.bfloat16)
    inputs = Inputs(q, k, k, None, more, more, key_mask=mask)
    if backend is portable:
        rpb = torch.empty(2, 17, dtype=torch.bfloat16)
        inputs = inputs._replace(rpb=rpb)
    outputs = backend.forward(inputs, rule, 0.125)
    backend.backward(q, None, inputs, *outputs, rule, 0.125)


# Queries, keys, queries before the first one, and how far apart heads are.
PARTS = [
    *((12, 90, offset) for offset in (8, 0, 1, 3, 16, 78)),
    *((12, keys, 1) for keys in (89, 91, 96, 1024)),
    *((queries, 90, 3) for queries in (11, 12)),
    (11, 1025, 1000),
    (12, 90, 8, 48),
]  # fmt: skip


@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_another_part_compiles_nothing(
    backend: Backend, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another offset, another length of keys, a part of about the same size, nor tensors
    that lie otherwise."""
    part(backend, *PARTS[0])
    kernels, compile_one = len(launched), Mock()
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compile_one)
    for each in PARTS:
        part(backend, *each)
    assert not compile_one.called and len(launched) == kernels * (1 + len(PARTS))


@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_parts_that_take_turns_are_kept(
    backend: Backend, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in PARTS:
        part(backend, *each)
    move = Mock()
    monkeypatch.setattr(Launch, "moved", move)
    for _ in range(2):
        for each in PARTS:
            part(backend, *each)
    assert not move.called


def test_a_new_mask_compiles_nothing(launched: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether batch entries share it, wherever it begins, however far apart its bytes are."""
    part(portable, 12, 90, 8, mask=torch.ones(1, 90) > 0)
    kernels, compile_one = len(launched), Mock()
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compile_one)
    everything = torch.ones(361) > 0
    of_two = everything[:180].view(2, 90), everything[1:181].view(2, 90)
    masks = [*of_two, everything[1:].view(2, 90, 2)[..., 1], everything[3:93].expand(2, 90)]
    for mask in masks:
        part(portable, 12, 90, 8, mask=mask)
    part(portable, 12, 90, 3, mask=masks[0])
    part(portable, 12, 85, 8, mask=masks[0][:, :85])
    assert not compile_one.called and len(launched) == kernels * (1 + len(masks) + 2)


@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_parts_pass_what_triton_passes(
    backend: Backend, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of a plan of that part alone."""
    for each in PARTS:
        part(backend, *each)
    shared = launched.copy()
    launched.clear()
    for each in PARTS:
        tuning._forget_choices()
        part(backend, *each)
    assert list(map(numbers, shared)) == list(map(numbers, launched))


def numbers(args: tuple[Any, ...]) -> list[Any]:
    """The grid, and the numbers of a kernel."""
    given = args[-1] if NEW else args
    return [*args[:3], *(x for x in given if isinstance(x, (int, float)) and abs(x) < 2**32)]


# --- compiled ahead ---


def backward_of(call: Call, inputs: Inputs) -> None:
    out, lse = call.forward(inputs)
    call.backward(out, None, inputs, out, lse)


@pytest.mark.parametrize("backend", [portable, hopper], ids=["triton", "hopper"])
def test_what_was_compiled_ahead_is_launched(
    backend: Backend, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By layout, dtypes and strides; other tensors of a call compile kernels of their own."""
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(backends, "choose", lambda name, problem: backend)
    q, k, v = (torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    inputs, gpu = Inputs(q, k, v), torch.device("cuda", 0)
    futures = [
        future
        for operation in ("attention", "gradient")
        for future in Call(RULE, 0.125, ANY).compile(operation, inputs, gpu)
    ]
    assert len(futures) == (3 if backend is portable else 4) and not launched
    for each in futures:
        each.result()
    compile_one = Mock()
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compile_one)
    backward_of(Call(RULE, 0.125, ANY), inputs)
    assert not compile_one.called and len(launched) == len(futures)
    assert len(compiling._known) == len(futures)


@pytest.mark.parametrize("ahead", [False, True])
def test_garbage_is_left_while_kernels_are_compiled(
    ahead: bool, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the collector would take a third of that time."""
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(backends, "choose", lambda name, problem: portable)
    compile_one, collected = triton.runtime.jit.JITFunction._do_compile, []

    def compiled(self: Any, *args: Any) -> Any:
        collected.append(gc.isenabled())
        return compile_one(self, *args)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compiled)
    q = torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16)
    call = Call(RULE, 0.125, ANY)
    if ahead:
        for each in call.compile("attention", Inputs(q, q, q), torch.device("cuda", 0)):
            each.result()
    else:
        call.forward(Inputs(q, q, q))
    assert collected == [False] and gc.isenabled()


def test_a_new_forward_compiles_the_gradient(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads and once, where it is needed."""
    monkeypatch.setattr(compiling, "CAN_PARSE_IN_THREADS", True)
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(backends, "choose", lambda name, problem: portable)
    compiled: list[str] = []
    monkeypatch.setattr(
        Call, "compile", lambda self, operation, *others: compiled.append(operation)
    )
    without, needed = (
        torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16, requires_grad=needed)
        for needed in (False, True)
    )
    for q in (needed, needed.detach(), needed):
        with torch.no_grad():
            Call(RULE, 0.125, ANY).forward(Inputs(q, without, without))
        assert compiled == ["gradient"]


def test_a_new_gradient_compiles_all_of_it(
    launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the forward did not, as in compiled code; with the LSE's gradient if there is one."""
    monkeypatch.setattr(compiling, "CAN_PARSE_IN_THREADS", True)
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(backends, "choose", lambda name, problem: portable)
    compiled: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Call, "compile", lambda self, *given: compiled.append(given))
    q = torch.empty(1, 12, 16, 2, 64, dtype=torch.bfloat16)
    inputs, cpu = Inputs(q, q, q), torch.device("cpu")
    for _ in range(2):
        backward_of(Call(RULE, 0.125, ANY), inputs)
    call = Call(RULE, 0.125, ANY)
    out, lse = call.forward(inputs)
    for _ in range(2):
        call.backward(out, lse, inputs, out, lse)
    assert compiled == [("gradient", inputs, cpu, False), ("gradient", inputs, cpu, True)]
