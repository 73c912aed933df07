"""Finding a diffusers folder on disk or on the hub, and loading its parts with every failure explained.

Only JSON, tokenizer files and safetensors are read; a folder that has only pickled weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.errors import UserError

WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
REQUIRED = ("scheduler", "tokenizer", "text_encoder", "unet")
UNSUPPORTED = {
    "text_encoder_2": "it needs two text encoders (SDXL family)",
    "transformer": "its denoiser is a transformer (Stable Diffusion 3, Flux, PixArt, ...)",
    "prior": "it is a two-part model (Kandinsky, Stable Cascade)",
    "image_encoder": "it is conditioned on images",
}


def locate(path_or_id: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a model: a local one first, else the hub's snapshot (from its cache when offline).

    Raises: UserError when there is no such folder, or the hub does not give it.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"Cannot load the prior {path_or_id}", "it is a file", "name the folder with model_index.json")
    if path_or_id.count("/") != 1 or path_or_id[0] in "./~" or "\\" in path_or_id or path_or_id.endswith("/"):
        raise UserError(
            f"Cannot load the prior {path_or_id}",
            "there is no such folder, and it is not a hub id of the form owner/name",
            "give the path of a diffusers folder, or an id such as stable-diffusion-v1-5/stable-diffusion-v1-5",
        )
    return _download(path_or_id, revision, variant)


def _download(repo_id: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    dot = f".{variant}" if variant else ""
    patterns = ["model_index.json", "pocket.json", "scheduler/*.json"]
    patterns += [f"tokenizer/*.{end}" for end in ("json", "txt", "model")]
    for part, stem in WEIGHT_STEMS.items():
        patterns += [f"{part}/*.json", f"{part}/{stem}{dot}.safetensors", f"{part}/{stem}{dot}-*.safetensors"]
    what = f"Cannot load the prior {repo_id}"
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            what, "the hub wants its licence accepted first", "accept it on the model's page, then hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "the hub cannot be reached"
        raise UserError(what, why, "give a local folder, or download it once while online") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            what, f"no such folder here, and the hub says: {_first_line(error)}", "check the id or give a local folder"
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or a UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(what, f"{path} is missing", "use a complete diffusers folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(what, f"{path} is damaged: {_first_line(error)}", "copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(what, f"{path} holds no JSON object", "copy or download it again")
    return value


def check_folder(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Class name by component of a folder's model_index.json, after checking that the files are there.

    Returns: scheduler, tokenizer, text_encoder, unet and, in a latent folder, vae.
    Raises: UserError naming the first missing or unsupported component.
    """
    what = f"Cannot load the prior {folder}"
    index = read_json(folder / "model_index.json", what)
    classes = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None}
    for part, why in UNSUPPORTED.items():
        if part in classes:
            raise UserError(
                what, f"{why}, which is not supported yet", "use a Stable Diffusion 1.x / 2.x or DeepFloyd IF folder"
            )
    for part in REQUIRED:
        if part not in classes:
            raise UserError(what, f"model_index.json lists no {part}", "use a complete diffusers folder")
    parts = [*REQUIRED, *(["vae"] if "vae" in classes else [])]
    for part in parts:
        directory = folder / part
        if not directory.is_dir():
            raise UserError(
                what, f"its {part}/ is missing", f"copy the {classes[part]} of the same model to {directory}"
            )
        if part in WEIGHT_STEMS:
            _check_weights(directory, WEIGHT_STEMS[part], variant, what)
    return {part: classes[part] for part in parts}


def _check_weights(directory: Path, stem: str, variant: str | None, what: str) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(what, f"{directory / 'config.json'} is missing", "use a complete diffusers folder")
    dot = f".{variant}" if variant else ""
    if (directory / f"{stem}{dot}.safetensors").is_file() or any(directory.glob(f"{stem}{dot}-*.safetensors")):
        return
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    wanted = directory / f"{stem}{dot}.safetensors"
    if others:
        raise UserError(what, f"{wanted} is missing; there is {', '.join(others)}", "set prior variant to match")
    if pickled:
        raise UserError(
            what,
            f"{directory} has only pickled weights ({', '.join(pickled)}), which can run code when read",
            "convert them to safetensors (huggingface.co/docs/safetensors) or get the model's safetensors files",
        )
    raise UserError(what, f"{wanted} is missing", "use a complete diffusers folder")


def load_part(folder: Path, part: str, load: Callable[[], Any]) -> Any:
    """Run a loader of one component and turn what can be wrong with a file into a UserError.

    `load` returns the object, or (model, loading info) of diffusers and transformers, whose missing and mismatched
    weights (left at random values by both libraries) are errors here.
    """
    what = f"Cannot load the {part} of {folder}"
    try:
        with _quiet():
            loaded = load()
    except MemoryError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own kinds, the latter bare Exceptions
        raise UserError(what, _first_line(error), "the file is damaged or of another model: get it again") from error
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    for key in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(key) or [])
        if names:
            why = f"{len(names)} {key.replace('_', ' ')} in its weights, {names[0]} first"
            raise UserError(what, why, "weights and config.json are not of the same model: get both again")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of the two libraries while a part loads; what matters is checked here."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels, bars = [log.get_verbosity() for log in logs], [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
