"""Calls as programs of 0.14 to 0.21 make them, with the names, forms and meanings of eras."""

import importlib
import inspect
import logging
import subprocess
import sys
import warnings

import pytest
import torch

import natten
from natten import functional as NF
from natten.compat import v014, v015, v017
from natten.legacy import configs
from natten.legacy.imports import MODULES
from natten.utils.testing import fna_supports_additional_kv

RANKS = [1, 2, 3]


def heads_first(rank, window=3):
    """Query, key, bias and additional tokens, float64."""
    space = (9, 8, 7)[:rank]
    q, k = (torch.randn(1, 2, *space, 4).double() for _ in range(2))
    return (
        q,
        k,
        torch.randn(2, *(2 * window - 1,) * rank).double(),
        torch.randn(1, 2, 3, 4).double(),
    )


def unfused(rank):
    return getattr(natten, f"na{rank}d_qk"), getattr(natten, f"na{rank}d_av")


# --- modules ---


@pytest.mark.parametrize("package", MODULES)
def test_modules_of_old_eras_are_imported_as_packages_are(package):
    importlib.import_module(package)
    for row in MODULES[package]:
        for name in row.split():
            module = importlib.import_module(f"{package}.{name}")
            assert module.__name__ == f"{package}.{name}" and module.__all__
            exec(f"from {package}.{name} import *", {})
            with pytest.raises(AttributeError, match="nothing_of_that_name"):
                module.nothing_of_that_name  # noqa: B018
            parent, _, child = module.__name__.rpartition(".")
            assert hasattr(importlib.import_module(parent), child)


PROGRAM = """
import natten{era}.utils.testing
import natten{era}.context as context
from natten{era} import NeighborhoodAttention2D, use_fused_na
from natten{era}.context import NattenContext
from natten{era}.flops import get_flops, qk_2d_rpb_flop
from natten{era}.functional import na2d, na2d_qk, natten2dqkrpb, check_all_args
from natten{era}.types import FnaForwardConfigType, FnaBackwardConfigType
from natten{era}.utils import check_all_args
from natten{era}.utils.checks import check_all_args
from natten{era}.na2d import na2d, NeighborhoodAttention2D
from natten{era}.natten1d import NeighborhoodAttention1D
from natten{era}.experimental import na3d
from natten{era}.utils.log import get_logger
"""


def test_a_program_that_imports_modules_first():
    """It runs in a process where nothing of natten is imported yet."""
    program = PROGRAM.format(era=".compat.v017") + PROGRAM.format(era="")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_names_that_only_one_era_had_mean_what_they_meant():
    """The fifth argument of these has never been a stride, nor the layers' fourth."""
    from natten.experimental import na2d
    from natten.na2d import NeighborhoodAttention2D
    from natten.na2d import na2d as of_module
    from natten.natten2d import NeighborhoodAttention2D as OlderModule

    q = torch.randn(1, 9, 8, 2, 4)
    wanted = natten.na2d(q, q, q, 3, dilation=2)
    assert torch.equal(na2d(q, q, q, 3, 2), wanted)
    assert torch.equal(natten.experimental.na2d(q, q, q, 3, 2, False), wanted)
    assert torch.equal(of_module(q, q, q, 3, 2), wanted)
    assert not torch.equal(natten.na2d(q, q, q, 3, 2), wanted)
    for layer in (NeighborhoodAttention2D, OlderModule):
        assert layer(8, 2, 3, 2).dilation == (2, 2)
    from natten.natten2d import NeighborhoodAttention

    old = NeighborhoodAttention(8, 3, 2)  # 0.14.4's order
    assert (old.kernel_size, old.num_heads) == ((3, 3), 2) and old.rpb is not None


def test_operators_in_the_layers_modules():
    for rank, names in (
        (1, "natten1dqkrpb natten1dav na1d_qk_with_bias na1d_av na1d na1d_qk"),
        (2, "natten2dqkrpb natten2dav na2d_qk_with_bias na2d_av na2d na2d_qk"),
        (3, "natten3dqkrpb natten3dav na3d_qk_with_bias na3d_av na3d na3d_qk"),
    ):
        for package in ("natten", "natten.compat.v017"):
            module = importlib.import_module(f"{package}.natten{rank}d")
            for name in names.split():
                assert callable(getattr(module, name))
    assert natten.compat.v014.natten2d.natten2dav and natten.compat.v015.natten3d.na3d_av


def test_dir_shows_todays_package():
    assert len(dir(natten)) <= 45 and set(natten.__all__) < set(dir(natten))
    old = {"use_fused_na", "HAS_LIBNATTEN", "NeighborhoodAttention", "natten2d", "context"}
    assert not old & set(dir(natten)) and all(hasattr(natten, name) for name in old)
    names: dict[str, object] = {}
    exec("from natten import *", names)
    assert names.keys() - {"__builtins__"} == set(natten.__all__)
    assert not hasattr(natten, "torch") and not hasattr(natten, "na2dx")


# --- operators ---


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("functional", [NF, v014.functional, v015.functional, v017.functional])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forms_of_the_oldest_operators(functional, rank):
    q, k, rpb, _ = heads_first(rank)
    qk, av = unfused(rank)
    qkrpb, plain, weighted = (
        getattr(functional, f"natten{rank}d{x}") for x in ("qkrpb", "qk", "av")
    )
    attn = qk(q, k, 3, 2, rpb=rpb)
    for window in ((2,), (3, 2)):
        assert torch.equal(qkrpb(q, k, rpb, *window), attn)
        assert torch.equal(weighted(attn, k, *window), av(attn, k, 3, 2))
    for window in ({"dilation": 2}, {"kernel_size": 3, "dilation": 2}):
        assert torch.equal(qkrpb(q, k, rpb, **window), attn)
        assert torch.equal(qkrpb(query=q, key=k, rpb=rpb, **window), attn)
        assert torch.equal(weighted(attn=attn, value=k, **window), av(attn, k, 3, 2))
    assert torch.equal(qkrpb(q, k, None, 3, dilation=2), qk(q, k, 3, 2))
    assert torch.equal(plain(q, k, 3, 2), qk(q, k, 3, 2))
    assert torch.equal(plain(q, k, kernel_size=3, dilation=2), qk(q, k, 3, 2))
    for wrong in (
        lambda: plain(q, k, 2),
        lambda: qkrpb(q, k, None, dilation=2),
        lambda: qkrpb(q, k, rpb, kernel_size=3),
        lambda: qkrpb(q, k, rpb, 3, 2, 1),
        lambda: weighted(attn, k, 3, kernel_size=3, dilation=2),
    ):
        with pytest.raises(TypeError, match="`kernel_size`"):
            wrong()


@pytest.mark.parametrize("functional", [NF, v015.functional])
def test_windows_of_0_15_in_3d(functional):
    q, k, _, additional = heads_first(3)
    bias = torch.randn(2, 3, 5, 5).double()
    window = {"kernel_size_d": 2, "kernel_size": 3, "dilation_d": 3, "dilation": 2}
    today = (2, 3, 3), (3, 2, 2)
    qk, biased, av = functional.na3d_qk, functional.na3d_qk_with_bias, functional.na3d_av
    scores = natten.na3d_qk(q, k, *today)
    attn = natten.na3d_qk(q, k, *today, additional, False, bias)
    numbers = tuple(window.values())
    assert torch.equal(qk(q, k, *numbers), scores)
    assert torch.equal(qk(q, k, **window), scores) and torch.equal(
        qk(query=q, key=k, **window), scores
    )
    assert torch.equal(qk(q, k, 2, 3, dilation_d=3, dilation=2), scores)
    assert torch.equal(biased(q, k, bias, *numbers, additional), attn)
    assert torch.equal(biased(q, k, bias, **window, additional_keys=additional), attn)
    wanted = natten.na3d_av(attn, k, *today, additional)
    assert torch.equal(av(attn, k, *numbers, additional), wanted)
    assert torch.equal(av(attn, k, *numbers, additional_values=additional), wanted)
    assert torch.equal(av(attn, value=k, additional_values=additional, **window), wanted)
    with pytest.raises(TypeError):
        qk(q, k, 3, kernel_size_d=2)


def test_todays_windows_in_3d_are_not_0_15s():
    q, k, rpb, additional = heads_first(3)
    attn = natten.na3d_qk(q, k, 3, 2, additional, False, rpb)
    assert torch.equal(attn, NF.na3d_qk_with_bias(q, k, rpb, 3, 2, additional))
    assert torch.equal(natten.na3d_qk(q, k, 3, 2, None), natten.na3d_qk(q, k, (3,) * 3, (2,) * 3))
    with pytest.raises(ValueError, match="must be given once each"):
        natten.na3d_qk(q, k, 3, kernel_size_d=2)


@pytest.mark.parametrize("rank", RANKS)
def test_nested_operators_take_the_bias_third(rank):
    q, k, rpb, _ = heads_first(rank)
    nested = torch.nested.as_nested_tensor([q, q[:, :1]])
    bias = rpb[:1].expand_as(rpb)
    qk, _ = unfused(rank)
    for module in (importlib.import_module("natten.nested"), v015.nested, v017.nested):
        qk_nested = getattr(module, f"na{rank}d_qk_nested")
        window = (3, 3, 2, 2) if module is v015.nested and rank == 3 else (3, 2)
        assert torch.equal(qk_nested(q, k, bias, *window), qk(q, k, 3, 2, rpb=bias))
        items = qk_nested(nested, nested, None, *window).unbind()
        assert torch.equal(items[0], qk(q, q, 3, 2)) and len(items) == 2


def test_words_of_0_17_and_0_20():
    q = torch.randn(1, 9, 8, 2, 4)
    wanted = natten.na2d(q, q, q, 3, 1, 2)
    assert torch.equal(v017.functional.na2d(q, q, q, 3, 2, xformers_kwargs={"p": 0.0}), wanted)
    assert torch.equal(natten.na2d(q, q, q, 3, dilation=2, xformers_kwargs=None), wanted)
    assert torch.equal(v017.flex.flex_na2d(q, q, q, 3, 2), wanted)
    options = {"dilation": 2, "try_fuse_additional_kv": True}
    assert torch.equal(natten.na2d(q, q, q, 3, **options), wanted)
    assert torch.equal(
        natten.functional.neighborhood_attention_generic(q, q, q, 3, **options), wanted
    )


# --- autograd Functions ---

FUNCTIONS = [
    (1, "NATTEN1DQKRPBFunction", "NATTEN1DAVFunction", [(2,), (3, 2)]),
    (2, "NATTEN2DQKRPBFunction", "NATTEN2DAVFunction", [(2,), (3, 2)]),
    *(
        (
            rank,
            f"NeighborhoodAttention{rank}DQKAutogradFunction",
            f"NeighborhoodAttention{rank}DAVAutogradFunction",
            [(3, 3, 2, 2) if rank == 3 else (3, 2), (None, 3, 2), (None, 3, (2,) * rank, False)],
        )
        for rank in RANKS
    ),
]


@pytest.mark.parametrize(("rank", "qk_name", "av_name", "forms"), FUNCTIONS)
def test_functions(rank, qk_name, av_name, forms):
    """Every form of ``apply`` is differentiable and equals today's operators."""
    inputs = [x.requires_grad_() for x in heads_first(rank)[:3]]
    qk, av = unfused(rank)

    def gradients(score, weigh):
        q, k, rpb = inputs
        attn = score(q, k, rpb)
        out = weigh(attn.softmax(-1), k)
        return [attn, out, *torch.autograd.grad(out.square().sum(), inputs)]

    wanted = gradients(lambda q, k, b: qk(q, k, 3, 2, rpb=b), lambda a, v: av(a, v, 3, 2))
    for form in forms:
        score, weigh = (getattr(NF, name).apply for name in (qk_name, av_name))
        found = gradients(lambda *x: score(*x, *form), lambda *x: weigh(*x, *form))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(wanted, found))
    with pytest.raises(TypeError, match="`kernel_size` and `dilation`"):
        score(*inputs, 1, 2, 3, 4, 5)


def test_functions_attend_additional_tokens():
    q, k, rpb, additional = heads_first(2)
    causal = (True, False)
    attn = NF.NeighborhoodAttention2DQKAutogradFunction.apply(q, k, None, additional, 3, 2, causal)
    assert torch.equal(attn, natten.na2d_qk(q, k, 3, 2, additional, causal))
    out = NF.NeighborhoodAttention2DAVAutogradFunction.apply(attn, k, additional, 3, 2, causal)
    assert torch.equal(out, natten.na2d_av(attn, k, 3, 2, additional, causal))
    attn = NF.NeighborhoodAttention2DQKAutogradFunction.apply(q, k, rpb, additional, 3, 2)
    assert torch.equal(attn, natten.na2d_qk(q, k, 3, 2, additional, rpb=rpb))


@pytest.mark.parametrize("rank", RANKS)
def test_fused_functions(rank):
    """WeatherMesh calls them so, with tiles that the autotuner chose."""
    from natten.types import FnaBackwardConfigType, FnaForwardConfigType

    assert FnaForwardConfigType and FnaBackwardConfigType
    x = torch.randn(1, *(9, 8, 7)[:rank], 2, 4).double().requires_grad_()
    tiles = NF.autotune_fna(rank, x, 3, (2,) * rank, False)
    assert natten.utils.check_tiling_config(rank, tiles[0]) == tiles[0] and len(tiles[1]) == 4
    assert v017.autotuner.autotune_fna is NF.autotune_fna
    fused = getattr(NF, f"FusedNeighborhoodAttention{rank}D")
    out = fused.apply(x, x, x, None, (3,) * rank, (2,) * rank, (True,) * rank, 0.5, *tiles)
    wanted = getattr(natten, f"na{rank}d")(x, x, x, 3, 1, 2, True, 0.5)
    assert torch.equal(out, wanted)
    grads = (torch.autograd.grad(each.square().sum(), x)[0] for each in (out, wanted))
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_functions_are_traced():
    def dat(q, k, rpb):
        attn = NF.NATTEN1DQKRPBFunction.apply(q, k, rpb, 2).softmax(-1)
        return NF.NATTEN1DAVFunction.apply(attn, k, 2)

    inputs = heads_first(1)[:3]
    others = heads_first(1)[:3]
    traced = torch.jit.trace(dat, inputs, check_trace=False)
    torch.testing.assert_close(traced(*others), dat(*others))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_forms_compile_without_a_graph_break():
    q, k, rpb, _ = heads_first(2)
    q3, k3, _, _ = heads_first(3)

    def forms():
        attn = NF.NATTEN2DQKRPBFunction.apply(q, k, rpb, 2).softmax(-1)
        yield NF.NATTEN2DAVFunction.apply(attn, k, 2)
        yield NF.natten2dav(attn, k, 3, 2)
        yield v017.functional.natten2dqkrpb(q, k, rpb, kernel_size=3, dilation=2)
        yield natten.na3d_qk(q3, k3, 3, 1)
        yield natten.na3d_qk(q3, k3, 3, 3, 1, 2)
        yield natten.na3d_qk(q3, k3, kernel_size_d=3, kernel_size=3, dilation_d=1, dilation=2)

    found = torch.compile(lambda: list(forms()), fullgraph=True, backend="eager")()
    for eager, compiled in zip(forms(), found, strict=True):
        torch.testing.assert_close(compiled, eager)


# --- layers ---


def test_v014_takes_the_order_of_0_14_5_where_it_can_be_told_apart():
    """Windows were odd, and heads divide channels."""
    for args in ((64, 7, 4), (64, 4, 7), (64, 4, 7, 1), (64, 4, 7, None), (64, 7, 4, True)):
        layer = v014.NeighborhoodAttention2D(*args)
        assert (layer.kernel_size, layer.num_heads) == ((7, 7), 4)
    layer = v014.NeighborhoodAttention1D(64, 4, 7, 2, False, False, 0.5, 0.1, 0.2)
    assert layer.dilation == (2,) and layer.rpb is None and layer.qkv.bias is None
    assert (layer.scale, layer.attn_drop_rate, layer.proj_drop.p) == (0.5, 0.1, 0.2)
    layer = v014.NeighborhoodAttention1D(64, 7, 4, False, 0.5, 0.1, 0.2, 2)
    assert layer.dilation == (2,) and layer.rpb is not None and layer.qkv.bias is None
    assert (layer.scale, layer.attn_drop_rate, layer.proj_drop.p) == (0.5, 0.1, 0.2)
    with pytest.warns(UserWarning, match="natten.compat.v015 has the order"):
        layer = v014.NeighborhoodAttention2D(63, 3, 7)
    assert (layer.kernel_size, layer.num_heads) == ((3, 3), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v014.NeighborhoodAttention2D(96, 3, 3)
        v014.NeighborhoodAttention2D(63, kernel_size=3, num_heads=7, dilation=2)
    for wrong in (
        lambda: v014.NeighborhoodAttention2D(64, 7, 4, kernel_size=7),
        lambda: v014.NeighborhoodAttention2D(64, 7, 4, stride=2),
        lambda: v014.NeighborhoodAttention2D(64, 7),
        lambda: v014.NeighborhoodAttention2D(64, 7, 0),
    ):
        with pytest.raises(TypeError):
            wrong()


# --- helpers ---


@pytest.mark.parametrize("name", configs.__all__)
def test_configs_of_three_tensors_and_of_one(name):
    x = torch.randn(1, 8, 1, 4) if name.endswith("fmha") else torch.randn(1, 8, 8, 1, 4)
    function = getattr(natten, name)
    wanted = function(x)
    assert wanted and function(x, x, x) == function(query=x, key=x, value=x) == wanted
    assert function(input_tensor=x) == wanted and getattr(natten.backends, name) is function
    if "flex" in name:
        assert function(x, x, x, torch_compile=True) == wanted
    with pytest.raises(ValueError, match="`query`"):
        function()


def test_checks_of_both_eras():
    window = ((3, 3), (2, 2), (False, True))
    checks = importlib.import_module("natten.utils.checks")
    for check in (checks.check_all_args, natten.functional.check_all_args):
        assert check(2, 3, 2, (False, True)) == window
        assert check(2, kernel_size=3, dilation=2, is_causal=(False, True)) == window
        assert check(2, 3, 1, 2, (False, True)) == (window[0], (1, 1), *window[1:])
    for check in (v017.utils.checks.check_all_args, v017.utils.check_all_args):
        assert check(2, 3, 2, (False, True)) == window
        with pytest.raises(TypeError):
            check(2, 3, 1, 2, False)
    assert checks.check_input_size_arg(2, 5) == (5, 5)


def test_words_of_the_argument_helpers():
    q = torch.zeros(1, 2, 8, 4, requires_grad=True)
    utils = natten.utils
    attn = utils.make_attn_tensor_from_input(input_tensor=q, attention_dim=5)
    assert attn.shape == (1, 2, 8, 5) and attn.requires_grad
    assert utils.check_additional_keys(input_tensor=q, additional_keys=q[:, :, :2]) == 2
    found = utils.check_additional_values(
        attn_tensor=attn, additional_values=q[:, :, :2], value=q, expected_attn_weights=3
    )
    assert found == 2


def test_fused_attention_is_switched_on_with_kv_parallelism():
    natten.use_fused_na(False)
    natten.use_fused_na()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    natten.NattenContext.reset()
    assert inspect.signature(v017.use_fused_na).parameters["kv_parallel"].default is True


def test_decorators_of_0_17():
    from natten.compat.v017.utils import testing

    for name in ("experimental_ops_are", "torch_compile_is", "torch_flop_count_is"):
        assert getattr(testing, f"skip_if_{name}_not_supported")()(lambda: 5)() == 5
    assert callable(testing.skip_if_triton_is_not_supported()(lambda: 5))
    assert callable(testing.skip_if_fvcore_is_not_available()(lambda: 5))
    assert fna_supports_additional_kv(64)


def test_logger_writes_where_the_environment_says(monkeypatch, tmp_path):
    from natten.utils.log import NattenLogger, get_logger

    package = logging.getLogger("natten")
    before, level = list(package.handlers), package.level
    try:
        for pipe in ("stdout", "stderr", str(tmp_path / "missing" / "log"), str(tmp_path / "log")):
            package.handlers = []
            monkeypatch.setenv("NATTEN_LOG_PIPE", pipe)
            monkeypatch.setenv("NATTEN_LOG_LEVEL", "info")
            logger = NattenLogger("natten.eras")
            assert get_logger("eras") is logger.logger and len(package.handlers) == 1
            logger.debug("not %s", "this")
            logger.info("this %s", "one")
            logger.warning("and this")
            package.handlers[0].close()
    finally:
        package.handlers, package.level = before, level
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["this one", "and this"]
    assert logger.is_safe_to_log()


def test_layouts_of_the_varlen_branch():
    documents = [torch.randn(2, 3, 1, 4), torch.randn(5, 1, 1, 4)]
    layout, packed = natten.VarlenLayout.from_tensor_list(documents)
    assert torch.equal(packed, torch.cat([x.flatten(0, 1) for x in documents]))
    assert (layout.num_docs, layout.max_seqlen, layout.is_uniform) == (2, 6, False)
    assert layout.cu_seqlens.tolist() == [0, 6, 11] and layout.cu_seqlens.dtype == torch.int32
    assert layout.token_layouts.tolist() == [[2, 3], [5, 1]]
    assert layout.token_layouts.dtype == torch.int32 and layout.device == torch.device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(layout.split(packed), documents))
    assert natten.VarlenLayout([(2, 3), (2, 3)]).is_uniform
