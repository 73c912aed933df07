"""The protocol every diffusion prior meets, and the algebra that reduces them all to one noise prediction.

Letters: x clean data in the prior's space [B, C, h, w]; eps unit noise; t integer timestep in [0, T);
    alpha_bar = alphas_cumprod[t]; z_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps (variance preserving).
    `eps`, `v` = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x, `sample` x and `flow` eps - x are the four things a
    network may predict.

Any other Gaussian path a_t x + s_t eps fits without new plumbing: dividing by sqrt(a_t^2 + s_t^2) makes it variance
preserving with alpha_bar = a_t^2 / (a_t^2 + s_t^2) and leaves eps as it is. A rectified-flow prior therefore reports
`path_alphas_cumprod(1 - sigma, sigma)`, multiplies z_t by `flow_scale` before it asks its network and turns the
velocity into eps; a DDIM step between two noise levels is then the same as the flow's Euler step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.cameras import Views

if TYPE_CHECKING:
    from stages.render.shade import Shading
    from stages.render.volume import Radiance

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class ViewContext:
    """What a prior may know of the images besides their pixels; of learned ones only those with a camera layout ask.

    views: the cameras and lights of the images, B of them.
    background: linear colour [B, H, W, 3] (or [3]) that the stage composited on; None when it does not say.
    shading: the shading the stage used for all views; None means plain albedo.
    """

    views: Views
    background: Tensor | None = None
    shading: Shading | None = None

    def __len__(self) -> int:
        return len(self.views)

    def repeat(self, times: int) -> ViewContext:
        """The context of a batch repeated `times` over as a whole, as a guidance batch needs it."""
        if times == 1:
            return self
        index = torch.arange(len(self.views)).repeat(times)
        background = self.background
        if background is not None and background.dim() == 4:
            # Of one colour a view, that colour is repeated, and not each of 512 x 512 pixels.
            flat = background[:, :1, :1] if is_flat(background) else background
            background = flat.index_select(0, index.to(background.device)).expand(-1, *background.shape[1:])
        return ViewContext(self.views[index], background, self.shading)


def is_flat(background: Tensor) -> bool:
    """Whether a background [B, H, W, 3] is one colour a view, expanded."""
    return background.stride(1) == background.stride(2) == 0


class Prior(Protocol):
    """Something that predicts the noise in a noisy image of the prompt.

    What only some priors can do has protocols of its own: :class:`FreesText`, :class:`TrainablePrior`,
    :class:`ShapePrior`.
    """

    name: str
    resolution: int  # side in pixels of the images that `encode` works at
    alphas_cumprod: Tensor  # [T] on the CPU, decreasing; float32, or float64 where 1 - alphas_cumprod gets small
    data_range: tuple[float, float] | None  # of x; None where it is not known, as for most latents
    prediction: str  # of PREDICTIONS: what its predictions of the noise are made from
    reads_prompts: bool  # whether its predictions depend on the embeddings

    def embed(self, prompts: list[str]) -> Any:
        """Embeddings of prompts: a tensor, or anything that a [N] long tensor indexes along its prompts."""

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """sRGB images [B, H, W, 3] in [0, 1] to x [B, C, h, w], differentiable in the images."""

    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] to sRGB images [B, H, W, 3] in [0, 1]."""

    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Any, context: ViewContext) -> Tensor:
        """eps [B, C, h, w] for noisy z_t at timesteps t [B] long under B embeddings; no gradient."""


@runtime_checkable
class FreesText(Protocol):
    """A prior whose text encoder takes memory and can go once the prompts are embedded."""

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; what was embedded stays."""


@runtime_checkable
class TrainablePrior(Protocol):
    """A prior on whose network the score of the renders can be learned, and all that vsd.py asks of it."""

    name: str
    prediction: str  # of PREDICTIONS
    alphas_cumprod: Tensor  # as Prior has it
    unet: nn.Module  # the denoising network, UNet or transformer
    device: torch.device  # where it computes
    offload: str  # "none": its weights stay on the device

    def noise(self, network: nn.Module, z_t: Tensor, t: Tensor, embedding: Any, **conditions: Any) -> Tensor:
        """eps [B, C, h, w] by this network or one like it, with gradients in those of its weights that ask for them."""

    def conditions(self, embedding: Any, context: ViewContext | None) -> dict[str, Any]:
        """What the network is given beyond the embedding for these views; nothing where they are not known."""


@runtime_checkable
class ShapePrior(Protocol):
    """A prior that may also know in 3D what it draws, as one with a layout does."""

    def shape(self, embedding: Any) -> Radiance | None:
        """The object that one embedding [1, ...] names, as density and colour at points; None if it knows none."""


def resized(images: Tensor, side: int) -> Tensor:
    """Images [B, C, H, W] at [B, C, side, side], bilinear, filtered when shrinking; themselves if of that size."""
    if images.shape[-2:] == (side, side):
        return images
    shrinks = images.shape[-1] > side
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=shrinks)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped [B, 1, 1, 1] on the device and in the dtype of `like` [B, C, h, w]."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def add_noise(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps (DDPM eq. 4); alpha_bar [B]."""
    return per_sample(alpha_bar.sqrt(), x) * x + per_sample((1 - alpha_bar).sqrt(), x) * eps


def eps_from_prediction(prediction: Tensor, z_t: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    """Noise from what a network predicts; v as in Salimans & Ho 2022 app. D, flow as in Liu et al. 2022 eq. 1.

    Exact at alpha_bar = 0 (zero terminal signal-to-noise) for v, sample and flow predictions.
    """
    if kind == "epsilon":
        return prediction
    alpha, sigma = per_sample(alpha_bar.sqrt(), z_t), per_sample((1 - alpha_bar).sqrt(), z_t)
    if kind == "v_prediction":
        return alpha * prediction + sigma * z_t
    if kind == "sample":
        return (z_t - alpha * prediction) / sigma.clamp_min(1e-6)
    if kind == "flow_prediction":  # on the path x_s = (1 - s) x + s eps: eps = x_s + (1 - s) (eps - x)
        return (z_t + alpha * prediction) / (alpha + sigma)
    raise ValueError(f"prediction type: wanted one of {', '.join(PREDICTIONS)}, got {kind!r}")


def flow_scale(alpha_bar: Tensor) -> Tensor:
    """What takes z_t to the rectified path: (1 - s) x + s eps = flow_scale z_t with s = sigma / (alpha + sigma)."""
    return 1 / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())


def x0_from_eps(eps: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Clean data of a noise prediction (DDPM eq. 15); alpha_bar is floored at 1e-6, where x0 is not determined."""
    alpha_bar = alpha_bar.clamp_min(1e-6)
    return (z_t - per_sample((1 - alpha_bar).sqrt(), z_t) * eps) / per_sample(alpha_bar.sqrt(), z_t)


def eps_from_x0(x0: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise of a clean-data prediction: eps = (z_t - alpha x0) / sigma; needs alpha_bar < 1."""
    alpha, sigma = per_sample(alpha_bar.sqrt(), z_t), per_sample((1 - alpha_bar).sqrt(), z_t)
    return (z_t - alpha * x0) / sigma


def path_alphas_cumprod(a: Tensor, s: Tensor) -> Tensor:
    """alpha_bar of the Gaussian path a x + s eps after scaling it to be variance preserving (see module docstring)."""
    return a**2 / (a**2 + s**2)


def scaled_linear_alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Stable Diffusion's schedule: sqrt(beta) linear; float32 [steps]."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
