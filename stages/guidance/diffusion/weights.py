"""The contents of a safetensors file by its header: names, shapes, types and bytes, without loading a weight.

Format: eight bytes, the little-endian length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets}};
then the data. A component's weights are one file `stem.safetensors` or shards `stem-00001-of-0000N.safetensors`.
"""

from __future__ import annotations

import fnmatch
import json
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError
from stages.guidance.diffusion.settings import AUTO

HALF = "fp16"  # the variant of half precision, as repositories call it
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_LARGEST_HEADER = 100_000_000  # the format's own limit, bytes


@dataclass(frozen=True)
class Header:
    """One tensor in a file: its type as safetensors spells it and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weight_files(directory: Path, stem: str, variant: str | None = None) -> list[Path]:
    """List the safetensors files of a component, shards in order; empty where there is none of that variant."""
    return [directory / name for name in weight_names([path.name for path in directory.iterdir()], stem, variant)]


def chosen_variant(names: Collection[str], stem: str, variant: str | None, half: bool) -> str | None:
    """Return the variant of the files that a part is loaded from, part by part as diffusers does; None: the plain ones.

    Args:
        names: of the files in the part's directory.
        stem: of its weight files.
        variant: asked for: by name, where the part has it; "auto", fp16 for half precision; None for the plain files.
        half: whether its network runs in half precision, for which full precision would be fetched for nothing.
    """
    if variant is None:
        return None
    wishes = ([HALF, None] if half else [None, HALF]) if variant == AUTO else [variant, None]
    return next((wish for wish in wishes if weight_names(names, stem, wish)), None)


def weight_names(names: Collection[str], stem: str, variant: str | None) -> list[str]:
    """Return those of the names that are a component's weight files of that variant, shards in order."""
    dot = f".{variant}" if variant else ""
    whole = f"{stem}{dot}.safetensors"
    return [whole] if whole in names else sorted(fnmatch.filter(names, f"{stem}{dot}-*-of-*.safetensors"))


def check_files(directory: Path, stem: str, variant: str | None, what: str) -> list[Path]:
    """Return the files of :func:`weight_files`. Raises: UserError that names what is there in their place."""
    files = weight_files(directory, stem, variant)
    expected = directory / f"{stem}{'.' + variant if variant else ''}.safetensors"
    if files:
        _check_shards(files, what)
        return files
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if others:
        raise UserError(
            what,
            f"{expected} is missing; there is {', '.join(others)}",
            "set prior.diffusion.variant to match (fp16 for model.fp16.safetensors)",
        )
    if pickled:
        raise UserError(
            what,
            f"{directory} has only pickled weights ({', '.join(pickled)}), which can run code when read",
            "convert them to safetensors (huggingface.co/docs/safetensors) or get the model's safetensors files",
        )
    raise UserError(what, f"{expected} is missing", "use a complete diffusers folder")


def _check_shards(files: list[Path], what: str) -> None:
    last = files[-1].stem.rpartition("-of-")[2]
    if "-of-" in files[-1].stem and last.isdigit() and len(files) != int(last):
        raise UserError(
            what, f"{len(files)} of {int(last)} weight files are in {files[0].parent}", "copy the missing shards"
        )


def read_header(path: Path) -> dict[str, Header]:
    """Read the tensors' headers of one safetensors file by name. Raises: UserError for a damaged file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER + 1
            if length > min(_LARGEST_HEADER, size - 8):
                raise ValueError("its header is cut short")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        headers = {name: Header(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        if not all(isinstance(header.dtype, str) for header in headers.values()):
            raise TypeError
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = error if isinstance(error, OSError | ValueError) else "its header is damaged"
        raise UserError(
            f"Cannot read {path}", f"{path.name}: {reason}", "the file is damaged: copy or download it again"
        ) from None
    return headers


def read_headers(files: list[Path]) -> dict[str, Header]:
    """Read the tensors' headers of a component's files by name."""
    return {name: header for path in files for name, header in read_header(path).items()}


def parameter_count(headers: dict[str, Header]) -> int:
    """Count the numbers in all floating-point tensors."""
    return sum(header.count for header in headers.values() if "F" in header.dtype)
