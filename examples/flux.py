"""Windows for the image tokens of a FLUX of diffusers, while text stays dense.

    python examples/flux.py

The model is small and its weights are random. It is compared with diffusers' own attention, dense
with a mask. ``WindowedAttention`` is all that a large model needs, too; if it was trained with
dense attention, it has to be fine-tuned. It needs diffusers.
"""

import sys

import torch
from torch import Tensor, nn

from natten import Neighborhood, attention, na2d
from natten.neighborhood import window_mask

Sizes = int | tuple[int, int]


class WindowedAttention:
    """Attention of FLUX in which an image token attends a window of the image and all of the text.

    Text tokens attend everything. They come first, as FLUX has them.

    Args:
        size: height and width of the image, in tokens.
        kernel_size: of the window, which shifts at borders.
        stride: of the window.
    """

    def __init__(self, size: tuple[int, int], kernel_size: Sizes, stride: Sizes = 1) -> None:
        self.size, self.kernel_size, self.stride = size, kernel_size, stride

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None, image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        tokens = self.size[0] * self.size[1]
        if attention_mask is not None:
            raise ValueError("WindowedAttention takes no attention_mask")
        if encoder_hidden_states is not None and hidden_states.shape[1] != tokens:
            raise ValueError(
                f"size is {self.size}, but the image has {hidden_states.shape[1]} tokens"
            )

        def heads(x: Tensor, *layers: nn.Module) -> list[Tensor]:
            return [layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers]

        q, k, v = heads(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:  # text has projections of its own
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_q, text_k, text_v = heads(encoder_hidden_states, *layers)
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = (torch.cat(x, 1) for x in ((text_q, q), (text_k, k), (text_v, v)))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))

        text = q.shape[1] - tokens  # the number of text tokens
        image = (x[:, text:].unflatten(1, self.size) for x in (q, k, v))
        image = na2d(
            *image, self.kernel_size, self.stride,
            additional_keys=k[:, :text], additional_values=v[:, :text],
        )  # fmt: skip
        words = attention(q[:, :text], k, v).flatten(-2)
        image = image.flatten(1, 2).flatten(-2)
        if encoder_hidden_states is None:
            return torch.cat([words, image], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(words)


def dense_mask(size: tuple[int, int], kernel_size: Sizes, stride: Sizes, text: int) -> Tensor:
    """What ``WindowedAttention`` lets attend, as a mask ``[1, 1, tokens, tokens]``."""
    tokens = text + size[0] * size[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    mask[text:, text:] = window_mask(Neighborhood.create(2, kernel_size, stride), size, size)
    return mask[None, None]


def small_flux() -> nn.Module:
    """A FLUX with one block of each kind."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip


def random_inputs(size: tuple[int, int], text: int) -> dict[str, Tensor]:
    """Arguments of the model for an image of ``size`` tokens and ``text`` tokens of text."""
    height, width = size
    position = torch.zeros(height, width, 3)
    position[..., 1], position[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return {
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": position.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def main() -> int:
    """Compare windows with the mask; the exit code is 1 if outputs differ."""
    torch.manual_seed(0)
    size, text, window = (12, 16), 5, (5, 2)
    model, inputs = small_flux(), random_inputs(size, text)
    mask = dense_mask(size, *window, text)
    dense = model(**inputs).sample
    masked = model(**inputs, joint_attention_kwargs={"attention_mask": mask}).sample
    model.set_attn_processor(WindowedAttention(size, *window))
    difference = (model(**inputs).sample - masked).abs().max().item()
    print(f"pairs of tokens that attend each other: {mask.float().mean():.0%}")
    print(f"largest difference from dense attention: {(dense - masked).abs().max():.1e}")
    print(f"largest difference from dense attention with the mask: {difference:.1e}")
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
