"""The folder of networks that a stage draws with: named, checked, written and read.

config.json holds their sizes, model.safetensors their weights in float16.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from stages.errors import UserError
from stages.paths import from_home

POCKET = Path(__file__).parent / "pocket" / "weights"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Networks = TypeVar("Networks", bound=nn.Module)
Sizes = TypeVar("Sizes")


def networks_folder(name: str, own: str) -> Path:
    """Return the folder that a setting names: `own` of the built-in weights for "pocket", else a path."""
    return POCKET / own if name == "pocket" else from_home(name).absolute()


def training_of(stage: str) -> str:
    """Return the command that makes the networks of a stage."""
    return f"python -m stages.pocket.train {stage}"


def save_networks(networks: nn.Module, sizes: dict[str, Any], folder: Path) -> None:
    """Write networks and their sizes to a folder; float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().half().contiguous() for name, value in networks.state_dict().items()}
    save_file(tensors, folder / "model.part")
    (folder / "model.part").replace(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(sizes, indent=1) + "\n")


def load_networks(make: Callable[[dict[str, Any]], Networks], folder: Path, stage: str, kind: str) -> Networks:
    """Return the networks of a folder, frozen, float32.

    Args:
        make: networks of the sizes that the folder tells.
        folder: as save_networks wrote it.
        stage: whose they are, as its trainer is called.
        kind: what they are, for messages.
    Raises: UserError for a folder that is missing or damaged.
    """
    with _refused(folder, stage, kind):
        networks = make(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
        networks.load_state_dict({name: value.float() for name, value in tensors.items()})
    return networks.eval().requires_grad_(False)


def load_config(make: Callable[[dict[str, Any]], Sizes], folder: Path, stage: str, kind: str) -> Sizes:
    """Return what a folder tells of its networks, without them; the arguments are those of load_networks."""
    with _refused(folder, stage, kind):
        return make(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


@contextlib.contextmanager
def _refused(folder: Path, stage: str, kind: str) -> Iterator[None]:
    """Turn whatever a missing or damaged folder raises into a UserError."""
    check_networks(folder, stage)
    try:
        yield
    except Exception as error:  # JSON, safetensors and torch raise errors of many kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        what, why = f"Cannot load the {kind} networks of {folder}", f"{type(error).__name__}: {reason}"
        raise UserError(what, why, f"get the folder again, or train it: {training_of(stage)}") from None


def check_networks(folder: Path, stage: str) -> None:
    """Raise UserError, with how to train them, where networks are missing."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"The {stage} stage has no networks",
            f"there is no {folder / missing[0]}",
            f"train them: {training_of(stage)}, or set {stage}.weights=FOLDER",
        )
