"""Finding a model: a folder on disk, the hub's snapshot on this machine, or the hub itself.

What needs no weight is fetched first: the index, configs, tokenizers and the schedule, some megabytes, from which a run
is checked whole. Of the weights only the files that will be loaded are fetched, in half precision where the networks
run in it and the repository has it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from stages.errors import UserError
from stages.guidance.diffusion.families import check_folder, components, family_of, part_variants
from stages.guidance.diffusion.folder import first_line
from stages.guidance.diffusion.presets import find_preset
from stages.guidance.diffusion.settings import AUTO
from stages.guidance.diffusion.weights import weight_names
from stages.paths import from_home

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_TEXTS = ["model_index.json", "pocket.json", "scheduler/*.json", *(f"{part}/config.json" for part in _PARTS)]
_TEXTS += [f"{part}/*.{end}" for part in _TOKENIZERS for end in ("json", "txt", "model")]
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests")  # the hub's HTTP client has been three different packages
GB = 1e9


def locate(path_or_id: str, revision: str | None = None, variant: str | None = None, half: bool = False) -> Path:
    """Find the folder of a model: a local one first, else the hub's snapshot (from its cache when offline).

    Args:
        path_or_id: a folder, or owner/name on the hub.
        revision: of a hub id.
        variant: of its weight files, see chosen_variant.
        half: see chosen_variant.
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
    what = f"Cannot load the prior {path_or_id}"
    weights = [*_files(path_or_id, revision, variant, half)] or _any_weights(variant)
    return _snapshot(path_or_id, revision, [*_TEXTS, *weights], what)


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


def cached(model_id: str, revision: str | None = None, variant: str | None = None, half: bool = False) -> Path | None:
    """Return this machine's complete snapshot of a hub id; None without one, or for what is no hub id."""
    folder = snapshot(model_id, revision)
    if folder is None:
        return None
    try:
        check_folder(folder, variant, half)
    except UserError:
        return None  # an unfinished download is taken up again when the prior is loaded
    return folder


def check_hub(model_id: str, revision: str | None = None) -> Path:
    """Fetch everything but the weights of a hub id that is not on this machine; returns its folder.

    A mistyped or gated id, or a hub out of reach, is refused by the index alone, before any work. Raises: UserError.
    """
    from huggingface_hub import constants

    what, preset = f"Cannot load the prior {model_id}", find_preset(model_id)
    if preset is not None and preset.status == "withdrawn":
        raise UserError(what, "it was withdrawn by its makers", f"use {preset.instead}, or a local folder")
    if constants.HF_HUB_OFFLINE:
        raise _offline(what)
    family_of(fetch_index(model_id, revision, what))
    return fetch_texts(model_id, revision, what)


def fetch_index(model_id: str, revision: str | None, what: str) -> Path:
    """Fetch the model_index.json of a hub id; returns its folder."""
    return _snapshot(model_id, revision, ["model_index.json"], what)


def fetch_texts(model_id: str, revision: str | None, what: str) -> Path:
    """Fetch the index, configs, tokenizers and schedule of a hub id; returns its folder.

    They are some MB, nearly all of them vocabularies.
    """
    return _snapshot(model_id, revision, _TEXTS, what)


def download_note(model_id: str, revision: str | None, variant: str | None, half: bool) -> str | None:
    """Return what `locate` will download, part by part with sizes and variants; None for nothing, or where the hub does
    not say."""
    from huggingface_hub import try_to_load_from_cache

    files = {
        name: size
        for name, size in _files(model_id, revision, variant, half).items()
        if not isinstance(try_to_load_from_cache(model_id, name, revision=revision), str)
    }
    if not files:
        return None
    parts: dict[str, float] = {}
    for name, size in files.items():
        path = PurePosixPath(name)
        kind = path.stem.partition(".")[2].partition("-")[0] or "full precision"
        label = f"{path.parts[0]} {kind}"
        parts[label] = parts.get(label, 0.0) + size
    sizes_text = ", ".join(f"{label} {size / GB:.2f}" for label, size in parts.items())
    return f"downloading {sum(parts.values()) / GB:.2f} GB of {model_id}: {sizes_text}"


def _files(model_id: str, revision: str | None, variant: str | None, half: bool) -> dict[str, int]:
    """Bytes of each weight file that a plan of a hub id will load, by its name in the repository; none where the hub is
    out of reach."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        files = HfApi().model_info(model_id, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return {}  # the download says what is wrong, or takes what this machine has
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        return {}
    sizes = {file.rfilename: file.size or 0 for file in files}
    return {name: sizes[name] for name in chosen_files(model_id, revision, sizes, variant, half)}


def chosen_files(
    model_id: str, revision: str | None, names: dict[str, int], variant: str | None, half: bool
) -> list[str]:
    """Return the weight files that a plan of a hub id loads.

    Args:
        model_id: owner/name.
        revision: of it.
        names: of all files in the repository, with anything.
        variant: see chosen_variant.
        half: see chosen_variant.
    """
    parts = components(*family_of(fetch_index(model_id, revision, f"Cannot load the prior {model_id}")))
    inside = {c.part: [name.partition("/")[2] for name in names if name.startswith(f"{c.part}/")] for c in parts}
    variants = part_variants(parts, lambda part: inside[part], variant, half)
    return [
        f"{component.part}/{name}"
        for component in parts
        if component.stem is not None
        for name in weight_names(inside[component.part], component.stem, variants[component.part])
    ]


def _any_weights(variant: str | None) -> list[str]:
    """Patterns of weight files where a repository's listing cannot be had."""
    dot = f".{variant}" if variant not in (None, AUTO) else ""
    stems = {part: "model" if part.startswith("text") else "diffusion_pytorch_model" for part in _PARTS}
    return [f"{part}/{stem}{dot}{end}.safetensors" for part, stem in stems.items() for end in ("", "-*")]


def _offline(what: str) -> UserError:
    why = "HF_HUB_OFFLINE is set and it is not in the cache"
    return UserError(what, why, "give a local folder, or download it once while online")


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], what: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(repo_id, what):
        try:
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        except LocalEntryNotFoundError as error:
            if not constants.HF_HUB_OFFLINE:
                raise
            partial = _partial(error)
            if partial is not None:
                return partial  # what it lacks is named when it is checked, part by part
            raise _offline(what) from error


@contextmanager
def _explained(repo_id: str, what: str) -> Iterator[None]:
    """Turn the failures of the hub and the connection into UserErrors."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            what, "the hub wants its licence accepted first", "accept it on the model's page, then hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            what, "the hub cannot be reached", "give a local folder, or download it once while online"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        why, fix = f"no such folder here, and the hub says: {first_line(error)}", "check the id or give a local folder"
        preset = find_preset(repo_id)
        if preset is not None and preset.status == "withdrawn":
            fix = f"it was withdrawn; use {preset.instead}"
        raise UserError(what, why, fix) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        why = f"the connection broke: {first_line(error)}"
        raise UserError(what, why, "run it again: the download goes on where it was") from error
