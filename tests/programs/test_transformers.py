"""DiNAT of the package transformers: as it is, and with the forward of the page Migration."""

import math
import re

import pytest
import torch
from helpers import ROOT, assert_close

import natten
from natten.backends.reference import relative_bias
from natten.neighborhood import window_mask

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.dinat.modeling_dinat")
MODELS = ["DinatModel", "DinatForImageClassification", "DinatBackbone"]
works_as_it_is = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 54),
    reason="this release mixes up the axes, as the page Migration says",
)


def dense_forward(self, hidden_states, output_attentions=False):
    """DiNAT's attention as dense attention with a mask."""
    space = tuple(hidden_states.shape[1:3])
    query, key, value = (
        layer(hidden_states)
        .flatten(1, 2)
        .unflatten(-1, (self.num_attention_heads, -1))
        .movedim(2, 1)
        for layer in (self.query, self.key, self.value)
    )  # [batch, heads, tokens, head_dim]
    rule = natten.Neighborhood.create(2, self.kernel_size, 1, self.dilation)
    scores = query / math.sqrt(query.shape[-1]) @ key.mT
    scores = scores + relative_bias(rule, space, space, self.rpb)
    scores = scores.masked_fill(~window_mask(rule, space, space), -math.inf)
    out = scores.softmax(-1) @ value
    return (out.movedim(1, 2).flatten(-2).unflatten(1, space),)


def page_forward():
    """The forward that the page has for releases whose own does not work."""
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n([^`]*def dinat_forward.*?)^```$", page, re.M | re.S)
    names = {}
    exec(block, names)
    return names["dinat_forward"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [pytest.param("as it is", marks=works_as_it_is), "page"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dinat(name, way, monkeypatch):
    """Forward and backward equal those of a model with dense masked attention."""
    config = transformers.DinatConfig(
        embed_dim=8, depths=[2, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1, 2], [1, 2]],
        layer_scale_init_value=0.0, drop_path_rate=0.0, num_labels=3,
    )  # fmt: skip
    model = getattr(transformers, name)(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 3, 48, 56).double()
    calls = []

    def outputs_and_gradients(forward):
        count = lambda *a: calls.append(1) or forward(*a)  # noqa: E731
        monkeypatch.setattr(modeling.NeighborhoodAttention, "forward", count)
        model.zero_grad()
        found = [t for t in model(x).to_tuple() if t is not None]
        found = [t for each in found for t in (each if isinstance(each, tuple) else (each,))]
        sum(t.square().sum() for t in found).backward()
        return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    ours = modeling.NeighborhoodAttention.forward if way == "as it is" else page_forward()
    found, grads = outputs_and_gradients(ours)
    wanted, wanted_grads = outputs_and_gradients(dense_forward)
    assert len(calls) == 8 and grads.keys() == wanted_grads.keys()
    assert any("rpb" in n for n in grads)
    for a, b in zip(wanted, found, strict=True):
        assert_close(name, a, b, 1e-9)
    for n, a in wanted_grads.items():
        assert_close(n, a, grads[n], 1e-8)


def test_the_forward_of_the_page_refuses_weights():
    forward = page_forward()
    config = transformers.DinatConfig(attention_probs_dropout_prob=0.5)
    layer = modeling.NeighborhoodAttention(config, 8, 2, 3, 1)
    x = torch.randn(1, 6, 5, 8)
    with pytest.raises(ValueError, match="weights"):
        forward(layer, x)
    layer.eval()
    assert forward(layer, x)[0].shape == x.shape
    with pytest.raises(ValueError, match="weights"):
        forward(layer, x, output_attentions=True)
