"""The protocol every diffusion prior meets, and the algebra that reduces them all to one noise prediction.

Letters: x clean data in the prior's space [B, C, h, w]; eps unit noise; t integer timestep in [0, T);
    alpha_bar = alphas_cumprod[t]; z_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps (variance preserving).
    `eps`, `v` = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x, `sample` x and `flow` eps - x are the four things a
    network may predict.

Any other Gaussian path a_t x + s_t eps fits without new plumbing: dividing by sqrt(a_t^2 + s_t^2) makes it variance
preserving with alpha_bar = a_t^2 / (a_t^2 + s_t^2) and leaves eps as it is. A rectified-flow prior therefore reports
`path_alphas_cumprod(1 - sigma, sigma)`, multiplies z_t by `flow_scale` before it calls its network and turns the
velocity into eps; a DDIM step between two noise levels is then the same as the flow's Euler step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
    """The scene of a batch of images, for priors that read more than pixels: the exact one, and those with a layout.

    Args:
        views: the cameras and lights of the images, B of them.
        backdrop: linear colour [B, H, W, 3] (or [3]) that the stage composited on; None where it is not known.
        shading: the shading of all views; None means plain albedo.
    """

    views: Views
    backdrop: Tensor | None = None
    shading: Shading | None = None

    def __len__(self) -> int:
        return len(self.views)

    def repeat(self, times: int) -> ViewContext:
        """Return the context of the batch repeated `times` over as a whole, as a guidance batch needs it."""
        if times == 1:
            return self
        backdrop = self.backdrop
        if backdrop is not None and backdrop.dim() == 4:
            # Of one colour a view, that colour is repeated, and not each of 512 x 512 pixels.
            flat = backdrop[:, :1, :1] if is_flat(backdrop) else backdrop
            backdrop = flat.repeat(times, 1, 1, 1).expand(-1, *backdrop.shape[1:])
        return ViewContext(self.views.repeat(times), backdrop, self.shading)


def is_flat(backdrop: Tensor) -> bool:
    """Return whether a backdrop [B, H, W, 3] is one colour a view, expanded."""
    return backdrop.stride(1) == backdrop.stride(2) == 0


class Prior(Protocol):
    """A model that predicts the noise in a noisy image of the prompt.

    Protocols of abilities that only some priors have: :class:`FreesText`, :class:`TrainablePrior`,
    :class:`ShapePrior`.
    """

    name: str
    resolution: int  # side in pixels of the images that `encode` works at
    alphas_cumprod: Tensor  # [T] on the CPU, decreasing; float32, or float64 where 1 - alphas_cumprod gets small
    data_range: tuple[float, float] | None  # of x; None where it is not known, as for most latents
    prediction: str  # of PREDICTIONS: what its network predicts
    reads_prompts: bool  # whether its predictions depend on the embeddings
    reads_t_anywhere: bool  # whether it takes timesteps on any device; else it gets them on the CPU

    def embed(self, prompts: list[str]) -> Any:
        """Return the embeddings of prompts: a tensor, or anything that a [N] long tensor indexes along its prompts."""

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return x [B, C, h, w] of sRGB images [B, H, W, 3] in [0, 1], differentiable in them."""

    def decode(self, x: Tensor) -> Tensor:
        """Return sRGB images [B, H, W, 3] in [0, 1] of x [B, C, h, w]."""

    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Any, context: ViewContext) -> Tensor:
        """Return eps [B, C, h, w] for noisy z_t at timesteps t [B] long under B embeddings; no gradient."""


@runtime_checkable
class FreesText(Protocol):
    """A prior whose text encoder takes memory and can go once the prompts are embedded."""

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; embeddings stay."""


@runtime_checkable
class TrainablePrior(Protocol):
    """A prior whose network vsd.py can train the score of the renders on."""

    name: str
    prediction: str  # of PREDICTIONS
    alphas_cumprod: Tensor  # as Prior has it
    unet: nn.Module  # the denoising network, UNet or transformer
    device: torch.device  # where it computes
    offload: str  # "none": its weights stay on the device

    def noise(self, network: nn.Module, z_t: Tensor, t: Tensor, embedding: Any, **conditions: Any) -> Tensor:
        """Return eps [B, C, h, w] by this network or one like it, with gradients in its weights that require them."""

    def conditions(self, embedding: Any, context: ViewContext | None) -> dict[str, Any]:
        """Return the network's further inputs for these views; none where they are not known."""


@runtime_checkable
class ShapePrior(Protocol):
    """A prior that may also know its object in 3D, as one with a layout does."""

    def shape(self, embedding: Any) -> Radiance | None:
        """Return the object of one embedding [1, ...] as density and colour at points; None if it knows none."""


def resized(images: Tensor, side: int) -> Tensor:
    """Return images [B, C, H, W] at [B, C, side, side], bilinear, filtered when shrinking; themselves if of that size.

    On CUDA by two products with small matrices: torch has no repeatable gradient of the filtered form there, and takes
    57 launches, sorted scatters among them, for the other one and its gradient.
    """
    if images.shape[-2:] == (side, side):
        return images
    if images.device.type != "cuda":
        return _interpolated(images, side, side, images.shape[-1] > side)
    filtered = images.shape[-1] > side
    rows, columns = (_weights(n, side, filtered, images.device).to(images.dtype) for n in images.shape[-2:])
    return rows @ images @ columns.mT


def _interpolated(images: Tensor, height: int, width: int, filtered: bool) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=filtered)


@lru_cache(maxsize=16)
def _weights(size: int, side: int, filtered: bool, device: torch.device) -> Tensor:
    """Return the weight of each of `size` samples of a line in each of `side`: [side, size]."""
    return _interpolated(torch.eye(size)[None, None], side, size, filtered)[0, 0].to(device)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values [B] shaped [B, 1, 1, 1], on the device and in the dtype of `like` [B, C, h, w]."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def add_noise(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) eps (DDPM eq. 4); alpha_bar [B]."""
    return per_sample(alpha_bar.sqrt(), x) * x + per_sample((1 - alpha_bar).sqrt(), x) * eps


def eps_from_prediction(prediction: Tensor, z_t: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    """Return the noise of a network's prediction, v as in Salimans & Ho 2022 app. D, flow as in Liu et al. 2022 eq. 1.

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
    """Return the factor from z_t to (1 - s) x + s eps on the rectified path, s = sigma / (alpha + sigma)."""
    return 1 / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())


def x0_from_eps(eps: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the clean data of a noise prediction (DDPM eq. 15); alpha_bar is floored at 1e-6."""
    alpha_bar = alpha_bar.clamp_min(1e-6)
    return (z_t - per_sample((1 - alpha_bar).sqrt(), z_t) * eps) / per_sample(alpha_bar.sqrt(), z_t)


def eps_from_x0(x0: Tensor, z_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noise of a clean-data prediction, eps = (z_t - alpha x0) / sigma; alpha_bar < 1."""
    alpha, sigma = per_sample(alpha_bar.sqrt(), z_t), per_sample((1 - alpha_bar).sqrt(), z_t)
    return (z_t - alpha * x0) / sigma


def path_alphas_cumprod(a: Tensor, s: Tensor) -> Tensor:
    """Return alpha_bar of the Gaussian path a x + s eps scaled to be variance preserving (see module docstring)."""
    return a**2 / (a**2 + s**2)


def scaled_linear_alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Return Stable Diffusion's schedule: sqrt(beta) linear; float32 [steps]."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
