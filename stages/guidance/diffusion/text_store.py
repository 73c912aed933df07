"""Embeddings kept on disk: the prompts of a run that is resumed or repeated need no text encoder, which for T5-XXL is
ten gigabytes to read.

A file holds the embeddings of one list of prompts, as they were embedded together: an encoder's last bits depend on the
batch, and the same run is to see the same bytes. Its name is a hash of that list and of all that the embeddings come
from: the encoders' and tokenizers' files by size and time, precision, device and versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import UserError
from stages.paths import cache_folder

MOST = 2 << 30  # bytes kept; the ones that were not used for longest go


class TextStore:
    """Embeddings of lists of prompts, on disk.

    Args:
        folder: where they lie; made when it is needed.
        source: all that they come from, as text.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._source = folder, source

    def _path(self, prompts: list[str]) -> Path:
        key = json.dumps([self._source, prompts])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def load(self, prompts: list[str]) -> Tensor | None:
        """Return the embeddings [P, L, D] of these prompts on the CPU; None where they are not there, or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(prompts)
        try:
            embeddings = load_file(path)["embeddings"]
            os.utime(path)
        except (OSError, KeyError, SafetensorError):
            return None
        return embeddings if len(embeddings) == len(prompts) else None

    def save(self, prompts: list[str], embeddings: Tensor) -> None:
        """Keep the embeddings [P, L, D] of these prompts; a disk that is full or read-only keeps nothing."""
        from safetensors.torch import save_file

        path = self._path(prompts)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                save_file({"embeddings": embeddings.cpu().contiguous()}, partial)
                partial.replace(path)
                self._shrink()
            finally:
                partial.unlink(missing_ok=True)

    def _shrink(self) -> None:
        files = [(path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*.safetensors")]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MOST:
                return
            path.unlink(missing_ok=True)
            total -= size


def text_store(folder: Path, parts: list[str], dtype: torch.dtype, device: torch.device) -> TextStore | None:
    """Return the store of a model's embeddings; None for a user without a home.

    Args:
        folder: the model's.
        parts: its encoders and tokenizers.
        dtype: of the encoders and of what they give.
        device: where the encoders run.
    """
    import transformers

    files = {
        f"{part}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns]
        for part in parts
        for path in sorted((folder / part).iterdir())
        if path.is_file()
    }
    facts = [str(folder), files, str(dtype), device.type, torch.__version__, transformers.__version__]
    try:
        return TextStore(cache_folder() / "embeddings", json.dumps(facts))
    except UserError:
        return None
