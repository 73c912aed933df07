"""The call of each family's denoising network, with the arguments of its diffusers pipeline.

Every call has z [B, C, h, w] in the prior's space as the network was trained to see it, the timestep [B] in the
network's own units, tokens [B, L, D] and pooled [B, P] of the prompts (P = 0 for families without), and returns the
network's prediction [B, C, h, w], whatever it predicts.

A conditioned prior (ControlNet residuals, an IP-Adapter's image embedding) has its way in: the keyword arguments of
`Denoiser.__call__` go to the network unchanged, and a prior has the views when it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a folder's configs.

    Args:
        resolution: side of the pictures in pixels.
        latents: side of x.
        channels: of x.
        patch: pixels or latents a side that a UNet sees as channels.
        image_tokens: that a transformer makes of one picture.
        pooled_width: numbers in the pooled text embedding.
    """

    resolution: int
    latents: int
    channels: int
    patch: int
    image_tokens: int
    pooled_width: int


# (network, z, timestep, tokens, pooled, denoiser, further conditions) -> prediction
Call = Callable[..., Tensor]


Replay = tuple[Callable[[], object], Tensor]  # what computes anew in place, and where the result then lies


def cuda_graph(run: Callable[[], Tensor]) -> Replay:
    """Record the kernels of a call as a CUDA graph, after three calls in which libraries make their choices."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class StaticCalls:
    """A function of tensors that is recorded once for every shape of its inputs, and replayed on buffers that stay.

    Args:
        function: of tensors, or of tuples of tensors; returns one tensor and copies nothing from the host.
        record: from a call of it to what replays that call; cuda_graph.
    """

    def __init__(self, function: Callable[..., Tensor], record: Callable[[Callable[[], Tensor]], Replay]) -> None:
        self._function, self._record = function, record
        self._recorded: dict[object, tuple[list[Tensor], Callable[[], object], Tensor]] = {}

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the function's value in a tensor of its own."""
        leaves, spec = tree_flatten((inputs, named))
        key = (str(spec), tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key not in self._recorded:
            buffers = [leaf.clone() for leaf in leaves]
            places, names = tree_unflatten(buffers, spec)
            self._recorded[key] = (buffers, *self._record(lambda: self._function(*places, **names)))
        buffers, replay, result = self._recorded[key]
        for buffer, leaf in zip(buffers, leaves, strict=True):
            buffer.copy_(leaf)
        replay()
        return result.clone()


class Denoiser:
    """A network with its family's calling convention; every network of the same shape may be called in its place.

    Args:
        network: the module, in evaluation mode.
        call: its family's function below.
        geometry: the sizes that the folder's configs give.
        device: where it runs.
        dtype: its precision.
        embedded_guidance: the guidance input of a distilled Flux.
        compile: as in DiffusionSettings; a graph is recorded on CUDA alone.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        call: Call,
        geometry: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        embedded_guidance: float,
        compile: str = "none",
    ) -> None:
        self.network, self.call, self.device, self.dtype = network, call, device, dtype
        self.patch, self.pooled_width, self.resolution = geometry.patch, geometry.pooled_width, geometry.resolution
        self.embedded_guidance = embedded_guidance
        self._constants: dict[object, Tensor] = {}
        self.fast: Callable[..., Tensor] | None = None  # in the place of `call` with our network, without gradients
        if compile == "graph" and device.type == "cuda":
            self.fast = StaticCalls(self._plain, cuda_graph)
        elif compile == "inductor":
            compiled = torch.compile(network, dynamic=False)
            self.fast = lambda *inputs, **conditions: call(compiled, *inputs, self, **conditions)

    def _plain(self, z: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor, **conditions: Any) -> Tensor:
        return self.call(self.network, z, timestep, tokens, pooled, self, **conditions)

    @cached_property
    def _modules(self) -> list[torch.nn.Module]:
        return list(self.network.modules())

    def _changed(self) -> bool:
        """Whether hooks change what the network computes: vsd's, and those that fetch weights from main memory."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that was made by the first call with this key, so that later ones copy nothing."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def __call__(
        self, z: Tensor, timestep: Tensor, embedding: Tensor, network: torch.nn.Module | None = None, **conditions: Any
    ) -> Tensor:
        """The prediction [B, C, h, w] for one embedding [B, L, D] a sample, as :func:`join_pooled` makes it."""
        tokens, pooled = split_pooled(embedding, self.pooled_width)
        if self.fast and network in (None, self.network) and not torch.is_grad_enabled() and not self._changed():
            return self.fast(z, timestep, tokens, pooled, **conditions)
        return self.call(network or self.network, z, timestep, tokens, pooled, self, **conditions)


def join_pooled(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """Append the pooled embedding [P, W] to tokens [P, L, D] as rows, zero-padded: [P, L + ceil(W / D), D].

    One tensor a prompt keeps prompts easy to index, to average and to interpolate, the pooled part with the rest.
    """
    if pooled is None:
        return tokens
    width, rows = tokens.shape[-1], math.ceil(pooled.shape[-1] / tokens.shape[-1])
    padded = F.pad(pooled, (0, rows * width - pooled.shape[-1])).to(tokens)
    return torch.cat([tokens, padded.reshape(-1, rows, width)], 1)


def split_pooled(embedding: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """Split what :func:`join_pooled` joined: tokens [P, L, D] and pooled [P, W]."""
    rows = math.ceil(pooled_width / embedding.shape[-1])
    length = embedding.shape[1] - rows
    return embedding[:, :length], embedding[:, length:].flatten(1)[:, :pooled_width]


def call_unet(network, z, timestep, tokens, pooled, denoiser, **conditions) -> Tensor:
    """Stable Diffusion 1.x / 2.x, DeepFloyd IF, pocket models: text by cross-attention; a learned variance dropped."""
    patched = F.pixel_unshuffle(z, denoiser.patch)
    out = network(patched, timestep, encoder_hidden_states=tokens, **conditions).sample
    return F.pixel_shuffle(out[:, : patched.shape[1]], denoiser.patch)


def call_sdxl(network, z, timestep, tokens, pooled, denoiser, **conditions) -> Tensor:
    """Call SDXL (arXiv 2307.01952 sec. 2.2): pooled text and [original h, w, crop top, left, target h, w] in pixels.

    The sizes are the pipeline's defaults: an uncropped picture of the working resolution.
    """
    side = denoiser.resolution
    sizes = denoiser.constant(
        ("sizes", tokens.dtype, z.device),
        lambda: torch.tensor([side, side, 0, 0, side, side], dtype=tokens.dtype, device=z.device),
    )
    added = {"text_embeds": pooled, "time_ids": sizes.expand(z.shape[0], -1), **conditions.pop("added_cond_kwargs", {})}
    return call_unet(network, z, timestep, tokens, pooled, denoiser, added_cond_kwargs=added, **conditions)


def call_sd3(network, z, timestep, tokens, pooled, denoiser, **conditions) -> Tensor:
    """Stable Diffusion 3 (arXiv 2403.03206): joint attention over image and text tokens, pooled text with the time."""
    return network(
        hidden_states=z, timestep=timestep, encoder_hidden_states=tokens, pooled_projections=pooled, **conditions
    ).sample


def call_flux(network, z, timestep, tokens, pooled, denoiser, **conditions) -> Tensor:
    """Flux: latents packed 2x2 into tokens with (0, row, column) ids; the time as a fraction; guidance as an input."""
    batch, channels, height, width = z.shape
    rows, columns = height // 2, width // 2
    packed = z.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, 2, 2]
    guidance = None
    if network.config.guidance_embeds:
        guidance = torch.full((batch,), denoiser.embedded_guidance, dtype=torch.float32, device=z.device)
    out = network(
        hidden_states=packed.reshape(batch, rows * columns, channels * 4),
        timestep=timestep.to(z.dtype) / 1000,
        guidance=guidance,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3, dtype=tokens.dtype, device=z.device),
        img_ids=denoiser.constant(
            ("ids", rows, columns, tokens.dtype, z.device), lambda: _ids(rows, columns).to(tokens)
        ),
        **conditions,
    ).sample
    out = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)  # [B, C, rows, 2, columns, 2]
    return out.reshape(z.shape)


def _ids(rows: int, columns: int) -> Tensor:
    """The places of a picture's tokens: (0, row, column), [rows columns, 3]."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1], grid[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return grid.reshape(-1, 3)
