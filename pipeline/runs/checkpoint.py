"""Checkpoints: safetensors with their own checksum, whole or absent. Only safetensors and JSON are read back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.output.files import write_whole
from stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"  # its name in the folder of its stage
_META = "pipeline"  # the one metadata entry of a checkpoint: JSON
_KINDS = {"step": int, "steps": int, "seconds": int | float, "phases": dict, "settings": dict, "upstream": dict | None}
STEPS = ("step", "steps")  # entries of a stage's checkpoint that say how far it is
_HEADER = 100_000_000  # bytes: the longest header that the format allows


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half written below `folder`."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a flat state and JSON-able meta to `path`, atomically, with a checksum over the tensors."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    pointers: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        if tensor.numel() and tensor.data_ptr() in pointers:
            tensors[name] = tensor.clone()
        pointers.add(tensor.data_ptr())
    meta = meta | {"crc32": _checksum(tensors)}
    write_whole(path, save(tensors, metadata={_META: json.dumps(meta)}))


def load_checkpoint(path: Path, fix: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what save_checkpoint wrote. Raises UserError where the file is cut short, altered or something else.

    The file is opened once and read whole: a run that replaces it meanwhile is never seen half.
    Args:
        fix: what helps then; None for a checkpoint that resuming makes again once it is removed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    meta = _meta(path, data, fix)
    try:
        state = load(data)
    except SafetensorError as error:
        raise _damaged(path, str(error), fix) from None
    if meta.get("crc32") != _checksum(state):
        raise _damaged(path, "its checksum does not match its contents", fix)
    return state, meta


def read_meta(path: Path, fix: str | None = None, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read the meta of a checkpoint alone: step, steps, seconds, phases, lineage.py's; `fix` as in load_checkpoint.

    Args:
        needs: entries without which it is refused.
    """
    with path.open("rb") as file:
        length = file.read(8)
        meta = _meta(path, length + file.read(min(int.from_bytes(length, "little"), _HEADER)), fix)
    absent = [name for name in needs if name not in meta]
    if absent:
        raise _damaged(path, f"it does not say its {absent[0]}", fix)
    return meta


def _meta(path: Path, data: bytes, fix: str | None) -> dict[str, Any]:
    """The meta in a safetensors header: its length in eight bytes, little end first, then JSON."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(end, 9):
        raise _damaged(path, "the file is cut short", fix)
    try:
        header = json.loads(data[8:end])
        notes = header.get("__metadata__") if isinstance(header, dict) else None
        text = notes.get(_META) if isinstance(notes, dict) else None
        meta = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error), fix) from None
    if not isinstance(meta, dict):
        raise _damaged(path, f"its header holds no facts of a run ({_META})", fix)
    for name, kind in _KINDS.items():
        if name in meta and not isinstance(meta[name], kind):
            raise _damaged(path, f"its {name} is {json.dumps(meta[name])[:60]}", fix)
    return meta


def _damaged(path: Path, why: str, fix: str | None) -> UserError:
    fix = fix or f"remove it and `pipeline resume {path.parent.parent}` starts its stage again from the beginning"
    return UserError(f"damaged checkpoint {path}", why.strip().split("\n")[0], fix)


def _checksum(tensors: dict[str, Tensor]) -> int:
    import torch

    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        flat = tensors[name].contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy(), crc) if flat.numel() else crc
    return crc


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object from a file of a run folder. Raises UserError with `fix` where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged file {path}", str(error), fix) from None
    if not isinstance(value, dict):
        raise UserError(f"damaged file {path}", "it does not hold a JSON object", fix)
    return value
