"""Names, switches and stand-ins of older eras, and the FLOP counters."""

import importlib
import inspect
import sys
import warnings

import pytest
import torch
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.compat import v014, v015, v017
from natten.context import AutotunerContext, MemoryUsagePreference, NattenContext
from natten.legacy import switches


@pytest.fixture(autouse=True)
def _reset():
    yield
    NattenContext.reset()
    AutotunerContext.reset()
    torch.use_deterministic_algorithms(False)


# --- old operators ---


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_old_operators(rank):
    space = (7, 6, 8)[:rank]
    q, rpb = torch.randn(1, 2, *space, 4), torch.randn(2, *(5,) * rank)
    F = natten.functional
    window = (3, 2) if rank < 3 else (3, 3, 2, 2)
    new_qk, new_av = getattr(F, f"na{rank}d_qk"), getattr(F, f"na{rank}d_av")
    with pytest.warns(DeprecationWarning, match=f"natten{rank}dqkrpb is an old name") as caught:
        attn = getattr(F, f"natten{rank}dqkrpb")(q, q, rpb, *window)
    assert caught[0].filename == __file__
    assert torch.equal(attn, new_qk(q, q, 3, 2, rpb=rpb))
    with pytest.warns(DeprecationWarning):
        assert torch.equal(getattr(F, f"natten{rank}dqk")(q, q, *window), new_qk(q, q, 3, 2))
    with pytest.warns(DeprecationWarning):
        plain = getattr(F, f"natten{rank}dqkrpb")(q, q, None, *window)
    assert torch.equal(plain, new_qk(q, q, 3, 2))
    with pytest.warns(DeprecationWarning):
        assert torch.equal(getattr(F, f"natten{rank}dav")(attn, q, *window), new_av(attn, q, 3, 2))


def test_old_import_paths():
    """The modules in which 0.14 to 0.21 had names can be imported."""
    names = {
        "natten": "NeighborhoodAttention HAS_LIBNATTEN use_fna is_fna_enabled has_fna "
        "get_configs_for_cutlass_fna get_bwd_configs_for_cutlass_hopper_fmha",
        "natten.functional": "na1d_qk_with_bias natten2dqkrpb natten2dav has_half has_bfloat "
        "has_gemm enable_tf32 disable_gemm_na check_all_args get_num_na_weights",
        "natten.context": "NattenContext AutotunerContext MemoryUsagePreference use_fused_na",
        "natten.types": "Dimension2DTypeOrDed CausalArg3DTypeOrDed KernelSchedule NoneType",
        "natten.utils": "check_all_args check_additional_keys get_num_na_weights get_device_cc "
        "make_attn_tensor_from_input log",
        "natten.utils.checks": "check_all_args",
        "natten.utils.testing": "skip_if_cuda_is_not_supported skip_if_fna_is_not_supported "
        "skip_if_libnatten_is_not_supported supports_bfloat16",
        "natten.utils.varlen": "generate_varlen_parameters",
        "natten.utils.log": "get_logger",
        "natten.flops": "get_flops add_natten_handle qk_2d_rpb_flop av_2d_flop fna_flop_count",
        "natten.natten1d": "NeighborhoodAttention1D",
        "natten.natten2d": "NeighborhoodAttention2D NeighborhoodAttention",
        "natten.natten3d": "NeighborhoodAttention3D",
        "natten.nested": "na1d_qk_nested na3d_av_nested",
        "natten.ops": "na2d_qk_nested",
        "natten.experimental": "na1d na2d na3d",
        "natten.token_permute": "token_permute_operation token_unpermute_operation",
        "natten.backends": "choose_backend choose_fmha_backend get_compatible_backends "
        "get_compatible_fmha_backends",
        "natten.modules": "NeighborhoodAttentionGeneric",
    }
    for module, wanted in names.items():
        found = importlib.import_module(module)
        for name in wanted.split():
            assert hasattr(found, name), f"{module}.{name}"
    for module in ("natten", "natten.functional", "natten.backends", "natten.nested"):
        with pytest.raises(AttributeError, match="nothing_of_that_name"):
            importlib.import_module(module).nothing_of_that_name  # noqa: B018


def test_everything_public_is_documented():
    for name in natten.__all__:
        thing = getattr(natten, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert thing.__doc__, name


def test_importing_and_calling_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in [m for m in sys.modules if m.startswith("natten.compat")]:
            if hasattr(sys.modules[name], "__file__"):
                importlib.reload(sys.modules[name])
        natten.use_fused_na(True)
        natten.has_cuda()


# --- switches ---


def test_feature_queries_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    queries = [name for name in switches.__all__ if name.startswith("has_")]
    assert len(queries) == 9
    assert not any(getattr(natten, name)() for name in queries)
    assert natten.HAS_LIBNATTEN is False and natten.utils.get_device_cc() == 0


def test_feature_queries_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    assert natten.has_cuda() and natten.has_fused_na() and natten.has_fp64_gemm(0)
    assert natten.HAS_LIBNATTEN is True and natten.utils.get_device_cc(0) == 90


@pytest.mark.parametrize(
    ("setter", "getter"),
    [
        (natten.use_tiled_na, natten.is_tiled_na_enabled),
        (natten.use_gemm_na, natten.is_gemm_na_enabled),
        (natten.use_fused_na, natten.is_fna_enabled),
        (natten.use_kv_parallelism_in_fused_na, natten.is_kv_parallelism_in_fused_na_enabled),
        (natten.use_deterministic_algorithms, natten.are_deterministic_algorithms_enabled),
        (natten.allow_flex_compile, natten.is_flex_compile_allowed),
        (natten.allow_flex_compile_backprop, natten.is_flex_compile_backprop_allowed),
    ],
)
def test_getters_say_what_setters_were_told(setter, getter):
    for mode in (True, False, True):
        assert setter(mode) is None
        assert getter() is mode


def test_enable_and_disable_return_the_flag():
    assert natten.enable_tiled_na() and not natten.disable_tiled_na()
    assert natten.enable_gemm_na() and not natten.disable_gemm_na()
    assert not natten.disable_tf32() and natten.enable_tf32() is natten.has_tf32_gemm()


def test_memory_preference():
    assert natten.is_memory_usage_default()
    natten.set_memory_usage_preference("strict")
    assert natten.is_memory_usage_strict()
    assert natten.get_memory_usage_preference() is MemoryUsagePreference.Strict
    natten.set_memory_usage_preference("unrestricted")
    assert natten.is_memory_usage_unrestricted()
    with pytest.raises(ValueError, match="`pref` must be one of"):
        natten.set_memory_usage_preference("other")


def test_autotuner():
    assert not natten.is_autotuner_enabled()
    natten.use_autotuner(True, None, True, steps_forward=7)
    assert natten.is_autotuner_enabled() and natten.is_autotuner_enabled_for_forward()
    assert natten.is_autotuner_thorough_for_forward() and AutotunerContext.steps_forward == 7
    assert not natten.is_autotuner_enabled_for_backward()
    natten.use_autotuner(False, False, steps_forward=9)  # returns at once
    assert not natten.is_autotuner_enabled() and AutotunerContext.steps_forward == 7
    natten.disable_autotuner()
    assert not AutotunerContext.thorough_mode_forward
    for wrong in ({"forward_pass": 1}, {"steps_forward": "3"}, {"thorough_mode_backward": 0}):
        with pytest.raises(ValueError, match=r"must be None or a"):
            natten.use_autotuner(**wrong)


def test_determinism_forbids():
    natten.use_deterministic_algorithms(True)
    for call in (
        lambda: natten.use_autotuner(True),
        lambda: natten.use_kv_parallelism_in_fused_na(True),
        lambda: natten.use_fused_na(True, kv_parallel=True),
    ):
        with pytest.raises(RuntimeError, match="not deterministic"):
            call()
    natten.use_fused_na(False, kv_parallel=True)
    natten.use_deterministic_algorithms(False)
    torch.use_deterministic_algorithms(True)
    with pytest.warns(UserWarning, match="left off"):
        natten.use_fused_na(True, kv_parallel=True)
    assert natten.is_fused_na_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()


def test_flex_switches():
    natten.use_flex_attention()
    assert switches.should_use_flex_attention() and not switches.should_force_flex_attention()
    natten.use_fused_na(True, use_flex_attention=True, force_flex_attention=True)
    assert switches.should_force_flex_attention()
    natten.force_flex_attention()
    natten.allow_flex_compile(True, backprop=True)
    natten.disable_flex_compile_backprop()
    assert natten.is_flex_compile_allowed() and not natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()


# --- helpers ---


def test_argument_helpers():
    assert natten.utils.check_all_args(2, 3, None, (True, False)) == ((3, 3), (1, 1), (True, False))
    checks = importlib.import_module("natten.utils.checks")
    assert checks.check_all_args(1, 5, 2, 3, True) == ((5,), (2,), (3,), (True,))
    assert checks.check_stride_arg(2, (1, 2)) == (1, 2)
    assert natten.utils.check_kernel_size_arg(3, 3) == (3, 3, 3)
    assert natten.utils.check_dilation_arg(1, [2]) == (2,)
    assert natten.utils.check_causal_arg(1, None) == (False,)
    assert natten.utils.get_num_na_weights((3, 5)) == 15
    for check in (natten.utils.check_tiling_config, natten.utils.check_backward_tiling_config):
        assert check(1, ((64,), (64,))) == ((64,), (64,))
    q = torch.zeros(1, 2, 8, 4)
    checks.check_args_against_input(q.movedim(1, 2), 3, 1, 2, False)
    assert natten.utils.check_additional_keys(q, q[:, :, :3]) == 3
    assert natten.utils.check_additional_values(torch.zeros(1, 2, 8, 5), q[:, :, :2], q, 3) == 2
    assert natten.utils.make_attn_tensor_from_input(q, 3).shape == (1, 2, 8, 3)
    for wrong in (
        lambda: natten.utils.get_num_na_weights(3),
        lambda: natten.utils.check_additional_keys(q, q[:, :1]),
        lambda: natten.utils.check_additional_values(q, None, q, 3),
        lambda: checks.check_args_against_input(q, 9, 1, 1, False),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_varlen_parameters():
    from natten.utils.varlen import generate_varlen_parameters

    q = torch.zeros(1, 8, 1, 2)
    assert generate_varlen_parameters(q, q, q) == (None, None, 0, 0)
    lengths = torch.tensor([3, 5])
    sums, _, longest, _ = generate_varlen_parameters(q, q, q, lengths, lengths)
    assert sums.tolist() == [0, 3, 8] and longest == 5 and sums.dtype == torch.int32
    for wrong in ((lengths, None), (lengths, lengths[:1]), (lengths, lengths + 1)):
        with pytest.raises(ValueError):
            generate_varlen_parameters(q, q, q, *wrong)


def test_configs_are_accepted():
    x = torch.randn(1, 8, 8, 1, 4)
    for name in natten.legacy.configs.__all__:
        fmha = name.endswith("fmha")
        configs = getattr(natten, name)(x[:, 0] if fmha else x)
        assert configs
        scheduled = "hopper" in name and "bwd" not in name
        (q_tile, kv_tile), schedule = configs[0] if scheduled else (configs[0], None)
        if fmha:
            options = {"q_tile_size": q_tile, "kv_tile_size": kv_tile}
            natten.attention(x[:, 0], x[:, 0], x[:, 0], kernel_schedule=schedule, **options)
        else:
            options = {"q_tile_shape": q_tile, "kv_tile_shape": kv_tile}
            natten.na2d(x, x, x, 3, kernel_schedule=schedule, **options)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("space", "tile", "dilation"),
    [((13,), (4,), None), ((8, 8), (4, 2), (2, 2)), ((5, 6, 7), (2, 4, 2), (1, 2, 3))],
)
def test_token_permutation(space, tile, dilation, flip):
    from natten.token_permute import token_permute_operation, token_unpermute_operation

    x = torch.randn(2, *space, 3, 4)
    permuted, layout, inner = token_permute_operation(x, tile, dilation, flip)
    groups = torch.Size(dilation or (1,)).numel()
    assert permuted.shape == (2 * groups, torch.Size(inner).numel(), 3, 4) and layout == space
    back = token_unpermute_operation(permuted, layout, tile, dilation, flip)
    assert torch.equal(back, x)
    if space == (8, 8) and not flip:  # the first tile of the first dilation group
        assert torch.equal(permuted[0, :8], x[0, :8:2, :4:2].reshape(8, 3, 4))
    with pytest.raises(ValueError, match="`tile_shape`"):
        token_permute_operation(x, (1,) * 4)


def test_log_level(monkeypatch):
    import logging

    from natten.utils.log import get_logger

    before = logging.getLogger("natten").level
    monkeypatch.setenv("NATTEN_LOG_LEVEL", "error")
    assert get_logger("x").name == "natten.x"
    assert logging.getLogger("natten").level == logging.ERROR
    logging.getLogger("natten").setLevel(before)


def test_skip_decorators():
    from natten.utils import testing

    for name in dir(testing):
        if name.startswith("skip_if"):
            assert callable(getattr(testing, name)()(lambda: None))
    assert testing.supports_float16(torch.device("cpu"))
    assert testing.supports_bfloat16(torch.device("cpu"))


# --- stand-ins ---


def test_v017_order():
    q = torch.randn(1, 9, 8, 2, 4)
    rpb = torch.randn(2, 5, 5)
    found = v017.functional.na2d(q, q, q, 3, 2, (True, False), rpb, 0.3)
    assert torch.equal(found, natten.na2d(q, q, q, 3, 1, 2, (True, False), 0.3, rpb=rpb))
    assert torch.equal(v017.functional.na2d(q, q, q, 3, None), natten.na2d(q, q, q, 3))
    module = v017.NeighborhoodAttention2D(8, 2, 3, 2, True, True, False, 0.5, 0.1, 0.2)
    assert module.dilation == (2, 2) and module.is_causal == (True, True)
    assert module.rpb is not None and module.qkv.bias is None
    assert (module.scale, module.attn_drop_rate, module.proj_drop.p) == (0.5, 0.1, 0.2)
    assert v017.functional.na1d_qk is natten.na1d_qk
    for name in ("use_fused_na", "has_half", "context", "utils", "types", "flops", "natten2d"):
        assert hasattr(v017, name)
    assert v017.NeighborhoodAttention1D(8, 2, 3)(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    assert v017.NeighborhoodAttention3D(8, 2, 3)(torch.randn(1, 3, 4, 5, 8)).shape[1:4] == (3, 4, 5)


def test_v015_order():
    module = v015.NeighborhoodAttention2D(8, 2, 3, 2)
    assert module.rpb is not None and module.dilation == (2, 2)
    assert module(torch.randn(1, 4, 5, 8)).shape == (1, 4, 5, 8)  # padded to 6 inside
    deep = v015.NeighborhoodAttention3D(8, 2, 5, 3, 1, 2, False)
    assert (deep.kernel_size, deep.dilation, deep.rpb) == ((3, 5, 5), (2, 1, 1), None)
    assert hasattr(v015, "has_half") and hasattr(v015.functional, "natten3dqkrpb")
    assert v015.natten2d.NeighborhoodAttention2D is v015.NeighborhoodAttention2D


def test_v014_order():
    module = v014.NeighborhoodAttention2D(8, 3, 2)
    assert module.kernel_size == (3, 3) and module.num_heads == 2 and module.rpb is not None
    keyword = v014.NeighborhoodAttention2D(dim=8, kernel_size=3, num_heads=2, dilation=2)
    assert keyword(torch.randn(1, 4, 4, 8)).shape == (1, 4, 4, 8)
    q, rpb = torch.randn(1, 2, 7, 8, 4), torch.randn(2, 5, 5)
    F = v014.functional
    attn = natten.na2d_qk(q, q, 3, 2, rpb=rpb)
    assert torch.equal(F.natten2dqkrpb(q, q, rpb, 2), attn)
    assert torch.equal(F.natten2dqkrpb(q, q, rpb, 3, 2), attn)
    assert torch.equal(F.natten2dav(attn, q, 2), natten.na2d_av(attn, q, 3, 2))
    assert torch.equal(F.natten2dav(attn, q, 3, 2), F.natten2dav(attn, q, 2))
    x, bias = torch.randn(1, 2, 9, 4), torch.randn(2, 5)
    assert torch.equal(F.natten1dqkrpb(x, x, bias, 1), natten.na1d_qk(x, x, 3, rpb=bias))
    with pytest.raises(ValueError, match="needed when rpb is None"):
        F.natten2dqkrpb(q, q, None, 2)


# --- flops ---


def products(batch, heads, tokens, dim, attended):
    return 2 * batch * heads * tokens * dim * attended


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_torch_flop_counter(rank):
    space, kernel = (8, 7, 6)[:rank], (3, 5, 2)[:rank]
    tokens, window = torch.Size(space).numel(), torch.Size(kernel).numel()
    q, k = torch.randn(2, *space, 4, 8), torch.randn(2, *space, 2, 8)
    v, additional = torch.randn(2, *space, 2, 5), torch.randn(2, 3, 2, 8)
    q.requires_grad_()
    fused = getattr(natten, f"na{rank}d")
    with FlopCounterMode(display=False) as counter:
        out = fused(
            q, k, v, kernel, additional_keys=additional, additional_values=additional[..., :5]
        )
    pairs = products(2, 4, tokens, 1, window + 3)
    assert counter.get_total_flops() == pairs * (8 + 5)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == pairs * (3 * 8 + 2 * 5)
    x = torch.randn(2, 4, *space, 8)
    with FlopCounterMode(display=False) as counter:
        attn = getattr(natten, f"na{rank}d_qk")(x, x, kernel)
        getattr(natten, f"na{rank}d_av")(attn, x, kernel)
    assert counter.get_total_flops() == 2 * products(2, 4, tokens, 8, window)


def test_torch_flop_counter_of_dense_attention():
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 7, 2, 4)
    with FlopCounterMode(display=False) as counter:
        natten.attention(q, k, k)
    assert counter.get_total_flops() == 2 * products(1, 2, 5, 4, 7)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (NeighborhoodAttention1D(16, 2, 5), (1, 16, 16)),
        (NeighborhoodAttention2D(16, 2, 5), (1, 8, 8, 16)),
        (NeighborhoodAttention2D(16, 2, 5, rel_pos_bias=True), (1, 8, 8, 16)),
        (NeighborhoodAttention3D(16, 2, 3, attn_drop=0.1), (1, 4, 6, 6, 16)),
    ],
)
def test_fvcore(module, shape):
    """These are 0.17.1's counts of these modules, less the term that 0.17.4 dropped."""
    pytest.importorskip("fvcore")
    tokens, window = torch.Size(shape[1:-1]).numel(), torch.Size(module.kernel_size).numel()
    linear = tokens * 16 * 16 * 4
    attention = 2 * tokens * 16 * window
    for mode in (True, False):
        found = natten.flops.get_flops(module.train(mode), torch.randn(shape), True)
        assert found == linear + attention


def test_fvcore_numbers_of_0_17():
    """api-0.17: 19104 for NA1D(16, 2, 5) on [1, 16, 16], with B * heads * N * K added."""
    pytest.importorskip("fvcore")
    found = natten.flops.get_flops(NeighborhoodAttention1D(16, 2, 5), torch.randn(1, 16, 16), True)
    assert found + 2 * 16 * 5 == 19104


def test_0_17_4_counters():
    shape, window = (1, 4, 5, 2, 8), ((3, 3), 1, False)
    count = natten.flops.fna_flop_count(shape, shape, shape, *window, True)
    assert count == 2 * natten.flops.fna_flop_count(shape, shape, shape, *window, True, True)
    assert count == 4 * 20 * 2 * 8 * 9
    assert natten.flops.na_qk_flop_count(shape, shape, *window, True) == count // 2
    assert natten.flops.na_av_flop_count(None, shape, *window, True) == count // 2
    with pytest.raises(ValueError, match="`k_shape`"):
        natten.flops.na_qk_flop_count(shape, shape[1:], *window, True)
    with pytest.raises(ValueError, match="4 to 6 dimensions"):
        natten.flops.na_av_flop_count(None, (1, 2), *window, True)


def test_unfused_equals_0_17_by_hand():
    """In 0.17's qk, slots start at the window's start, and no scale is applied."""
    q = torch.arange(5.0).view(1, 1, 5, 1)
    attn = natten.functional.natten1dqk(q, q, 3, 1)
    assert_close(
        "qk", torch.tensor([[0.0, 6.0, 9.0]]), attn[0, 0, 3:4] - torch.tensor([6.0, 3.0, 3.0]), 1
    )
    assert attn[0, 0, 4].tolist() == [8.0, 12.0, 16.0]
