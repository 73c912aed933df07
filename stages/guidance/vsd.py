"""The score of the present renders, learned beside a run: the other half of variational score distillation.

VSD (ProlificDreamer, arXiv 2305.16213) puts eps_phi(z_t; t, y, c), the noise that a model of the present renders sees,
where SDS has the added noise. eps_phi is the prior's own network, UNet or transformer, either with low-rank terms on
its attention (LoRA, Hu et al. 2021: y = W x + U D x) or copied whole, and is told the camera c by a term added to the
embedding of the time. Both terms begin at zero, so eps_phi begins as the prior under the prompt, and under what a
prior with a camera part is told of the views. Plain denoising of renders trains it (eq. 8).
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from stages.cameras import Views
from stages.errors import UserError
from stages.guidance.prior import Prior, TrainablePrior, ViewContext, add_noise

# diffusers' names: what LoRA changes, and where the time is embedded, with the layer that gives the embedding's width
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TIME = {"time_embedding": "linear_2", "time_text_embed": "timestep_embedder.linear_2"}
CAMERA = 13  # numbers that say a camera: the upper three rows of c2w and the tangent of half the field of view
HIDDEN = 64  # width of the camera's embedding


class VsdSettings(BaseModel):
    """How the score of the present renders is learned (rule vsd)."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["lora", "copy"] = Field(
        "lora", description="low-rank change of the prior's network, or a copy of it"
    )
    rank: int = Field(4, ge=1, le=256, description="lora: rank of the change of each attention matrix")
    lr: float = Field(1e-4, gt=0, description="Adam learning rate of the score")
    updates: int = Field(1, ge=1, le=20, description="steps of the score for one of the object")
    camera_drop: float = Field(0.1, ge=0, le=1, description="probability that a render's camera is hidden in training")


class RenderScore:
    """eps_phi: predicts the noise on renders and learns from them. Its whole state is in state_dict().

    Args:
        prior: one that is a TrainablePrior.
        settings: kind and learning. generator: a CPU generator, read for the first weights only.
    Raises: UserError for a prior whose network cannot learn.
    """

    def __init__(self, prior: Prior | TrainablePrior, settings: VsdSettings, generator: torch.Generator) -> None:
        self.prior = prior = check_trainable(prior, settings)
        self.settings, self.device = settings, prior.device
        self._camera: Tensor | None = None  # of the samples that a running call has not seen yet
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

    def _new(self, name: str, rows: int, columns: int, std: float, generator: torch.Generator) -> nn.Parameter:
        value = std * torch.randn(rows, columns, generator=generator) if std else torch.zeros(rows, columns)
        self.parameters[name] = nn.Parameter(value.to(self.device))
        return self.parameters[name]

    def _add_low_rank(self, name: str, layer: nn.Linear, generator: torch.Generator) -> None:
        rank = min(self.settings.rank, layer.in_features, layer.out_features)
        down = self._new(f"{name}.down", rank, layer.in_features, 1 / rank, generator)
        up = self._new(f"{name}.up", layer.out_features, rank, 0.0, generator)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            return output + F.linear(F.linear(inputs[0].float(), down), up).to(output.dtype)

        self._hooks.append(layer.register_forward_hook(hook))

    def _add_camera(self, generator: torch.Generator) -> None:
        time, width = time_module(self.unet)
        inner = self._new("camera.in", HIDDEN, CAMERA, 1 / math.sqrt(CAMERA), generator)
        outer = self._new("camera.out", width, HIDDEN, 0.0, generator)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            camera, self._camera = self._camera.tensor_split([output.shape[0]])  # a prior may split the batch
            return output + F.linear(F.silu(F.linear(camera, inner)), outer).to(output.dtype)

        self._hooks.append(time.register_forward_hook(hook))

    def detach(self) -> None:
        """Take the score out of the prior's network, which is then as it was; the score predicts nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def noise(
        self, z_t: Tensor, t: Tensor, embedding: Tensor, camera: Tensor, context: ViewContext | None = None
    ) -> Tensor:
        """eps_phi [B, C, h, w] of noisy renders z_t at t [B] under embeddings and cameras [B, 13].

        context: what the prior itself is told of the views; None where they are not known. Not differentiable in: it.
        """
        told = self.prior.conditions(embedding, context)
        self._active, self._camera = True, camera
        try:
            return self.prior.noise(self.unet, z_t, t, embedding, **told)
        finally:
            self._active, self._camera = False, None

    @torch.no_grad()
    def predict(
        self, z_t: Tensor, t: Tensor, embedding: Tensor, camera: Tensor, context: ViewContext | None = None
    ) -> Tensor:
        """:meth:`noise` without gradients."""
        return self.noise(z_t, t, embedding, camera.to(self.device), context)

    def train(
        self,
        x: Tensor,
        embedding: Tensor,
        camera: Tensor,
        generator: torch.Generator,
        context: ViewContext | None = None,
    ) -> float:
        """Eq. 8: Adam steps of ||eps_phi - eps||^2 on renders x [B, C, h, w], t uniform over the schedule.

        The error is weighed as the prior's own prediction type weighs it, and summed over a sample, which keeps half
        precision's gradients away from zero; Adam does not see the scale.
        Returns: the mean squared error an entry of the last step; -1 for one that was not finite and not taken.
        """
        s, steps, mean = self.settings, self.prior.alphas_cumprod.shape[0], -1.0
        for _ in range(s.updates):
            t = torch.randint(0, steps, (len(x),), generator=generator)
            eps = torch.randn(x.shape, generator=generator).to(x)
            shown = (torch.rand(len(x), generator=generator) >= s.camera_drop).to(camera)
            alpha_bar = self.prior.alphas_cumprod[t]
            with torch.enable_grad():
                seen = (camera * shown[:, None]).to(x)
                noise = self.noise(add_noise(x, eps, alpha_bar), t, embedding, seen, context)
                square = (noise - eps).square().flatten(1)
                weight = native_weight(alpha_bar, self.prior.prediction).to(square)
                loss = (weight * square.sum(1)).mean()
            self.optimiser.zero_grad(set_to_none=True)
            if not torch.isfinite(loss):
                return -1.0
            loss.backward()
            if all(torch.isfinite(p.grad).all() for p in self.parameters.values() if p.grad is not None):
                self.optimiser.step()
                mean = float((weight * square.detach().mean(1)).mean())
        self.optimiser.zero_grad(set_to_none=True)
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by name; flat."""
        state = {f"weight.{name}": p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state |= {f"adam.{name}.{key}": value.clone() for key, value in self.optimiser.state.get(p, {}).items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict on a score made with the same settings for the same prior."""
        for name, p in self.parameters.items():
            p.copy_(state[f"weight.{name}"])
            if f"adam.{name}.step" in state:
                moments = {key: state[f"adam.{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimiser.state[p] = {k: v if k == "step" else v.to(self.device) for k, v in moments.items()}


def attention_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a UNet's attention, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{end}" for end in ATTENTION))
    }


def camera_numbers(views: Views) -> Tensor:
    """What eps_phi is told of the cameras: [B, 13], c2w's upper three rows and tan(fov / 2)."""
    pose = views.c2w[:, :3].flatten(1).float()
    return torch.cat([pose, torch.tan(torch.deg2rad(views.fov_deg.float()) / 2)[:, None]], 1)


def native_weight(alpha_bar: Tensor, prediction: str) -> Tensor:
    """What turns a squared error of eps into one of the thing that a network predicts: [B].

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


def time_module(network: nn.Module) -> tuple[nn.Module, int] | None:
    """Where a network embeds the time, and the width of that embedding; None where it is not known."""
    for name, last in TIME.items():
        if hasattr(network, name):
            module = getattr(network, name)
            return module, module.get_submodule(last).out_features
    return None


def check_trainable(prior: Prior | TrainablePrior, settings: VsdSettings) -> TrainablePrior:
    """Return the prior itself. Raises: UserError unless VSD can learn a score from it."""
    what = f"rule=vsd does not fit the prior {prior.name}"
    fix = "use a diffusers folder, or another rule (csd and ism work at the same low scale)"
    if not isinstance(prior, TrainablePrior):
        raise UserError(what, "it has no network that could learn the score of the renders", fix)
    network = prior.unet
    if time_module(network) is None or not attention_layers(network):
        raise UserError(what, f"its {type(network).__name__} lacks a time embedding or attention to change", fix)
    check_loading(prior.name, settings, prior.offload, next(network.parameters()).dtype)
    return prior


def check_loading(name: str, settings: VsdSettings, offload: str, dtype: torch.dtype) -> None:
    """Raise UserError for a way of loading the prior called `name` that leaves nothing to learn on.

    Args:
        offload, dtype: of its network, as DiffusionSettings and plan.network_dtype have them.
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
