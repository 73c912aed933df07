"""Checkpoints: safetensors with their own checksum, whole or absent. Only safetensors and JSON are read back."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.export.files import write_whole
from stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_META = "pipeline"  # the one metadata entry of a checkpoint: JSON


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half written below `folder`."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a flat state and JSON-able meta to `path`, atomically, with a checksum over the tensors."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    meta = meta | {"crc32": _checksum(tensors)}
    write_whole(path, save(tensors, metadata={_META: json.dumps(meta)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what save_checkpoint wrote. Raises UserError where the file is cut short, altered or something else."""
    state, meta = _read(path, tensors=True)
    if meta.get("crc32") != _checksum(state):
        raise _damaged(path, "its checksum does not match its contents")
    return state, meta


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint alone: step, steps, seconds, phases."""
    return _read(path, tensors=False)[1]


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[_META])
            names = file.keys() if tensors else []
            return {name: file.get_tensor(name) for name in names}, meta
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from None


def _damaged(path: Path, why: str) -> UserError:
    fix = f"remove it and `pipeline resume {path.parent.parent}` starts its stage again from the beginning"
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
    """A JSON object from a file of a run folder. Raises UserError with `fix` where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"damaged file {path}", str(error), fix) from None
    if not isinstance(value, dict):
        raise UserError(f"damaged file {path}", "it does not hold a JSON object", fix)
    return value
