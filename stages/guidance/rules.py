"""Distillation rules: pure functions from noise predictions to the residual that a step pushes against.

Letters: eps_y, eps_0, eps_n predictions under the prompt, the empty (or negative) prompt and a negative prompt;
    eps the added noise; s the guidance scale; all [B, C, h, w]. The gradient on x is w_t * residual. x0_hat is the
    clean x that a noise prediction stands for.

The scale is s in eps_0 + s (eps_y - eps_0), as in diffusers; the papers' (1 + w) eps_y - w eps_0 has s = 1 + w,
so DreamFusion's w = 100 is s = 101 and s = 1 is the plain conditional model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.guidance.prior import eps_from_x0, per_sample, x0_from_eps


def classifier_free_guidance(eps_y: Tensor, eps_0: Tensor | None, scale: float) -> Tensor:
    """Return eps_0 + s (eps_y - eps_0), Ho & Salimans 2022 eq. 6 with s = 1 + w; eps_0 is not needed at s = 1."""
    if eps_0 is None:
        if scale != 1:
            raise ValueError(f"scale: wanted 1 without an unconditional prediction, got {scale}")
        return eps_y
    return eps_0 + scale * (eps_y - eps_0)


def rescale_cfg(eps_hat: Tensor, eps_y: Tensor, z_t: Tensor, alpha_bar: Tensor, phi: float) -> Tensor:
    """Return eps_hat with the standard deviation of its x0 set to that of the conditional x0, to a share phi in [0, 1].

    Lin et al. 2023 (arXiv 2305.08891) eq. 15-16, applied to x0 as in MVDream; phi = 0 changes nothing.
    """
    if phi == 0:
        return eps_hat
    x0, x0_y = x0_from_eps(eps_hat, z_t, alpha_bar), x0_from_eps(eps_y, z_t, alpha_bar)
    axes = tuple(range(1, x0.dim()))
    ratio = x0_y.std(axes, keepdim=True) / x0.std(axes, keepdim=True).clamp_min(1e-6)
    return eps_from_x0(x0 * (phi * ratio + 1 - phi), z_t, alpha_bar)


def strength(scale: float, phi: float) -> float:
    """Return the expected size of a rule's residual in units of eps_y - eps_0, what the prompt makes of the prediction.

    Guidance makes it s. A rescale by phi (see :func:`rescaled`) multiplies x0_hat by phi r + 1 - phi, and r, the ratio
    of the standard deviations, falls as 1 / s: s (1 - phi) + phi is left. What a rule adds beside, as the noise of sds,
    is small against a scale that is worth the name. On the pocket prior sds at scale 100 and phi 0.5 pushes 6.8 to 8.1
    times as hard as csd at 7.5, whatever t is; this says 6.7.

    Args:
        scale: s >= 0.
        phi: the rescale, in [0, 1].
    """
    return scale * (1 - phi) + phi


def perp_neg(eps_y: Tensor, eps_0: Tensor, negatives: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return eps_y moved away from negatives: eps_y + sum_i w_i (d_i - its part along d_y), d = eps - eps_0.

    Only the part of a negative perpendicular to the prompt is used, so the prompt is never weakened. It replaces eps_y
    in any rule: classifier-free guidance then multiplies all of it by s.
    Source: Perp-Neg (Armandpour et al., arXiv 2304.04968), summed as in threestudio.

    Args:
        eps_y: prediction under the prompt [B, C, h, w].
        eps_0: prediction that differences are taken from, like eps_y.
        negatives: predictions under the negatives, like eps_y.
        weights: of each negative, [B] <= 0.
    """
    d_y = eps_y - eps_0
    axes = tuple(range(1, d_y.dim()))
    squared = d_y.square().sum(axes, keepdim=True).clamp_min(1e-12)
    total = eps_y
    for eps_i, weight in zip(negatives, weights, strict=True):
        d_i = eps_i - eps_0
        along = (d_i * d_y).sum(axes, keepdim=True) / squared
        total = total + per_sample(weight, d_y) * (d_i - along * d_y)
    return total


def dynamic_threshold(x0: Tensor, data_range: tuple[float, float], quantile: float) -> Tensor:
    """Return x0 [B, C, h, w] under Imagen's dynamic thresholding (arXiv 2205.11487 sec. 2.3), each sample by itself.

    In units where the range is [-1, 1]: clamp to [-s, s] and divide by s = max(1, quantile of |x0|), so that a sample
    within its range is left alone. Static thresholding (ibid.) is the clamp with s = 1.
    """
    centre, half = (data_range[0] + data_range[1]) / 2, (data_range[1] - data_range[0]) / 2
    u = (x0 - centre) / half
    ends = per_sample(u.abs().flatten(1).quantile(quantile, dim=1).clamp_min(1), u)
    return centre + half * u.clamp(-ends, ends) / ends


def replace_backdrop(x0: Tensor, backdrop: Tensor, width: float) -> Tensor:
    """Return x0 [B, C, h, w] with its backdrop replaced by the one its render was composited on, of the same shape.

    At high noise a prior can only guess what is behind the object, and the difference between its guess and the true
    backdrop is a residual that distillation can remove with fog alone. What x0 shows at its rim, the median of a frame
    of three pixels, is its guess; every pixel moves to the true backdrop by exp(-(d / width)^2), d the largest distance
    of its channels from the guess. No paper's: measured on the pocket prior, see configs/default.yaml.
    """
    rims = (x0[..., :3, :], x0[..., -3:, :], x0[..., :3], x0[..., -3:])
    frame = torch.cat([rim.flatten(2) for rim in rims], 2)
    guess = frame.sort(2).values[..., (frame.shape[2] - 1) // 2, None, None]  # torch's median is not repeatable on CUDA
    share = torch.exp(-(((x0 - guess).abs().amax(1, keepdim=True) / width) ** 2))
    return x0 + share * (backdrop - x0)


def sds(eps_hat: Tensor, eps: Tensor) -> Tensor:
    """Return eps_hat - eps: score distillation sampling, DreamFusion eq. 3."""
    return eps_hat - eps


def sjc(eps_hat: Tensor) -> Tensor:
    """Return -(D - z)/sigma = eps_hat: score Jacobian chaining (arXiv 2212.00774 eq. 14), without variance reduction.

    Its variance-reduced form -(D - x)/sigma is :func:`sds` exactly.
    """
    return eps_hat


def csd(eps_y: Tensor, eps_0: Tensor, eps_n: Tensor | None = None, negative: float = 0.0) -> Tensor:
    """Return eps_y - eps_0: classifier score distillation (arXiv 2310.19415 eq. 8 and 12), without the added noise.

    With a negative prompt the reference moves from eps_0 to eps_n as `negative` goes from 0 to 1.
    """
    if eps_n is None or negative == 0:
        return eps_y - eps_0
    return eps_y - negative * eps_n - (1 - negative) * eps_0


def nfsd(eps_y: Tensor, eps_0: Tensor, eps_n: Tensor, scale: float, low_noise: Tensor) -> Tensor:
    """Return delta_D + s delta_C: noise-free score distillation (arXiv 2310.17590 eq. 8).

    delta_C = eps_y - eps_0; delta_D = eps_0 where `low_noise` [B] bool (t < 200 of Stable Diffusion's 1000, or what is
    as noisy on another schedule), else eps_0 - eps_n.
    """
    delta_d = torch.where(per_sample(low_noise, eps_0).bool(), eps_0, eps_0 - eps_n)
    return delta_d + scale * (eps_y - eps_0)


def vsd(eps_hat: Tensor, eps_phi: Tensor) -> Tensor:
    """Return eps_hat - eps_phi: variational score distillation (ProlificDreamer, arXiv 2305.16213 eq. 9).

    eps_phi(z_t; t, y, c) predicts the noise on the present renders. Where they are one fixed image it is eps itself and
    the rule is SDS; where they are distributed as the prior the residual is zero at every point, not on average.
    """
    return eps_hat - eps_phi


def image_term(images: Tensor, images_hat: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return alpha / sigma (x - decoded x0_hat): HiFA's image-space residual (arXiv 2305.18766 sec. 3.1).

    The factor, threestudio's, gives it the units of a noise residual: in a pixel space it is the SDS residual again.

    Args:
        images: [B, H, W, 3] in [-1, 1].
        images_hat: decoded x0_hat, like images.
        alpha_bar: [B].
    """
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt()
    return per_sample(ratio, images) * (images - images_hat)


def ism(eps_hat_t: Tensor, eps_0_s: Tensor) -> Tensor:
    """Return eps_hat(z_t, y) - eps_0(z_s), s < t inverted: interval score matching (arXiv 2311.11284 eq. 14)."""
    return eps_hat_t - eps_0_s


def ddim_step(z: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """Move z by deterministic DDIM (Song et al. 2021 eq. 12, eta 0) between noise levels [B], in either direction."""
    x0 = x0_from_eps(eps, z, alpha_bar)
    return per_sample(alpha_bar_next.sqrt(), z) * x0 + per_sample((1 - alpha_bar_next).sqrt(), z) * eps


def clip_gradient(gradient: Tensor, limit: float | None) -> Tensor:
    """Return the gradient with each entry clamped to [-limit, limit], D-SDS (arXiv 2303.15413); None: unchanged."""
    return gradient if limit is None else gradient.clamp(-limit, limit)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar whose gradient in x is `gradient` / B: 0.5 ||x - stopgrad(x - gradient)||^2 summed over C, h, w.

    Its value is half the squared length of the gradient and says nothing about progress.
    """
    target = (x - gradient).detach()
    return 0.5 * ((x - target) ** 2).sum() / x.shape[0]
