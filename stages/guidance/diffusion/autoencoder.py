"""The image half of a latent prior: AutoencoderKL or AutoencoderTiny, differentiable in the images.

The gradient may be taken at a smaller side than the pictures'. What comes back is still the latents E(y) of the whole
picture y, but of the gradient

    U E(D y),    D: y made smaller (filtered), U: latents enlarged to their full side, both bilinear,

that is D^T J(D y)^T U^T g in place of J(y)^T g, J being the Jacobian of the encoder's mean. The whole picture then
passes forwards alone and keeps nothing for the backward pass. Stable Diffusion's encoder at 512 pixels, a view and
step, counted: 2.26 tera multiply-adds and 1.46 GB in half precision; at 256 of them 1.66 and 0.37, at 128 1.26 and
0.31. It is sound as far as an encoder gives a smaller picture the latents that the larger one has, shrunk: where the
picture is smooth, as an enlarged render of 64 pixels is. What D removes gets no gradient, and U^T averages the noise of
neighbouring latents. With the pocket autoencoder at 256 of 512 pixels the gradient towards another picture (a robot's
towards a castle's) has a cosine of 0.975 with the whole one for a render of 64 pixels, 0.85 for one of 512; at 128
pixels 0.91 and 0.77. White noise as g comes through at 0.62 of its size. So it is for coarse stages; a fine stage would
lose what it is there for.

Latents x = (z - shift_factor - mean) * scaling_factor / std, z what the encoder gives; shift_factor (Stable Diffusion
3, Flux), mean and std (some SDXL descendants) are 0, 0 and 1 where the config leaves them out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.guidance.prior import resized

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder:
    """A frozen autoencoder. All tensors are [B, C, h, w]; pictures are in [-1, 1].

    Args:
        module: the diffusers module, in evaluation mode.
        sample: latents drawn from the posterior, not its mean.
        one_by_one: encode and decode pictures one at a time and recompute each in the backward pass.
        gradient_side: side in pixels at which gradients are taken, a multiple of `factor`; None for the pictures' own.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        sample: bool = True,
        one_by_one: bool = False,
        gradient_side: int | None = None,
    ) -> None:
        self.module, self.sample, self.one_by_one, self.gradient_side = module, sample, one_by_one, gradient_side
        config = module.config
        self.channels: int = config.latent_channels
        self.factor = downsampling(config)
        self.scale: float = config.scaling_factor
        self._dtype = next(module.parameters()).dtype
        channels_first = (1, -1, 1, 1)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        shift = getattr(config, "shift_factor", None) or 0.0
        self._shift = shift if mean is None else shift + torch.tensor(mean).reshape(channels_first)
        self._std = 1.0 if std is None else torch.tensor(std).reshape(channels_first)

    def encode(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Encode pictures to latents float32, differentiable in them; the posterior's noise is the generator's.

        At a `gradient_side` smaller than the pictures' the gradient is the module docstring's.
        """
        side = self.gradient_side
        if side is None or side >= pictures.shape[-1] or not (pictures.requires_grad and torch.is_grad_enabled()):
            return self._encode(pictures, generator if self.sample else None)
        with torch.no_grad():
            latents = self._encode(pictures, generator if self.sample else None)
        followed = resized(self._encode(resized(pictures, side), None), latents.shape[-1])
        return latents + (followed - followed.detach())

    def _encode(self, pictures: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents drawn from the posterior, without a generator its mean."""
        with no_autocast(pictures.device):
            mean, std = self._each(self._posterior, pictures.to(self._dtype))
        latents = mean.float()
        if generator is not None and std.numel():
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            latents = latents + std.float() * noise
        return (latents - _on(self._shift, latents)) * self.scale / _on(self._std, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pictures float32, not clamped."""
        z = latents * _on(self._std, latents) / self.scale + _on(self._shift, latents)
        with no_autocast(latents.device):
            (pictures,) = self._each(lambda part: (self.module.decode(part).sample,), z.to(self._dtype))
        return pictures.float()

    def _posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents; the latter empty for an encoder that has none."""
        output = self.module.encode(pictures)
        if hasattr(output, "latents"):
            return output.latents, output.latents.new_empty(output.latents.shape[0], 0)
        return output.latent_dist.mean, output.latent_dist.std

    def _each(self, call, batch: Tensor) -> tuple[Tensor, ...]:
        if not self.one_by_one:
            return call(batch)
        parts = [checkpoint(call, batch[k : k + 1], use_reentrant=False) for k in range(len(batch))]
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


def downsampling(config) -> int:
    """Return the pixels along a latent's side: 2 to the number of halvings."""
    blocks = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return 2 ** (len(blocks) - 1)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off: networks run in the precision they were loaded in."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like) if isinstance(value, Tensor) else value
