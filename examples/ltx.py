"""Decode a video with the LTX-2.5 decoder of diffusers, whole and in parts, with the same numbers.

    python examples/ltx.py

The decoder is small and its weights are random. Whole, it takes diffusers' own path, FlexAttention.
``AttendInParts`` is all that a large one needs, too. It needs diffusers, 0.40 or newer.
"""

import sys

import torch
from torch import Tensor, nn

from natten import na3d


class AttendInParts:
    """Attention of the decoder, of some frames at a time.

    Args:
        frames: of queries in one part. Its keys are all frames that their windows reach.
    """

    def __init__(self, frames: int) -> None:
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.frames = frames

    def __call__(self, attn: nn.Module, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        length, window, project = hidden_states.shape[1], attn.kernel_size[0], attn.to_out[0]
        out = torch.empty_like(hidden_states)
        for begin in range(0, length, self.frames):
            end = min(begin + self.frames, length)
            # The windows of the first and of the last query start here; at both ends they shift.
            low, last = (
                min(max(frame - window // 2, 0), length - window) for frame in (begin, end - 1)
            )
            query, key, value = attn.project_qkv(hidden_states[:, low : last + window])
            part = na3d(
                query[:, begin - low : end - low], key, value,
                kernel_size=attn.kernel_size, scale=1.0, query_offset=(begin - low, 0, 0),
            )  # fmt: skip
            out[:, begin:end] = project(part.flatten(-2))
        return out


def small_decoder() -> nn.Module:
    """A decoder of five stages, as LTX-2.5's, with small windows and few channels."""
    from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel

    return LTX2VideoDiffusionDecoderModel(
        latent_channels=4, decoder_head_dim=8, decoder_stage_channels=(64, 32, 16, 16, 16),
        decoder_stage_depths=(1, 1, 1, 1, 2), decoder_t_emb_dim=16,
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3), (3, 5, 5), (3, 5, 5)),
        decoder_stage5_kernel=(5, 5, 5), decoder_upsample_channel_reductions=(2, 2, 1, 1),
    ).eval()  # fmt: skip


@torch.no_grad()
def decode(model: nn.Module, latents: Tensor) -> Tensor:
    """The video of ``latents``, ``[batch, channels, frames, height, width]``, from fixed noise."""
    return model.decode(latents, generator=torch.Generator().manual_seed(0)).sample


def main() -> int:
    """Decode twice, and compare; the exit code is 1 if the videos differ."""
    torch.manual_seed(0)
    model, latents = small_decoder(), torch.randn(1, 4, 2, 3, 3)
    whole = decode(model, latents)
    model.set_attn_processor(AttendInParts(frames=3))
    parts = decode(model, latents)
    difference = (parts - whole).abs().max().item()
    print(f"video {tuple(whole.shape)}, standard deviation {whole.std():.2f}")
    print(f"largest difference between whole and in parts: {difference:.1e}")
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
