"""Personalised weights: LoRA files merged into a prior's networks, and DreamBooth weights put in their place.

LoRA (Hu et al. 2021, eq. 3): W + s (alpha / r) U D with D [r, in], U [out, r] and the user's scale s; alpha = r where
the file gives none. Written for good into the weights, so no package for adapters is needed and no step costs more.
File names of diffusers (two generations of them), kohya (SD 1.x / 2.x, SDXL) and, through diffusers' own converter,
of Flux trainers are read; layers are found by their names with every dot and underscore alike. A file without
low-rank parts holds whole weights W' under the network's own names (DreamBooth), and W + s (W' - W) takes their place.
So does a diffusers folder, whole or with a unet/ or transformer/ alone: its denoiser and its text encoders.

A key that fits no layer is refused by name: half a personalisation looks like a bad one.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.errors import UserError
from stages.guidance.diffusion.folder import read_json
from stages.guidance.diffusion.noise_schedule import FLOW
from stages.guidance.diffusion.weights import PICKLED, Header, check_files, read_header, weight_files
from stages.paths import from_home

if TYPE_CHECKING:
    from stages.guidance.diffusion.families import Configs, Family
    from stages.guidance.diffusion.noise_schedule import NoiseSchedule

DENOISER = "denoiser"  # the unet or the transformer
# Longest first where one begins another. kohya calls every denoiser unet.
_PREFIXES = {
    "base_model.model.": DENOISER,
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "unet.": DENOISER,
    "transformer.": DENOISER,
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder.": "text_encoder",
}
_KEY = re.compile(
    r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?)?[._]"
    r"(?P<role>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(?:\.default)?(?P<weight>\.weight)?"
)
_ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_OTHER_KINDS = ("dora", "magnitude", "hada", "lokr", "lora_mid", "oft")
_STEM = "diffusion_pytorch_model"
_BUFFERS = ("position_ids",)  # a count that some versions of transformers write beside the weights
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SGM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SGM_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


class _WholeTensor(NamedTuple):
    """A whole tensor, left in its file until it is merged: memory may not hold a text encoder twice."""

    path: Path
    key: str
    header: Header


@dataclass
class LowRank:
    """One layer's change: down D [r, ...], up U [out, r, ...], alpha (None: r), and its name in the file."""

    key: str
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None

    def delta(self, shape: torch.Size) -> Tensor:
        """Return (alpha / r) U D as float32 in the shape of the weight."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        alpha = down.shape[0] if self.alpha is None else self.alpha
        return (alpha / down.shape[0]) * (up @ down).reshape(shape)


class Target(Protocol):
    """The facts about a model that a LoRA is checked against; a Plan has them before a weight is loaded."""

    family: Family
    configs: Configs
    schedule: NoiseSchedule

    def stems(self) -> dict[str, str]: ...

    def headers(self, part: str, stem: str) -> dict[str, Header]: ...


class Lora:
    """The changes of one file or folder, by part of the model.

    Args:
        path: a safetensors file, a folder with one, or a diffusers folder of whole weights.
        scale: s, the factor of every change.
    Raises: UserError for a file that is none, is pickled or holds something else.
    """

    def __init__(self, path: str | Path, scale: float = 1.0) -> None:
        self.scale, self.what = scale, f"Cannot use prior.lora={path}"
        self.path, self._folder = _resolve(from_home(path), self.what)
        self._changes: dict[str, dict[str, LowRank]] = {}
        self._whole: dict[str, dict[str, _WholeTensor]] = {}
        self.low_rank = False
        if self._folder:
            return
        names = list(read_header(self.path))
        matches = [_KEY.fullmatch(name) for name in names]
        self.low_rank = any(match and match["role"] != "alpha" for match in matches)
        if self.low_rank:
            self._refuse([name for name, match in zip(names, matches, strict=True) if not match])
        elif any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names):
            raise UserError(
                self.what,
                "it is a whole checkpoint in one file, not a LoRA",
                "make it a diffusers folder (diffusers' from_single_file, save_pretrained), then prior.coarse=FOLDER",
            )

    def check(self, plan: Target) -> None:
        """Check that every key fits a layer of the planned networks, by their headers; needed before :meth:`merge`.

        Raises: UserError naming the keys that do not, or whose shape is of another model.
        """
        self._read_file(plan.family, plan.configs)
        stems = plan.stems()
        for part in {**self._changes, **self._whole}:
            subfolder = plan.family.part if part == DENOISER else part
            if subfolder not in stems:
                self._refuse(self._keys(part), f"for a {part} that {plan.family.name} does not have")
            shapes = {name: header.shape for name, header in plan.headers(subfolder, stems[subfolder]).items()}
            if self.low_rank:
                layers = {_flat(name.removesuffix(".weight"), part): shape for name, shape in shapes.items()}
                self._check_low_rank(part, layers)
            else:
                self._check_whole(subfolder, self._whole[part], {_plain(name): shape for name, shape in shapes.items()})
        if self._folder:
            self._check_prediction(plan)

    def _check_whole(self, part: str, tensors: dict[str, _WholeTensor], shapes: dict[str, tuple[int, ...]]) -> None:
        for name in [name for name in tensors if name.endswith(_BUFFERS)]:
            del tensors[name]
        self._refuse([name for name in tensors if name not in shapes])
        wrong = [name for name, tensor in tensors.items() if tensor.header.shape != shapes[name]]
        self._refuse(wrong, "of another shape than the model's")
        missing = [name for name in shapes if name not in tensors and not name.endswith(_BUFFERS)]
        if self._folder and missing:
            why = f"its {part} lacks {len(missing)} of the model's {len(shapes)} tensors, {missing[0]} first"
            raise UserError(self.what, why, "get the folder again: half a personalisation looks like a bad one")

    def _check_prediction(self, plan: Target) -> None:
        """Stable Diffusion 2.1 has the same layers twice, one predicting epsilon and one v."""
        path = self.path / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            return
        config = read_json(path, self.what)
        flow = config.get("_class_name") in FLOW
        prediction = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
        if prediction != plan.schedule.prediction:
            why = f"its model predicts {prediction} and the prior {plan.schedule.prediction}"
            raise UserError(self.what, why, f"give it as the prior itself: prior.coarse={self.path}")

    def _check_low_rank(self, part: str, shapes: dict[str, tuple[int, ...]]) -> None:
        changes = self._changes[part]
        self._changes[part] = changes = {_current_name(flat, shapes): change for flat, change in changes.items()}
        self._refuse([change.key for flat, change in changes.items() if flat not in shapes])
        halves = [c.key for c in changes.values() if c.down is None or c.up is None]
        self._refuse(halves, "without their other half (down and up)")
        wrong = []
        for flat, change in changes.items():
            rows, columns = shapes[flat][0], math.prod(shapes[flat][1:])
            down, up = change.down.flatten(1), change.up.flatten(1)
            if (up.shape[0], down.shape[1]) != (rows, columns) or up.shape[1] != down.shape[0]:
                wrong.append(change.key)
        self._refuse(wrong, "of another shape than the model's")

    @torch.no_grad()
    def merge(self, part: str, network: torch.nn.Module) -> int:
        """Write the changes of one part (unet, transformer, text_encoder, ...) into its network; returns how many."""
        from safetensors import safe_open

        part = DENOISER if part in ("unet", "transformer") else part
        modules = {_flat(name, part): module for name, module in network.named_modules()}
        for flat, change in self._changes.get(part, {}).items():
            weight = modules[flat].weight
            delta = change.delta(weight.shape).to(weight.device)
            weight.data = (weight.data.float() + self.scale * delta).to(weight.dtype)
        tensors = {_plain(name): tensor for name, tensor in network.state_dict().items()}
        whole = self._whole.get(part, {})
        for path in dict.fromkeys(entry.path for entry in whole.values()):
            with safe_open(path, "pt") as file:
                for name, entry in whole.items():
                    if entry.path == path:
                        self._replace(tensors[name], file.get_tensor(entry.key))
        return len(self._changes.get(part, {})) + len(self._whole.get(part, {}))

    def _replace(self, weight: Tensor, new: Tensor) -> None:
        if self.scale != 1 and weight.is_floating_point():
            new = torch.lerp(weight.float(), new.to(weight.device).float(), self.scale)
        weight.copy_(new)

    def _read_file(self, family: Family, configs: Configs) -> None:
        from safetensors.torch import load_file

        self._changes, self._whole = {}, {}
        if not self.low_rank:
            for folder_part, files in (self._folder or {"": [self.path]}).items():
                for path in files:
                    for key, header in read_header(path).items():
                        part, rest = (folder_part, key) if folder_part else _split(key)
                        self._whole.setdefault(part, {})[_plain(rest)] = _WholeTensor(path, key, header)
            return
        tensors = load_file(self.path)
        self._refuse([k for k, t in tensors.items() if not _is_change(k, t)], "of a shape or type of no change")
        if family.name == "Flux" and not any(name.startswith(("transformer.", "text_encoder.")) for name in tensors):
            tensors = self._from_flux_trainers(tensors)
        layers = getattr(configs[family.part], "layers_per_block", None)
        adapters = self._adapters()
        for name, tensor in tensors.items():
            match = _KEY.fullmatch(name)
            part, module = _split(match["module"])
            flat = _flat(module, part)
            if part == DENOISER and isinstance(layers, int):
                flat = from_sgm(flat, layers)
            change = self._changes.setdefault(part, {}).setdefault(flat, LowRank(match["module"]))
            role = _ROLES.get(match["role"], match["role"])
            setattr(change, role, float(tensor) if role == "alpha" else tensor)
        for part, changes in self._changes.items():
            for flat, change in changes.items():
                if change.alpha is None and change.down is not None:
                    change.alpha = _adapter_alpha(adapters.get(part, {}), flat, change.down.shape[0])

    def _from_flux_trainers(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """kohya's and others' names of Flux, whose joined query-key-value layers diffusers keeps apart."""
        from diffusers.loaders import FluxLoraLoaderMixin

        try:
            converted, alphas = FluxLoraLoaderMixin.lora_state_dict(tensors, return_alphas=True)
        except Exception as error:  # the converter raises whatever it stumbles over
            first = str(error).partition("\n")[0][:120]
            why = f"diffusers cannot read it as a Flux LoRA: {first}"
            raise UserError(self.what, why, "take one in diffusers' or kohya's format") from error
        return converted | {name: torch.as_tensor(value) for name, value in (alphas or {}).items()}

    def _adapters(self) -> dict[str, dict[str, Any]]:
        """Settings of the adapters by part, which newer diffusers write into the file's metadata."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        adapters: dict[str, dict[str, Any]] = {}
        try:
            settings = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            settings = None
        for key, value in settings.items() if isinstance(settings, dict) else [("", settings)]:
            part, rest = _split(key)
            if not key or not _are_alphas(rest, value):
                raise UserError(self.what, f"its adapter's {key or 'settings'} are damaged", "get the file again")
            adapters.setdefault(part, {})[rest] = value
        return adapters

    def _keys(self, part: str) -> list[str]:
        return [change.key for change in self._changes.get(part, {}).values()] or list(self._whole.get(part, {}))

    def _refuse(self, keys: list[str], why: str = "that fit no layer of this model") -> None:
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            fix = "take one trained on this prior's own kind of model (SD 1.5, SDXL, ... are not interchangeable)"
            if any(kind in key for key in keys for kind in _OTHER_KINDS):
                fix = "DoRA, LoHa, LoKr and their like are not supported: take a plain LoRA"
            raise UserError(self.what, f"{self.path.name} has {len(keys)} keys {why}: {', '.join(keys[:3])}{more}", fix)


def _resolve(path: Path, what: str) -> tuple[Path, dict[str, list[Path]]]:
    """Return a file and nothing, or a folder and its weight files by part of the model."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        default_file = path / "pytorch_lora_weights.safetensors"
        if default_file in files:
            return default_file, {}
        if weight_files(path, _STEM):  # a unet/ or transformer/ itself
            return path, {DENOISER: weight_files(path, _STEM)}
        for part in ("unet", "transformer"):
            if (path / part).is_dir():
                texts = [folder for folder in sorted(path.glob("text_encoder*")) if folder.is_dir()]
                parts = {DENOISER: _weights(path / part, _STEM, what)}
                return path, parts | {folder.name: _weights(folder, "model", what) for folder in texts}
        if len(files) != 1:
            raise UserError(what, f"{len(files)} safetensors files are in it", "name the file")
        return files[0], {}
    if not path.is_file():
        raise UserError(what, "there is no such file", "check the path, relative to where you stand")
    if path.suffix in PICKLED:
        raise UserError(what, "it is pickled, which can run code when read", "get or convert it to safetensors")
    return path, {}


def _weights(directory: Path, stem: str, what: str) -> list[Path]:
    """A part's weight files, in half precision where there are no others: they are converted as they are merged."""
    half = None if weight_files(directory, stem) or not weight_files(directory, stem, "fp16") else "fp16"
    return check_files(directory, stem, half, what)


def _split(name: str) -> tuple[str, str]:
    """(part, the rest of the name); names without a known beginning are the denoiser's."""
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part, name[len(prefix) :]
    return DENOISER, name


def _plain(name: str) -> str:
    """A weight's name as all versions of transformers have it: no level above a CLIP text model, a T5's shared name."""
    name = name.removeprefix("text_model.")
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def _flat(name: str, part: str) -> str:
    """A layer's name with dots as underscores, without levels that come and go with versions."""
    flat = name.replace(".processor", "").replace(".", "_")
    if part == DENOISER:
        return flat
    flat = flat.removeprefix("text_model_")
    for old, new in _OLD_TEXT.items():
        flat = re.sub(rf"self_attn_{old}$", f"self_attn_{new}", flat)
    return flat


def _current_name(flat: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Return a layer's present name: old files call an attention's last layer to_out, now its first entry."""
    return f"{flat}_0" if flat not in shapes and flat.endswith("to_out") else flat


def from_sgm(flat: str, layers: int) -> str:
    """Return the diffusers name of a UNet layer that is named as in Stability's own code (kohya's SDXL files).

    flat: with underscores. layers: layers_per_block of the UNet. Names of other kinds come back as they are.
    """
    if flat in _SGM_SINGLE:
        return _SGM_SINGLE[flat]
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)_(\d+)_(.+)", flat)
    if match is None:
        return flat
    side, index, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        block, layer = "mid_block", index // 2
        kind = "attentions" if index == 1 else "resnets"
    else:
        first, _, rest = rest.partition("_")
        down = side == "input_blocks"
        number, layer = divmod(index - 1 if down else index, layers + 1)
        block = f"{'down' if down else 'up'}_blocks_{number}"
        kind = "resnets" if first == "0" else "attentions"
        if rest in ("op", "conv"):
            return f"{block}_{'downsamplers' if down else 'upsamplers'}_0_conv"
    return f"{block}_{kind}_{layer}_{_SGM_RESNET.get(rest, rest)}"


def _are_alphas(rest: str, value: Any) -> bool:
    """Whether a setting of an adapter is a number, or numbers by name, where it says alpha."""
    alphas = {"lora_alpha": {"": value}, "alpha_pattern": value or {}}.get(rest, {})
    return isinstance(alphas, dict) and all(isinstance(alpha, int | float) for alpha in alphas.values() if alpha)


def _is_change(key: str, tensor: Tensor) -> bool:
    """Whether a tensor may be what its key says: one half of a change (down, up), or its alpha."""
    if _KEY.fullmatch(key)["role"] == "alpha":
        return tensor.numel() == 1 and math.isfinite(float(tensor))
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0


def _adapter_alpha(adapter: dict[str, Any], flat: str, rank: int) -> float | None:
    """alpha of a layer by the file's metadata, so that alpha / rank is the adapter's own scaling; None without any."""
    alpha = adapter.get("lora_alpha")
    for name, value in (adapter.get("alpha_pattern") or {}).items():
        if flat.endswith(name.replace(".", "_")):
            alpha = value
    return alpha * math.sqrt(rank) if alpha is not None and adapter.get("use_rslora") else alpha
