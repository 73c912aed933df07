"""Finding a diffusers folder on disk or on the hub, and loading its parts with every failure explained.

Only JSON, tokenizer files and safetensors are read; a folder that has only pickled weights is refused.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError, out_of_memory
from stages.guidance.diffusion.presets import find_preset
from stages.guidance.diffusion.weights import check_files
from stages.paths import from_home

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PANIC = "PanicException"  # what a library in Rust raises where it trips over a file: no Exception to Python
_NEVER_EMPTY = ("config.json", "scheduler_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Component:
    """A part of a folder: its directory, its class, and the stem of its weight files if it has weights."""

    part: str
    class_name: str
    stem: str | None


def locate(path_or_id: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Find the folder of a model: a local one first, else the hub's snapshot (from its cache when offline).

    Raises: UserError when there is no such folder, or the hub does not give it.
    """
    path = from_home(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"Cannot load the prior {path_or_id}", "it is a file", "name the folder with model_index.json")
    if not _HUB_ID.fullmatch(path_or_id):
        raise UserError(
            f"Cannot load the prior {path_or_id}",
            "there is no such folder, and it is not a hub id of the form owner/name",
            "give the path of a diffusers folder, or an id such as stable-diffusion-v1-5/stable-diffusion-v1-5",
        )
    return _download(path_or_id, revision, variant)


def locate_autoencoder(path_or_id: str) -> Path:
    """Find the folder of an autoencoder alone, or of a model whose vae/ is meant; local first, hub id second."""
    path = from_home(path_or_id)
    if not path.exists() and _HUB_ID.fullmatch(path_or_id):
        # The hub's patterns let * cross folders: a name's beginning keeps the rest of a whole model away.
        names = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors")
        patterns = [f"{vae}{name}" for vae in ("", "vae/") for name in names]
        path = _snapshot(path_or_id, None, patterns, f"Cannot load the autoencoder {path_or_id}")
    if (path / "config.json").is_file() or (path / "vae" / "config.json").is_file():
        return path
    raise UserError(
        f"Cannot load the autoencoder {path_or_id}",
        "there is no config.json in it, nor in its vae/",
        "set prior.diffusion.autoencoder to the folder or hub id of an AutoencoderKL or AutoencoderTiny",
    )


def snapshot(model_id: str, revision: str | None = None) -> Path | None:
    """Return this machine's snapshot of a hub id, complete or not; None without one, or for what is no hub id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not _HUB_ID.fullmatch(model_id):
        return None
    try:
        return Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        return _partial(error)
    except HFValidationError:
        return None


def _partial(error: Exception) -> Path | None:
    """The folder of a snapshot that lacks files of the repository, as all of ours do: only what is needed is fetched.
    Hubs that list a repository's files beside the snapshot say where it is; None where there is none."""
    path = getattr(error, "snapshot_path", None)
    return None if path is None else Path(path)


def cached(model_id: str, revision: str | None = None, variant: str | None = None) -> Path | None:
    """Return this machine's complete snapshot of a hub id; None without one, or for what is no hub id."""
    folder = snapshot(model_id, revision)
    if folder is None:
        return None
    try:
        classes = read_index(folder)
        for part in (*PARTS, *TOKENIZERS, "scheduler"):
            if part in classes:
                stem = None if part not in PARTS else "model" if part.startswith("text") else "diffusion_pytorch_model"
                check_component(folder, Component(part, classes[part], stem), variant)
    except UserError:
        return None  # an unfinished download is taken up again when the prior is loaded
    return folder


def check_hub(model_id: str, revision: str | None = None) -> Path:
    """Fetch the index of a hub id that is not on this machine; returns its folder.

    A mistyped or gated id, or a hub out of reach, is refused before any work. Raises: UserError.
    """
    from huggingface_hub import constants

    what, preset = f"Cannot load the prior {model_id}", find_preset(model_id)
    if preset is not None and preset.status == "withdrawn":
        raise UserError(what, "it was withdrawn by its makers", f"use {preset.instead}, or a local folder")
    if constants.HF_HUB_OFFLINE:
        raise _offline(what)
    return fetch_index(model_id, revision, what)


def fetch_index(model_id: str, revision: str | None, what: str) -> Path:
    """Fetch the model_index.json of a hub id; returns its folder."""
    return _snapshot(model_id, revision, ["model_index.json"], what)


def _offline(what: str) -> UserError:
    why = "HF_HUB_OFFLINE is set and it is not in the cache"
    return UserError(what, why, "give a local folder, or download it once while online")


def _download(repo_id: str, revision: str | None, variant: str | None) -> Path:
    dot = f".{variant}" if variant else ""
    patterns = ["model_index.json", "pocket.json", "scheduler/*.json"]
    patterns += [f"{part}/*.{end}" for part in TOKENIZERS for end in ("json", "txt", "model")]
    for part in PARTS:
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        patterns += [f"{part}/*.json", f"{part}/{stem}{dot}.safetensors", f"{part}/{stem}{dot}-*.safetensors"]
    return _snapshot(repo_id, revision, patterns, f"Cannot load the prior {repo_id}")


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], what: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            what, "the hub wants its licence accepted first", "accept it on the model's page, then hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            partial = _partial(error)
            if partial is not None:
                return partial  # what it lacks is named when it is checked, part by part
            raise _offline(what) from error
        raise UserError(
            what, "the hub cannot be reached", "give a local folder, or download it once while online"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        why, fix = f"no such folder here, and the hub says: {_first_line(error)}", "check the id or give a local folder"
        preset = find_preset(repo_id)
        if preset is not None and preset.status == "withdrawn":
            fix = f"it was withdrawn; use {preset.instead}"
        raise UserError(what, why, fix) from error
    except Exception as error:  # of the hub's HTTP client, which has been three different packages
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        why = f"the connection broke: {_first_line(error)}"
        raise UserError(what, why, "run it again: the download goes on where it was") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: UserError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(what, f"{path} is missing", "use a complete diffusers folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(what, f"{path} is damaged: {_first_line(error)}", "copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(what, f"{path} holds no JSON object", "copy or download it again")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """Return the class name by part of a folder's model_index.json; parts it sets to null are left out."""
    index = read_json(folder / "model_index.json", f"Cannot load the prior {folder}")
    return {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)}


def check_component(folder: Path, component: Component, variant: str | None = None) -> list[Path]:
    """Check that a part's files are there and return its weight files. Raises: UserError naming what is not."""
    what, directory = f"Cannot load the prior {folder}", folder / component.part
    if not directory.is_dir():
        raise UserError(
            what,
            f"its {component.part}/ is missing",
            f"copy the {component.class_name} of the same model to {directory}",
        )
    _check_texts(directory, f"Cannot load the {component.part} of {folder}")
    if component.stem is None:
        return []
    if not (directory / "config.json").is_file():
        raise UserError(what, f"{directory / 'config.json'} is missing", "use a complete diffusers folder")
    return check_files(directory, component.stem, variant, what)


def _check_texts(directory: Path, what: str) -> None:
    """Refuse a part with a small file that is cut, emptied or of another type, by the file's name: the libraries' own
    readers ignore it, or report an error of their own."""
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" and not read_json(path, what) and path.name in _NEVER_EMPTY:
            raise UserError(what, f"{path} says nothing", "copy or download it again")
        if path.suffix == ".txt" and not (path.is_file() and path.stat().st_size):
            why = "is empty" if path.is_file() else "is no file"
            raise UserError(what, f"{path} {why}", "copy or download it again")


def load_part(folder: Path, part: str, load: Callable[[], Any]) -> Any:
    """Run a loader of one component and turn what can be wrong with a file into a UserError.

    `load` returns the object, or (model, loading info) of diffusers and transformers, whose missing and mismatched
    weights (left at random values by both libraries) are errors here.
    """
    what = f"Cannot load the {part} of {folder}"
    try:
        with quiet():
            loaded = load()
    except BaseException as error:  # safetensors and tokenizers raise their own kinds, the latter bare Exceptions
        if out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
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
def quiet() -> Iterator[None]:
    """Switch off progress bars and warnings of the two libraries while a part loads; what matters is checked here."""
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
