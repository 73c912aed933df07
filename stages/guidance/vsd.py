"""The score of the present renders, trained during a run, for variational score distillation.

VSD (ProlificDreamer, arXiv 2305.16213) replaces the added noise of SDS by eps_phi(z_t; t, y, c), the noise predicted by
a model of the present renders. eps_phi is the prior's network, UNet or transformer, either with low-rank terms on its
attention (LoRA, Hu et al. 2021: y = W x + U D x) or a full copy, and is conditioned on the camera c by a term added to
the time embedding. Both terms begin at zero, so eps_phi begins as the prior under the prompt (and under the camera
conditions of a prior that has any). Denoising of renders trains it (eq. 8).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.cameras import Views
from stages.errors import UserError
from stages.guidance.prior import Prior, TrainablePrior, ViewContext, add_noise
from stages.parallel import join

# diffusers' names: the layers that LoRA changes, and the module of the time embedding with its last layer
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TIME = {"time_embedding": "linear_2", "time_text_embed": "timestep_embedder.linear_2"}
CAMERA_SIZE = 13  # the upper three rows of c2w and the tangent of half the field of view
CAMERA_WIDTH = 64  # hidden width of the camera's embedding


class VsdSettings(BaseModel):
    """Settings of the score of the renders (rule vsd)."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["lora", "copy"] = Field(
        "lora", description="low-rank change of the prior's network, or a copy of it"
    )
    rank: int = Field(4, ge=1, le=256, description="lora: rank of the change of each attention matrix")
    lr: float = Field(1e-4, gt=0, description="Adam learning rate of the score")
    updates: int = Field(1, ge=1, le=20, description="steps of the score for one of the object")
    camera_drop: float = Field(0.1, ge=0, le=1, description="probability that a render's camera is hidden in training")


@dataclass(frozen=True)
class Lesson:
    """The renders of a part of a step, for the score to learn.

    Args:
        x: renders in the prior's space [B, C, h, w].
        embedding: of B prompts.
        camera: [B, 13], see camera_vector.
        generator: on the CPU; draws timesteps, noise and which cameras are dropped.
        context: as in RenderScore.noise.
        share: of the step's views, in (0, 1].
    """

    x: Tensor
    embedding: Tensor
    camera: Tensor
    generator: torch.Generator
    context: ViewContext | None = None
    share: float = 1.0


class RenderScore:
    """eps_phi: predicts the noise on renders and is trained on them. Its whole state is in state_dict().

    Args:
        prior: one that is a TrainablePrior.
        settings: model and training.
        generator: on the CPU; draws the initial weights.
    Raises: UserError for a prior whose network cannot be trained.
    """

    def __init__(self, prior: Prior | TrainablePrior, settings: VsdSettings, generator: torch.Generator) -> None:
        self.prior = prior = check_trainable(prior, settings)
        self.settings, self.device = settings, prior.device
        self._camera: Tensor | None = None  # of the samples still to be processed by a running call
        self._active = False
        self._hooks: list[Any] = []  # in the prior's network, where it is not a copy
        self.parameters: dict[str, nn.Parameter] = {}
        if settings.model == "copy":
            self.unet = copy.deepcopy(prior.unet).eval().requires_grad_(True)
            self.parameters |= {f"unet.{name}": p for name, p in self.unet.named_parameters()}
        else:
            self.unet = prior.unet
            for name, layer in attention_layers(prior.unet).items():
                self._add_low_rank(name, layer, generator)
        self._add_camera(generator)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=settings.lr, betas=(0.9, 0.99), eps=1e-15)

    def _parameter(self, name: str, rows: int, columns: int, std: float, generator: torch.Generator) -> nn.Parameter:
        value = std * torch.randn(rows, columns, generator=generator) if std else torch.zeros(rows, columns)
        self.parameters[name] = nn.Parameter(value.to(self.device))
        return self.parameters[name]

    def _add_low_rank(self, name: str, layer: nn.Linear, generator: torch.Generator) -> None:
        rank = min(self.settings.rank, layer.in_features, layer.out_features)
        down = self._parameter(f"{name}.down", rank, layer.in_features, 1 / rank, generator)
        up = self._parameter(f"{name}.up", layer.out_features, rank, 0.0, generator)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            return output + F.linear(F.linear(inputs[0].float(), down), up).to(output.dtype)

        self._hooks.append(layer.register_forward_hook(hook))

    def _add_camera(self, generator: torch.Generator) -> None:
        time, width = time_embedding(self.unet)
        inner = self._parameter("camera.in", CAMERA_WIDTH, CAMERA_SIZE, 1 / math.sqrt(CAMERA_SIZE), generator)
        outer = self._parameter("camera.out", width, CAMERA_WIDTH, 0.0, generator)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            camera, self._camera = self._camera.tensor_split([output.shape[0]])  # a prior may split the batch
            return output + F.linear(F.silu(F.linear(camera, inner)), outer).to(output.dtype)

        self._hooks.append(time.register_forward_hook(hook))

    def detach(self) -> None:
        """Remove the score's hooks from the prior's network, which is then as before; it cannot predict after."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def noise(
        self, z_t: Tensor, t: Tensor, embedding: Tensor, camera: Tensor, context: ViewContext | None = None
    ) -> Tensor:
        """Return eps_phi [B, C, h, w], with gradients in the score's parameters.

        Args:
            z_t: noisy renders [B, C, h, w].
            t: timesteps [B].
            embedding: of B prompts.
            camera: [B, 13], see camera_vector.
            context: the views for a prior with camera conditions; None where they are not known.
        Not differentiable in: context.
        """
        conditions = self.prior.conditions(embedding, context)
        self._active, self._camera = True, camera
        try:
            return self.prior.noise(self.unet, z_t, t, embedding, **conditions)
        finally:
            self._active, self._camera = False, None

    @torch.no_grad()
    def predict(
        self, z_t: Tensor, t: Tensor, embedding: Tensor, camera: Tensor, context: ViewContext | None = None
    ) -> Tensor:
        """Return :meth:`noise` without gradients."""
        return self.noise(z_t, t, embedding, camera.to(self.device), context)

    def train(self, lessons: Sequence[Lesson], *, split: bool = False) -> float:
        """Take Adam steps on ||eps_phi - eps||^2 (eq. 8) of renders, t uniform over the schedule.

        The error is weighted as by the loss of the prior's prediction type, and summed over a sample, which keeps half
        precision's gradients away from zero; Adam does not depend on the scale.

        Args:
            lessons: of one step of the object: all its views, or this process's.
            split: whether other processes hold the rest of that step's lessons.
        Returns: the share of these lessons in the mean squared error an entry of the last step; minus their share of
            the step's views for one that was not finite and not taken.
        Raises: stages.parallel.RankLost.
        """
        mean = -sum(lesson.share for lesson in lessons)
        for _ in range(self.settings.updates):
            self.optimiser.zero_grad(set_to_none=True)
            losses, errors = zip(*(self._learn(lesson) for lesson in lessons), strict=True)
            totals: dict[str, float | Tensor] = {"loss": torch.stack(losses).sum()}
            if split:
                join(list(self.parameters.values()), totals)
            finite = torch.isfinite(torch.as_tensor(totals["loss"]))
            if finite and all(torch.isfinite(p.grad).all() for p in self.parameters.values() if p.grad is not None):
                self.optimiser.step()
                mean = float(torch.stack(errors).sum())
        self.optimiser.zero_grad(set_to_none=True)
        return mean

    def _learn(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Add a lesson's gradients; returns its share of the loss and of the mean squared error an entry."""
        x, embedding, camera, generator = lesson.x, lesson.embedding, lesson.camera, lesson.generator
        t = torch.randint(0, self.prior.alphas_cumprod.shape[0], (len(x),), generator=generator)
        eps = torch.randn(x.shape, generator=generator).to(x)
        keep = (torch.rand(len(x), generator=generator) >= self.settings.camera_drop).to(camera)
        alpha_bar = self.prior.alphas_cumprod[t]
        with torch.enable_grad(), repeatable_attention(self.device):
            z_t, shown = add_noise(x, eps, alpha_bar), (camera * keep[:, None]).to(x)
            square = (self.noise(z_t, t, embedding, shown, lesson.context) - eps).square().flatten(1)
            weight = prediction_weight(alpha_bar, self.prior.prediction).to(square)
            loss = lesson.share * (weight * square.sum(1)).mean()
        if torch.isfinite(loss):
            loss.backward()
        return loss.detach(), lesson.share * (weight * square.detach().mean(1)).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights and Adam's moments by name; flat."""
        state = {f"weight.{name}": p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state |= {f"adam.{name}.{key}": value.clone() for key, value in self.optimiser.state.get(p, {}).items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict of a score made with the same settings for the same prior."""
        for name, p in self.parameters.items():
            p.copy_(state[f"weight.{name}"])
            if f"adam.{name}.step" in state:
                moments = {key: state[f"adam.{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimiser.state[p] = {k: v if k == "step" else v.to(self.device) for k, v in moments.items()}


def repeatable_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without CUDA's fused attention, whose gradients differ from run to run, where torch is asked to
    be deterministic; the scores of all tokens are then kept for the backward pass."""
    if device.type != "cuda" or torch.get_deterministic_debug_mode() == 0:
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a network's attention, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{end}" for end in ATTENTION))
    }


def camera_vector(views: Views) -> Tensor:
    """Return the camera condition of eps_phi [B, 13]: the upper three rows of c2w and tan(fov / 2)."""
    pose = views.c2w[:, :3].flatten(1).float()
    return torch.cat([pose, torch.tan(torch.deg2rad(views.fov_deg.float()) / 2)[:, None]], 1)


def prediction_weight(alpha_bar: Tensor, prediction: str) -> Tensor:
    """Return the weight [B] that turns a squared error of eps into one of a prediction type's own target.

    At a given z an error of v, of x0 and of a flow's velocity is that of eps times 1 / alpha, sigma / alpha and
    (alpha + sigma) / alpha (see prior.eps_from_prediction); bounded where the schedule has no signal left.
    """
    alpha_bar = alpha_bar.clamp_min(1e-4)
    if prediction == "epsilon":
        return torch.ones_like(alpha_bar)
    if prediction == "v_prediction":
        return 1 / alpha_bar
    if prediction == "sample":
        return (1 - alpha_bar) / alpha_bar
    return (1 + ((1 - alpha_bar) / alpha_bar).sqrt()) ** 2


def time_embedding(network: nn.Module) -> tuple[nn.Module, int] | None:
    """Return the module that embeds the time and the width of that embedding; None where it is not known."""
    for name, last in TIME.items():
        if hasattr(network, name):
            module = getattr(network, name)
            return module, module.get_submodule(last).out_features
    return None


def check_trainable(prior: Prior | TrainablePrior, settings: VsdSettings) -> TrainablePrior:
    """Return the prior itself. Raises: UserError unless its network can be trained for VSD."""
    what = f"rule=vsd does not fit the prior {prior.name}"
    fix = "use a diffusers folder, or another rule (csd and ism work at the same low scale)"
    if not isinstance(prior, TrainablePrior):
        raise UserError(what, "it has no network that could learn the score of the renders", fix)
    network = prior.unet
    if time_embedding(network) is None or not attention_layers(network):
        raise UserError(what, f"its {type(network).__name__} lacks a time embedding or attention to change", fix)
    check_loading(prior.name, settings, prior.offload, next(network.parameters()).dtype)
    return prior


def check_loading(name: str, settings: VsdSettings, offload: str, dtype: torch.dtype) -> None:
    """Raise UserError for a way of loading a prior under which its network cannot be trained.

    Args:
        name: of the prior, for the message.
        settings: of vsd.
        offload: as in DiffusionSettings.
        dtype: of the network.
    """
    what = f"rule=vsd does not fit the prior {name}"
    if offload != "none":
        raise UserError(what, "its weights leave the device after each block", "set prior.diffusion.offload=none")
    if settings.model == "copy" and dtype != torch.float32:
        raise UserError(
            what,
            "rule.model=copy trains every weight of the network, which half precision is too coarse for",
            "set rule.model=lora, or prior.diffusion.dtype=float32",
        )
