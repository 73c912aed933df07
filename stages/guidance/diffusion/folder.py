"""Reading a diffusers folder, and loading its parts with every failure explained.

Only JSON, tokenizer files and safetensors are read; a folder that has only pickled weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import UserError, out_of_memory
from stages.guidance.diffusion.weights import check_files

PANIC = "PanicException"  # what a library in Rust raises where it trips over a file: no Exception to Python
_SLIPS = (AttributeError, TypeError, KeyError, IndexError, ZeroDivisionError, RecursionError)
_NEVER_EMPTY = ("config.json", "scheduler_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Component:
    """A part of a folder: its directory, its class, and the stem of its weight files if it has weights."""

    part: str
    class_name: str
    stem: str | None


def names_in(directory: Path) -> list[str]:
    """Return the names of what lies in a directory; none for one that is not there."""
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: UserError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(what, f"{path} is missing", "use a complete diffusers folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(what, f"{path} is damaged: {first_line(error)}", "copy or download it again") from error
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
    check_texts(directory, f"Cannot load the {component.part} of {folder}")
    if component.stem is None:
        return []
    if not (directory / "config.json").is_file():
        raise UserError(what, f"{directory / 'config.json'} is missing", "use a complete diffusers folder")
    return check_files(directory, component.stem, variant, what)


def check_texts(directory: Path, what: str) -> None:
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
        why = first_line(error)
        if isinstance(error, _SLIPS):  # of the library's own, over a value that it does not look at first
            why = (
                f"a small file of it holds something of another kind than is read there ({type(error).__name__}: {why})"
            )
        raise UserError(what, why, "the file is damaged or of another model: get it again") from error
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


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
