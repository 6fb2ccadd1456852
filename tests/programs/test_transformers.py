"""DiNAT of the package transformers, which calls the operators by their old names."""

import math

import pytest
import torch
from helpers import assert_close

import natten
from natten.backends.reference import relative_bias
from natten.neighborhood import window_mask


def dense_qkrpb(query, key, rpb, kernel_size, dilation):
    """Dense scores with -inf outside the windows."""
    space = tuple(query.shape[2:-1])
    rule = natten.Neighborhood.create(2, kernel_size, 1, dilation)
    scores = query.flatten(2, 3) @ key.flatten(2, 3).mT
    scores = scores + relative_bias(rule, space, space, rpb)
    return scores.masked_fill(~window_mask(rule, space, space), -math.inf)


def dense_av(attn, value, kernel_size, dilation):
    """Dense weights times values."""
    return (attn @ value.flatten(2, 3)).view(value.shape)


@pytest.mark.parametrize("name", ["DinatModel", "DinatForImageClassification", "DinatBackbone"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers(name, monkeypatch):
    """Forward and backward equal those of a model with dense masked attention."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.dinat.modeling_dinat")
    config = transformers.DinatConfig(
        embed_dim=8, depths=[2, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1, 2], [1, 2]],
        layer_scale_init_value=0.0, drop_path_rate=0.0, num_labels=3,
    )  # fmt: skip
    model = getattr(transformers, name)(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 3, 48, 56).double()

    def outputs_and_gradients():
        model.zero_grad()
        found = [t for t in model(x).to_tuple() if t is not None]
        found = [t for each in found for t in (each if isinstance(each, tuple) else (each,))]
        sum(t.square().sum() for t in found).backward()
        return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found, grads = outputs_and_gradients()
    calls = []
    monkeypatch.setattr(modeling, "natten2dqkrpb", lambda *a: calls.append(1) or dense_qkrpb(*a))
    monkeypatch.setattr(modeling, "natten2dav", dense_av)
    wanted, wanted_grads = outputs_and_gradients()
    assert len(calls) == 4 and any("rpb" in n for n in grads)
    for a, b in zip(wanted, found):
        assert_close(name, a, b, 1e-9)
    for n, a in wanted_grads.items():
        assert_close(n, a, grads[n], 1e-8)
