"""The memory that a prior needs, computed before any weight is loaded.

Weights: counted in the headers of the files, in the precision they will run in. Images and gradients: the networks are
built on torch's meta device, which has shapes and no memory, and run once there, forward and backward, while the
tensors that are alive are summed. Attention is counted as the fused kernels have it, without its matrix. VSD's training
step, a forward and backward pass through the denoiser, and its optimiser are in it; the renderer's memory is not.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.guidance.diffusion.autoencoder import Autoencoder
from stages.guidance.diffusion.denoisers import Denoiser
from stages.guidance.diffusion.folder import quiet
from stages.guidance.diffusion.plan import Plan, network_dtype, vae_dtype
from stages.guidance.diffusion.text import token_limit
from stages.guidance.diffusion.weights import Header, parameter_count
from stages.guidance.vsd import CAMERA_SIZE, RenderScore, VsdSettings

if TYPE_CHECKING:
    from stages.guidance.diffusion.settings import DiffusionSettings

GB = 2**30
_BLOCK = re.compile(r"((?:\w*blocks)\.\d+|mid_block)\.")


@dataclass(frozen=True)
class Footprint:
    """Bytes on the prior's device.

    Args:
        weights: of the denoiser and the autoencoder, which stay, by part; `vsd` is that rule's parameters and moments.
        text: of each text encoder, freed after the prompts are embedded, by part; none when they are embedded
            elsewhere.
        images: activations and gradients of a step.
    """

    dtype: torch.dtype
    weights: dict[str, int]
    text: dict[str, int]
    images: int

    @property
    def peak(self) -> int:
        """The most needed at once: the largest text encoder, or everything else during a step."""
        return max([*self.text.values(), sum(self.weights.values()) + self.images])

    def describe(self) -> str:
        """Return the footprint as one line of text."""
        stay = " + ".join(f"{part} {size / GB:.2f}" for part, size in self.weights.items())
        text = ", ".join(f"{size / GB:.2f}" for size in self.text.values()) or "none here"
        return (
            f"{str(self.dtype).removeprefix('torch.')}: {stay} GB stay, text encoders ({text} GB) are freed first, "
            f"a step's images and gradients take {self.images / GB:.2f} GB: {self.peak / GB:.2f} GB at most"
        )


def footprint(
    plan: Plan,
    settings: DiffusionSettings,
    device: torch.device,
    *,
    images: int,
    predictions: int,
    vsd: VsdSettings | None = None,
    decodes: bool = False,
) -> Footprint:
    """Compute the footprint of a planned prior.

    Args:
        images: pictures encoded in one step.
        predictions: images in the largest batch that the rule predicts noise for.
        vsd: settings of the score of the renders; None for other rules.
        decodes: whether the rule decodes predictions (HiFA's image term).
    """
    family = plan.family
    dtype = network_dtype(settings, family, device)
    weights, text = {}, {}
    for part, stem in plan.stems().items():
        headers = plan.headers(part, stem)
        if part == family.part:
            count = resident(headers) if settings.offload == "blocks" else parameter_count(headers)
            weights[part] = count * dtype.itemsize
        elif part == "vae":
            weights[part] = parameter_count(headers) * vae_dtype(family, plan.configs["vae"], dtype).itemsize
        elif settings.text_device == "prior":
            text[part] = text_bytes(plan.classes[part], headers, dtype)
    saved_bytes, encoding_peak = _encoding(plan, settings, dtype, images)
    prediction_peak = _prediction(plan, dtype, min(predictions, settings.max_batch or predictions))
    if vsd is not None:
        trainable, training_bytes = _training(plan, dtype, images, vsd)
        weights["vsd"] = 3 * 4 * trainable  # float32, each with Adam's two moments
        prediction_peak = max(prediction_peak, training_bytes)
    if decodes:
        prediction_peak = max(prediction_peak, _decoding(plan, settings, dtype, images))
    return Footprint(dtype, weights, text, max(encoding_peak, saved_bytes + prediction_peak))


def text_bytes(class_name: str, headers: dict[str, Header], dtype: torch.dtype) -> int:
    """Count the bytes of a text encoder in a precision; float16 leaves some layers of a T5 in float32."""
    import transformers

    float32_parts = getattr(getattr(transformers, class_name), "_keep_in_fp32_modules", None) or ()
    whole = {n: h for n, h in headers.items() if dtype == torch.float16 and set(n.split(".")) & set(float32_parts)}
    return parameter_count(headers) * dtype.itemsize + parameter_count(whole) * (4 - dtype.itemsize)


def resident(headers: dict[str, Header]) -> int:
    """Count the parameters of a network with offloaded blocks that share the device: all but the blocks, and one."""
    blocks: dict[str, int] = {}
    for name, header in headers.items():
        match = _BLOCK.match(name)
        key = match[1] if match else ""
        blocks[key] = blocks.get(key, 0) + header.count
    rest = blocks.pop("", 0)
    return rest + max(blocks.values(), default=0)


def _on_meta(class_name: str, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers

    with quiet(), torch.device("meta"):
        network = getattr(diffusers, class_name).from_config(vars(config))
    torch.nn.Module.to(network, dtype)
    return network.requires_grad_(False).eval()


def _encoding(plan: Plan, settings: DiffusionSettings, dtype: torch.dtype, images: int) -> tuple[int, int]:
    """Bytes that autograd keeps of the autoencoder's forward pass on that many pictures, and the most with backward."""
    if "vae" not in plan.classes:
        return 0, 0
    vae = _vae(plan, dtype)
    if settings.vae_checkpointing:
        vae.enable_gradient_checkpointing()
        vae.train()
    side = plan.geometry.resolution
    pictures = torch.empty(images, 3, side, side, device="meta", requires_grad=True)
    autoencoder = Autoencoder(vae, sample=False, one_by_one=settings.vae_slicing, gradient_side=settings.vae_gradient)
    return live_bytes(vae, lambda: autoencoder.encode(pictures, torch.Generator()), backward=True)


def _decoding(plan: Plan, settings: DiffusionSettings, dtype: torch.dtype, images: int) -> int:
    """Bytes alive at once while that many latents become pictures, without gradients."""
    if "vae" not in plan.classes:
        return 0
    vae, geometry = _vae(plan, dtype), plan.geometry
    z = torch.empty(images, geometry.channels, geometry.latents, geometry.latents, device="meta")
    autoencoder = Autoencoder(vae, sample=False, one_by_one=settings.vae_slicing)
    with torch.no_grad():
        return live_bytes(vae, lambda: autoencoder.decode(z))[1]


def _vae(plan: Plan, dtype: torch.dtype) -> torch.nn.Module:
    config = plan.configs["vae"]
    return _on_meta(plan.classes["vae"], config, vae_dtype(plan.family, config, dtype))


def embedding_shape(plan: Plan) -> tuple[int, int]:
    """Return (rows, width) of a prompt's embedding: all encoders' tokens, then the pooled part (join_pooled)."""
    encoded = []
    for spec in plan.encoders:
        config = plan.configs[spec.part]
        width = getattr(config, "hidden_size", None) or config.d_model
        limit = token_limit(spec, plan.tokenizers[spec.part], config)
        pooled = config.projection_dim if spec.pooled == "text_embeds" else width
        encoded.append(
            (
                None if spec.tokens == "none" else torch.empty(1, limit, width, device="meta"),
                None if spec.pooled is None else torch.empty(1, pooled, device="meta"),
            )
        )
    _, rows, width = plan.family.join(encoded, plan.configs[plan.family.part]).shape
    return rows, width


def _denoiser(plan: Plan, dtype: torch.dtype, batch: int) -> tuple[Denoiser, tuple[Tensor, Tensor, Tensor]]:
    """The denoiser and its input for that many samples, without memory."""
    family, geometry = plan.family, plan.geometry
    network = _on_meta(plan.classes[family.part], plan.configs[family.part], dtype)
    meta = {"device": "meta", "dtype": dtype}
    z = torch.empty(batch, geometry.channels, geometry.latents, geometry.latents, **meta)
    inputs = z, torch.empty(batch, device="meta"), torch.empty(batch, *embedding_shape(plan), **meta)
    return Denoiser(network, family.call, geometry, torch.device("meta"), dtype, 1.0), inputs


def _prediction(plan: Plan, dtype: torch.dtype, batch: int) -> int:
    """Bytes alive at once in a denoiser call on that many samples."""
    denoiser, inputs = _denoiser(plan, dtype, batch)
    with torch.no_grad():
        return live_bytes(denoiser.network, lambda: denoiser(*inputs))[1]


def _training(plan: Plan, dtype: torch.dtype, batch: int, settings: VsdSettings) -> tuple[int, int]:
    """Return how many parameters VSD's score has, and the peak bytes of its training step on that many samples."""
    denoiser, inputs = _denoiser(plan, dtype, batch)
    prior = SimpleNamespace(
        name=plan.folder.name,
        prediction=plan.schedule.prediction,
        alphas_cumprod=plan.schedule.alphas_cumprod,
        unet=denoiser.network,
        device=denoiser.device,
        offload="none",
        noise=lambda network, z, t, embedding: denoiser(z, t, embedding, network=network),
        conditions=lambda embedding, context: {},
    )
    score = RenderScore(prior, settings, torch.Generator())
    camera = torch.empty(batch, CAMERA_SIZE, device="meta")
    trainable = sum(p.numel() for p in score.parameters.values())
    return trainable, live_bytes(score.unet, lambda: score.noise(*inputs, camera), backward=True)[1]


def live_bytes(network: torch.nn.Module, run: Callable[[], Tensor], backward: bool = False) -> tuple[int, int]:
    """Return (bytes alive after `run`, peak bytes) of the tensors it makes, with its backward pass if asked.

    The network's own parameters are not counted. On any device; on meta nothing is computed.
    """
    counter = _Live({t.untyped_storage()._cdata for t in [*network.parameters(), *network.buffers()]})
    with _fused_attention(), counter:
        result = run()
        after = counter.now
        if backward:
            result.sum().backward()
    return after, counter.peak


class _Live(TorchDispatchMode):
    """Sums the storages that operations return while they are alive."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = dict.fromkeys(storages, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as one operation that makes its result alone, as the fused kernels do, also where it is recomputed.

    torch's own function is replaced for the time: a torch-function mode is off inside backward().
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        same = query.shape[-1] == value.shape[-1]
        return query.clone() if same else query.new_empty(*query.shape[:-1], value.shape[-1])

    functional.scaled_dot_product_attention = stand_in
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
