"""Layers with masks, additional tokens and packed documents, and their attention weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

import natten
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.modules import NeighborhoodAttentionGeneric

pytestmark = pytest.mark.no_cover

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
FUSED = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
SPACE = (7, 6, 5)
NOTHING_DROPPED = 1e-15  # a rate at which the unfused operators run
EVERY_RANK = pytest.mark.parametrize("rank", MODULES)
DROP = pytest.mark.parametrize("drop", [0.0, NOTHING_DROPPED])


def some(*shape: int) -> torch.Tensor:
    """A mask with True and False in every row."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0], mask[..., -1] = True, False
    return mask


def layer_of(rank: int, kernel_size: int = 3, **options) -> NeighborhoodAttentionGeneric:
    return MODULES[rank](8, 2, kernel_size, **{"rel_pos_bias": True} | options).double()


def projected(layer, x):
    """Query, key and value by the rows of the projection."""
    parts = zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3))
    return [F.linear(x, *part).unflatten(-1, (2, 4)) for part in parts]


def parameter_gradients(layer, loss):
    return torch.autograd.grad(loss, list(layer.parameters()))


# --- masks and additional tokens ---


@EVERY_RANK
@DROP
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_and_additional_tokens(rank, drop, batch):
    """They are those of the operator, between the projections."""
    layer = layer_of(rank, attn_drop=drop, stride=2, is_causal=True)
    x, tokens = torch.randn(2, *SPACE[:rank], 8).double(), torch.randn(2, 4, 8).double()
    masks = {"key_mask": some(batch, *SPACE[:rank]), "additional_mask": some(batch, 4)}
    q, k, v = projected(layer, x)
    _, keys, values = projected(layer, tokens)
    expected = FUSED[rank](
        q, k, v, 3, 2, is_causal=True, rpb=layer.rpb, additional_keys=keys,
        additional_values=values, **masks,
    )  # fmt: skip
    expected = layer.proj(expected.flatten(-2))
    found = layer(x, additional_tokens=tokens, **masks)
    assert_close("tokens", expected, found, 1e-12)
    hints = {"additional_keys": keys, "additional_values": values}
    assert_close("projected", expected, layer(x, **masks, **hints), 1e-12)
    grads = (parameter_gradients(layer, out.square().sum()) for out in (expected, found))
    for expected_grad, grad in zip(*grads):
        assert_close("gradient", expected_grad, grad, 1e-12)


@EVERY_RANK
@DROP
def test_masked_tokens_reach_no_other_token(rank, drop):
    layer = layer_of(rank, attn_drop=drop)
    x, mask = torch.randn(2, *SPACE[:rank], 8).double(), some(2, *SPACE[:rank])
    dirty = x.masked_fill(~mask[..., None], math.nan)
    clean, found = layer(x, key_mask=mask), layer(dirty, key_mask=mask)
    assert torch.equal(clean[mask], found[mask]) and clean.isfinite().all()
    assert found[~mask].isnan().any() and layer(dirty)[mask].isnan().any()


@EVERY_RANK
@DROP
def test_masked_additional_tokens_may_hold_nan_in_training(rank, drop):
    layer = layer_of(rank, attn_drop=drop)
    x, tokens = torch.randn(2, *SPACE[:rank], 8).double(), torch.randn(2, 5, 8).double()
    lengths = torch.tensor([5, 2])
    mask = torch.arange(5) < lengths[:, None]
    dirty = tokens.masked_fill(~mask[..., None], math.nan).requires_grad_()
    out = layer(x, additional_tokens=dirty, additional_mask=mask)
    alone = [
        layer(x[i, None], additional_tokens=tokens[i, None, :n]) for i, n in enumerate(lengths)
    ]
    assert_close("out", torch.cat(alone), out, 1e-12)
    expected = parameter_gradients(layer, sum(each.square().sum() for each in alone))
    *found, grad = torch.autograd.grad(out.square().sum(), [*layer.parameters(), dirty])
    for one, other in zip(expected, found):
        assert_close("gradient", one, other, 1e-12)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()


@EVERY_RANK
@DROP
def test_a_token_with_nothing_to_attend(rank, drop):
    """It gets what the last projection makes of 0, and all gradients are numbers."""
    layer = layer_of(rank, attn_drop=drop)
    x = torch.randn(1, *SPACE[:rank], 8).double().requires_grad_()
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    mask[:, :3] = False  # the window of the first tokens
    out = layer(x, key_mask=mask)
    assert torch.equal(out[:, :2], layer.proj.bias.expand_as(out[:, :2]))
    assert (layer.attention_weights(x, key_mask=mask)[:, :, :2] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@EVERY_RANK
def test_masks_that_take_nothing_away(rank):
    layer = layer_of(rank)
    x, tokens = torch.randn(2, *SPACE[:rank], 8).double(), torch.randn(2, 4, 8).double()
    everything = torch.ones(1, *SPACE[:rank]).bool(), torch.ones(2, 4).bool()
    for masks in ({}, {"key_mask": everything[0]}):
        assert_close("mask", layer(x), layer(x, **masks), 1e-12)
    found = layer(
        x, key_mask=everything[0], additional_tokens=tokens, additional_mask=everything[1]
    )
    assert_close("both", layer(x, additional_tokens=tokens), found, 1e-12)


def test_no_additional_tokens():
    layer, x = layer_of(2), torch.randn(2, 5, 6, 8).double()
    none = torch.zeros(2, 0, 8).double()
    assert_close("none", layer(x), layer(x, additional_tokens=none), 1e-12)
    assert layer.attention_weights(x, additional_tokens=none).shape[-1] == 9


def test_truncated_windows_and_a_mask_are_the_image_alone():
    layer = layer_of(2, 5, boundary="truncate")
    images = [torch.randn(h, w, 8).double() for h, w in ((6, 9), (8, 4), (1, 2))]
    batch, mask = torch.randn(3, 8, 9, 8).double(), torch.zeros(3, 8, 9).bool()
    for i, image in enumerate(images):
        height, width, _ = image.shape
        batch[i, :height, :width], mask[i, :height, :width] = image, True
    found = layer(batch, key_mask=mask)
    for image, own, own_mask in zip(images, found, mask):
        assert_close("image", layer(image[None]).flatten(0, 2), own[own_mask], 1e-12)


# --- padding ---


@EVERY_RANK
@DROP
def test_masked_padding(rank, drop):
    """A window as long as the padded axis attends everything, and so does one that is clamped."""
    options = {"kernel_size": 7, "attn_drop": drop, "rel_pos_bias": False}
    padded = layer_of(rank, oversize="pad", pad_mask=True, **options)
    clamped = layer_of(rank, oversize="clamp", **options)
    clamped.load_state_dict(padded.state_dict())
    space = (5, 9, 3)[:rank]
    x, mask = torch.randn(2, *space, 8).double(), some(1, *space)
    assert_close("no mask", clamped(x), padded(x), 1e-12)
    assert_close("mask", clamped(x, key_mask=mask), padded(x, key_mask=mask), 1e-12)
    weights = padded.attention_weights(x, key_mask=mask)
    assert weights.shape == (2, 2, *space, 7**rank)
    assert_close("weights", torch.ones(2, 2, *space).double(), weights.sum(-1), 1e-12)


@EVERY_RANK
def test_padding_is_attended_by_default(rank):
    layer = layer_of(rank, oversize="pad")
    x = torch.randn(2, 2, *SPACE[1:rank], 8).double()
    more = F.pad(x, (0, 0, *(0, 0) * (rank - 1), 0, 1))
    mask = some(2, *more.shape[1:-1])
    mask[:, 2] = True
    assert_close(
        "padding", layer(more, key_mask=mask)[:, :2], layer(x, key_mask=mask[:, :2]), 1e-12
    )
    masked = layer_of(rank, oversize="pad", pad_mask=True)
    masked.load_state_dict(layer.state_dict())
    assert (masked(x) - layer(x)).abs().max() > 1e-3
    mask[:, 2] = False
    assert_close(
        "masked", layer(more, key_mask=mask)[:, :2], masked(x, key_mask=mask[:, :2]), 1e-12
    )


# --- weights ---


@EVERY_RANK
@pytest.mark.parametrize("boundary", ["shift", "truncate", "circular"])
def test_attention_weights(rank, boundary):
    """The sum of values with these weights is the layer's output; nothing is dropped out."""
    layer = layer_of(rank, boundary=boundary, attn_drop=0.5)
    x, tokens = torch.randn(2, *SPACE[:rank], 8).double(), torch.randn(2, 4, 8).double()
    masks = {"key_mask": some(2, *SPACE[:rank]), "additional_mask": some(1, 4)}
    weights = layer.attention_weights(x, additional_tokens=tokens, **masks)
    assert weights.shape == (2, 2, *SPACE[:rank], 3**rank + 4)
    _, _, v = (t.movedim(-2, 1) for t in projected(layer, x))
    _, _, values = (t.transpose(1, 2) for t in projected(layer, tokens))
    av = getattr(natten, f"na{rank}d_av")
    out = av(weights, v, 3, additional_values=values, boundary=boundary)
    out = layer.proj(out.movedim(1, -2).flatten(-2))
    assert_close("out", layer.eval()(x, additional_tokens=tokens, **masks), out, 1e-12)

    rule = layer.neighborhood
    attended = rule.in_slots(masks["key_mask"], SPACE[:rank])
    if rule.has_empty_slots:
        attended = attended & rule.attended_slots(SPACE[:rank])
    slots, others = weights.movedim(1, 0).split([3**rank, 4], -1)
    assert ((slots > 0) == attended).all()
    assert ((others > 0) == masks["additional_mask"].view(1, 1, *(1,) * rank, 4)).all()


def test_attention_weights_of_clamped_windows():
    layer = layer_of(2, 5, dilation=2, oversize="clamp")
    x = torch.randn(1, 4, 12, 8).double()
    fitted = layer.neighborhood.fitted((4, 12), layer.keep)
    assert (
        layer.attention_weights(x).shape == (1, 2, 4, 12, fitted.window_tokens) == (1, 2, 4, 12, 10)
    )


# --- packed documents ---


@EVERY_RANK
@DROP
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_packed_documents_are_as_alone(rank, drop, bias, more):
    layer = layer_of(rank, dilation=2, attn_drop=drop, rel_pos_bias=bias, oversize="clamp")
    shapes = [(9, 4, 7)[:rank], (0, 3, 3)[:rank], (2, 7, 3)[:rank]]
    layout = natten.VarlenLayout(shapes)
    x, tokens = torch.randn(layout.total_tokens, 8).double(), torch.randn(3, 2, 8).double()
    mask, token_mask = some(layout.total_tokens), some(3, 2)
    given = {"key_mask": mask, "additional_tokens": tokens, "additional_mask": token_mask}
    out = layer(x, layout=layout, **(given if more else {}))
    alone = []
    for i, (own, own_mask) in enumerate(zip(layout.unpack(x), layout.unpack(mask))):
        one = slice(i, i + 1)
        options = {
            "key_mask": own_mask[None],
            "additional_tokens": tokens[one],
            "additional_mask": token_mask[one],
        }
        if own.numel():
            alone.append(layer(own[None], **(options if more else {})).flatten(0, -2))
    alone = torch.cat(alone)
    assert_close("out", alone, out, 1e-12)
    grads = (parameter_gradients(layer, each.square().sum()) for each in (alone, out))
    for one, other in zip(*grads):
        assert_close("gradient", one, other, 1e-12)


@DROP
def test_no_document_has_tokens(drop):
    layer, layout = layer_of(2, attn_drop=drop), natten.VarlenLayout([(0, 3), (2, 0)])
    assert layer(torch.zeros(0, 8).double(), layout=layout).shape == (0, 8)


def test_one_mask_for_the_additional_tokens_of_all_documents():
    layer, layout = layer_of(1), natten.VarlenLayout([5, 4])
    x, tokens, mask = torch.randn(9, 8).double(), torch.randn(2, 3, 8).double(), some(1, 3)
    found = layer(x, layout=layout, additional_tokens=tokens, additional_mask=mask)
    kept = layer(x, layout=layout, additional_tokens=tokens[:, mask[0]])
    assert_close("mask", kept, found, 1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"`kernel_size` times `dilation` must not exceed.*\(4,\)"),
        ({"oversize": "pad"}, r"`kernel_size` times `dilation` must not exceed.*\(4,\)"),
        ({"oversize": "clamp", "keep": "window"}, r'keep="window", got one of \(4,\)'),
    ],
)
def test_documents_that_do_not_fit(options, message):
    layer = layer_of(1, 3, dilation=2, **options)
    fits = natten.VarlenLayout([6, 0, 8])
    assert layer(torch.zeros(14, 8).double(), layout=fits).shape == (14, 8)
    with pytest.raises(natten.ArgumentError, match=message):
        layer(torch.zeros(10, 8).double(), layout=natten.VarlenLayout([6, 4]))


# --- transforms, dtypes, compilation ---


@pytest.mark.parametrize("packed", [False, True])
@DROP
def test_compiled(packed, drop):
    layer = layer_of(2, attn_drop=drop, oversize="pad", pad_mask=True).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layout = natten.VarlenLayout([(5, 4), (3, 6)])
    if packed:
        x, options = torch.randn(38, 8), {"layout": layout, "key_mask": some(38)}
    else:
        x, options = torch.randn(2, 2, 6, 8), {"key_mask": some(2, 2, 6)}
    options |= {"additional_tokens": torch.randn(2, 3, 8), "additional_mask": some(2, 3)}
    results = []
    for each in (layer, compiled):
        out = each(x, **options)
        results.append((out, *parameter_gradients(layer, out.square().sum())))
    for one, other in zip(*results):
        assert_close("compiled", one, other, 1e-5)


def test_exported():
    layer = layer_of(2).float()
    x = torch.randn(2, 5, 6, 8)
    options = {
        "key_mask": some(1, 5, 6),
        "additional_tokens": torch.randn(2, 3, 8),
        "additional_mask": some(2, 3),
    }
    program = torch.export.export(layer, (x,), options)
    plain = program.run_decompositions(natten.export.decompositions())
    assert not [node for node in plain.graph.nodes if "natten" in str(node.target)]
    for each in (program, plain):
        assert_close("exported", layer(x, **options), each.module()(x, **options), 1e-6)


def test_compiled_for_all_sizes():
    layer = layer_of(1).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5):
        x, tokens = torch.randn(n, n + 4, 8), torch.randn(n, n, 8)
        masks = {"key_mask": some(n, n + 4), "additional_mask": some(1, n)}
        given = {"additional_tokens": tokens, **masks}
        assert_close("dense", layer(x, **given), compiled(x, **given), 1e-5)
        layout = natten.VarlenLayout([n + 4] * n)
        packed = {"key_mask": masks["key_mask"].flatten(), "layout": layout}
        assert_close(
            "packed",
            layer(x, **given),
            compiled(x.flatten(0, 1), **given | packed).view(x.shape),
            1e-5,
        )


def test_derivatives_and_maps():
    layer = NeighborhoodAttention1D(2, 1, 3).double()
    x, tokens = torch.randn(2, 5, 2).double(), torch.randn(2, 2, 2).double()
    mask, token_mask = some(2, 5), some(2, 2)

    def run(x, tokens, mask=mask, token_mask=token_mask):
        return layer(x, key_mask=mask, additional_tokens=tokens, additional_mask=token_mask)

    inputs = x.requires_grad_(), tokens.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)
    each = [t[:, None] for t in (x, tokens, mask, token_mask)]
    assert_close("vmap", run(x, tokens), torch.vmap(run)(*each)[:, 0], 1e-12)


def test_a_symbolic_trace_holds_one_node():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer_of(1)

        def forward(self, x, mask, tokens):
            return self.layer(x, key_mask=mask, additional_tokens=tokens)

    model = Model()
    given = torch.randn(2, 6, 8).double(), some(2, 6), torch.randn(2, 3, 8).double()
    assert torch.equal(torch.fx.symbolic_trace(model)(*given), model(*given))


@DROP
def test_autocast(drop):
    layer = layer_of(1, attn_drop=drop).float()
    x, tokens, mask = torch.randn(2, 9, 8), torch.randn(2, 3, 8), some(2, 9)
    expected = layer(x, additional_tokens=tokens, key_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (tokens, tokens.bfloat16()):
            found = layer(x, additional_tokens=given, key_mask=mask)
            assert found.dtype == torch.bfloat16
            assert_close("autocast", expected, found.float(), 3e-2)


def test_options_are_no_part_of_a_checkpoint():
    plain, other = layer_of(2), layer_of(2, oversize="pad", pad_mask=True)
    assert plain.state_dict().keys() == other.state_dict().keys()


# --- errors ---

X, TOKENS = torch.zeros(2, 5, 6, 8).double(), torch.zeros(2, 3, 8).double()
LAYOUT = natten.VarlenLayout([(4, 5), (3, 3)])
KEYS = torch.zeros(2, 3, 2, 4).double()

WRONG = {
    "mask of numbers": ({"key_mask": torch.ones(2, 5, 6)}, "`key_mask` must be.*bool.*float32"),
    "mask in a list": ({"key_mask": [True]}, "`key_mask` must be a tensor of torch.bool.*list"),
    "mask of two axes": ({"key_mask": some(2, 5)}, r"or 1, \*space\] = \(2, 5, 6\) or \(1, 5, 6\)"),
    "mask of another batch": ({"key_mask": some(3, 5, 6)}, r"got \(3, 5, 6\)"),
    "mask elsewhere": ({"key_mask": some(2, 5, 6).to("meta")}, "must be on the device of `x`"),
    "tokens in a list": ({"additional_tokens": [1]}, "`additional_tokens` must be a torch.Tensor"),
    "tokens of another width": ({"additional_tokens": TOKENS[..., :7]}, r"embed_dim 8, got"),
    "tokens of another batch": (
        {"additional_tokens": TOKENS[:1]},
        r"with batch 2 and.*\(1, 3, 8\)",
    ),
    "tokens with heads": ({"additional_tokens": KEYS}, r"must be \[batch, n, embed_dim\]"),
    "tokens of another dtype": ({"additional_tokens": TOKENS.float()}, "have the dtype of `x`"),
    "tokens elsewhere": ({"additional_tokens": TOKENS.to("meta")}, "on the device of `x`"),
    "tokens and keys": (
        {"additional_tokens": TOKENS, "additional_keys": KEYS},
        "`additional_tokens`, which the layer projects, and `additional_keys` exclude each other",
    ),
    "mask of nothing": (
        {"additional_mask": some(2, 3)},
        "needs `additional_tokens`, which is None",
    ),
    "mask of fewer": (
        {"additional_tokens": TOKENS, "additional_mask": some(2, 2)},
        r"`additional_mask` must be \[batch or 1, n\] = \(2, 3\) or \(1, 3\), got \(2, 2\)",
    ),
    "mask of fewer keys": (
        {"additional_keys": KEYS, "additional_values": KEYS, "additional_mask": some(2, 2)},
        r"`additional_mask` must be \[batch or 1, num_additional\]",
    ),
    "misspelt": ({"keymask": None}, "`keymask` is no argument.*did you mean `key_mask`"),
    "of torch": ({"key_padding_mask": None}, "use `key_mask`, which is the opposite"),
    "of transformers": ({"attention_mask": None}, "use `key_mask`"),
    "weights": ({"need_weights": True}, "`attention_weights` of the layer"),
}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong, drop):
    arguments, message = WRONG[wrong]
    layer = layer_of(2, attn_drop=drop)
    for function in (layer, layer.attention_weights):
        with pytest.raises(natten.ArgumentError, match=message):
            function(X, **arguments)


WRONG_DOCUMENTS = {
    "shapes": (
        {"layout": [(4, 5), (3, 3)]},
        "`layout` must be a natten.VarlenLayout of rank 2.*list",
    ),
    "rank": ({"layout": natten.VarlenLayout([20, 9])}, r"of rank 2, got VarlenLayout\(\[\(20,\)"),
    "tokens": ({"layout": natten.VarlenLayout([(5, 5)])}, r"`x` must be packed, \[25 tokens"),
    "mask": ({"key_mask": some(1, 29)}, r"`key_mask` must be \[tokens\] = \(29,\)"),
    "batch": ({"additional_tokens": torch.zeros(1, 3, 8).double()}, "with batch 2 and embed_dim 8"),
    "keys": ({"additional_keys": KEYS}, "`additional_keys` is not for packed documents"),
    "backend": ({"backend": "no such"}, "`backend` must be None or one of"),
    "tiles": ({"q_tile_shape": (1,)}, "`q_tile_shape` must be None or 2 positive integers"),
}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("wrong", WRONG_DOCUMENTS)
def test_wrong_arguments_of_documents(wrong, drop):
    arguments, message = WRONG_DOCUMENTS[wrong]
    with pytest.raises(natten.ArgumentError, match=message):
        layer_of(2, attn_drop=drop)(torch.zeros(29, 8).double(), **{"layout": LAYOUT} | arguments)


def test_other_errors():
    layer, x = layer_of(2), torch.zeros(29, 8).double()
    with pytest.raises(natten.ArgumentError, match=r"`x` must be \[tokens, 8\] with `layout`"):
        layer(x[:, :7], layout=LAYOUT)
    with pytest.raises(natten.ArgumentError, match=r"`x` must be a torch\.Tensor"):
        layer([1.0], layout=LAYOUT)
    with pytest.raises(natten.ArgumentError, match="takes one document at a time"):
        layer.attention_weights(x, layout=LAYOUT)
    with pytest.raises(natten.ArgumentError, match="`pad_mask` must be a bool, got"):
        layer_of(2, oversize="pad", pad_mask="yes")
