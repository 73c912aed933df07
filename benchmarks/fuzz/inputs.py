"""Whole inputs of every kind that a run reads, and the random changes that break them."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TEXTS = [
    *("\x00", "\x07", "&a [*a]", "*a", "!!int x", "!!binary x", "{", "}", "[", "]", ": ", "- ", "? ", "|", ">", "%"),
    *("nan", ".inf", "1e999", "-1", "0", "true", "null", "~", "9" * 400, "9" * 5000, "\N{HOT BEVERAGE}", "\u202e"),
    *("\t", "\r", "<<: *a", "[" * 60, "{a: " * 60, "prompt", "stages", "coarse", "steps", "rule", "name", "---"),
    *("'", '"', "extends: default"),
]
_NUMBERS = (b"0", b"-1", b"1e999", b"nan", b"inf", b"4294967295", b"99999999999", b"-2147483649", b"1e-400", b"")
_KEYS = "prompt seed stages coarse.steps coarse.lr fine.tets guidance.coarse.rule prior.fine fine export.formats "
_KEYS += "prompts.per_view coarse.field.levels reference.mesh coarse.steps.x"
Read = Callable[[], object]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four random changes: cut, emptied, repeated, overwritten, numbers made extreme."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 16, 400)))
        change = rng.randrange(8)
        if change == 0:
            data = data[:a]
        elif change == 1:
            data = data[:a] + data[b:]
        elif change == 2:
            data = data[:b] + data[a:b] * rng.choice((1, 3)) + data[b:]
        elif change == 3:
            data = data[:a] + rng.choice(_TEXTS).encode() + data[b:]
        elif change == 4:
            data = data[:a] + rng.randbytes(b - a) + data[b:]
        elif change == 5:
            data = data[:a] + rng.choice((b"\xff", b"\x00", b"\xe9", b"\n")) * (b - a) + data[b:]
        elif change == 6:
            data = _number_changed(data, rng)
        elif rng.random() < 0.1:
            data = b""
    return data


def _number_changed(data: bytes, rng: random.Random) -> bytes:
    starts = [i for i in range(1, len(data)) if data[i] in b"0123456789" and data[i - 1] in b" :-="]
    if not starts:
        return data
    a = rng.choice(starts)
    b = next((i for i in range(a, len(data)) if data[i] not in b"0123456789.eE+-"), len(data))
    return data[:a] + rng.choice(_NUMBERS) + data[b:]


def mutated_json(text: str, rng: random.Random) -> bytes:
    """Return JSON with one value of another type, or without one; or its bytes mutated."""
    if rng.random() < 0.3:
        return mutated(text.encode(), rng)
    root = json.loads(text)
    places = list(_places(root))
    odd = [None, True, -1, 0, 1e308, 10**30, "", "x", [], {}, [[]], {"a": []}, "\ud800", float("nan")]
    if not places or rng.random() < 0.05:
        return json.dumps(rng.choice(odd)).encode()
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(odd)
    return json.dumps(root).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(min(len(value), 20)):
        yield value, key
        yield from _places(value[key])


def mutated_tensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with its header mutated or its end cut."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    header = mutated_json(data[8:end].decode(), rng)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**20))
    return length.to_bytes(8, "little") + header + data[end:]


class Inputs:
    """The whole inputs that are mutated, and what reads each kind of them; files lie in `folder`.

    A kind is a function (rng) -> (the input as bytes, a function that reads it).
    """

    def __init__(self, folder: Path) -> None:
        from pipeline.config.recipes import recipes
        from stages.pocket.models import WEIGHTS

        self._folder, self._number = folder, 0
        self.kinds: dict[str, Callable[[random.Random], tuple[bytes, Read]]] = {
            "config": self._config,
            "override": self._override,
            "mesh": self._mesh,
            "run": self._run,
            "model": self._model,
        }
        self._recipes = [path.read_bytes() for path in recipes().values()]
        self._meshes = _meshes(folder / "meshes")
        self._whole_run = _run_files(folder / "whole")
        for space in ("pixel", "latent"):  # what the libraries load at first is not the first input's time
            _check(WEIGHTS / space)

    def _new(self, name: str) -> Path:
        """A path in a folder of its own; the one before is gone."""
        shutil.rmtree(self._folder / f"{self._number}", ignore_errors=True)
        self._number += 1
        path = self._folder / f"{self._number}" / name
        path.parent.mkdir()
        return path

    def _config(self, rng: random.Random) -> tuple[bytes, Read]:
        from pipeline import load_config
        from pipeline.config.written import dump_read

        source = self._whole_run["config.yaml"] if rng.random() < 0.5 else rng.choice(self._recipes)
        data, path = mutated(source, rng), self._new("config.yaml")
        path.write_bytes(data)
        return data, lambda: dump_read(load_config(path))

    def _override(self, rng: random.Random) -> tuple[bytes, Read]:
        from pipeline import load_config

        word = f"{rng.choice(_KEYS.split())}={rng.choice(_TEXTS)}{rng.choice(('', *_TEXTS))}"
        data = mutated(word.encode(), rng) if rng.random() < 0.5 else word.encode()
        return data, lambda: load_config(None, [data.decode("utf-8", "surrogateescape")])

    def _mesh(self, rng: random.Random) -> tuple[bytes, Read]:
        from stages.mesh.files.read import read_mesh
        from stages.mesh.place import PlaceSettings, place

        name = rng.choice(sorted(self._meshes))
        data, path = mutated(self._meshes[name], rng), self._new(name)
        path.write_bytes(data)
        return data, lambda: place(read_mesh(path), PlaceSettings())

    def _run(self, rng: random.Random) -> tuple[bytes, Read]:
        """A run's folder with one of its files mutated, read as `pipeline resume` and the calls of Python read it."""
        name = rng.choice(("run.json", "coarse/checkpoint.safetensors"))
        source = self._whole_run[name]
        data = mutated_json(source.decode(), rng) if name == "run.json" else mutated_tensors(source, rng)
        folder = self._new("run")
        for other, whole in self._whole_run.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(data if other == name else whole)
        return data, lambda: _read_run(folder)

    def _model(self, rng: random.Random) -> tuple[bytes, Read]:
        """A model's folder with one of its files mutated, as `pipeline models check` reads it."""
        from stages.pocket.models import WEIGHTS

        source = WEIGHTS / rng.choice(("pixel", "latent"))
        names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        name = rng.choice([name for name in names if name.parts[0] != "layout"])
        folder = self._new("model")
        for other in names:
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).symlink_to(source / other)
        whole = (source / name).read_bytes()
        data = mutated_json(whole.decode(), rng) if name.suffix == ".json" else mutated_tensors(whole, rng)
        (folder / name).unlink()
        (folder / name).write_bytes(data)
        return f"{name}: ".encode() + data[:2000], lambda: _check(folder)


def _check(folder: Path) -> None:
    """As `pipeline models check`, and on to what a run looks at first."""
    from stages.guidance.diffusion.audit import audit
    from stages.guidance.diffusion.plan import make_plan
    from stages.guidance.diffusion.settings import DiffusionSettings

    if all(finding.ok for finding in audit(folder)):
        make_plan(folder, DiffusionSettings(), ["a red mug"])


def _read_run(folder: Path) -> None:
    from pipeline.runs.checkpoint import CHECKPOINT, load_checkpoint
    from pipeline.runs.result import Result
    from pipeline.runs.run import read_run, stands

    if stands(folder, read_run(folder)):
        load_checkpoint(folder / "coarse" / CHECKPOINT)
        result = Result(folder)
        _ = result.status, result.seconds, result.files


def _meshes(folder: Path) -> dict[str, bytes]:
    """A small solid in every format that is read, with and without colours or texture, by file name."""
    import trimesh

    from pipeline.output.write import write_mesh
    from stages.mesh.mesh import Mesh

    folder.mkdir()
    ball = trimesh.creation.icosphere(subdivisions=0)
    vertices, faces = ball.vertices.astype(np.float32), ball.faces.astype(np.int32)
    uv, texture = np.abs(vertices[:, :2]), np.full((8, 8, 3), 99, np.uint8)
    write_mesh(Mesh(vertices, faces, uv=uv, uv_faces=faces, texture=texture), folder / "textured.glb")
    write_mesh(Mesh(vertices, faces, np.abs(vertices)), folder / "coloured.ply")
    ball.export(folder / "plain.stl")
    ball.export(folder / "plain.obj")
    (folder / "text.stl").write_text(trimesh.exchange.stl.export_stl_ascii(ball))
    (folder / "text.ply").write_bytes(trimesh.exchange.ply.export_ply(ball, encoding="ascii"))
    (folder / "embedded.gltf").write_text(_embedded(ball))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".png", ".mtl")}


def _embedded(mesh: Any) -> str:
    """A glTF file whose buffers are data URIs."""
    files = mesh.export(file_type="gltf")
    root = json.loads(files.pop("model.gltf"))
    for buffer in root["buffers"]:
        data = base64.b64encode(files[buffer["uri"]]).decode()
        buffer["uri"] = f"data:application/octet-stream;base64,{data}"
    return json.dumps(root)


def _run_files(folder: Path) -> dict[str, bytes]:
    """The small files of a run's folder, as a run of the coarse stage leaves them, by their place."""
    import torch

    from pipeline import load_config
    from pipeline.config.written import dump_read
    from pipeline.runs.checkpoint import save_checkpoint
    from pipeline.runs.lineage import lineage

    config = load_config(None, {"coarse.steps": 2}, {"stages": "coarse"})
    meta = {"stage": "coarse", "step": 2, "steps": 2, "seconds": 1.0, "phases": {}}
    save_checkpoint(folder / "checkpoint", {"a": torch.ones(3)}, meta | lineage(folder, config, "coarse"))
    facts = {"step": 2, "steps": 2, "seconds": 1.0, "phases": {"step": 1.0}}
    record = {"stages": {"coarse": facts}, "sessions": [{"peak_memory_mb": 1.0}], "prompt": config.prompt}
    record |= {"status": "finished", "outputs": ["config.yaml"], "exported_with": config.export.model_dump(mode="json")}
    return {
        "config.yaml": dump_read(config).encode(),
        "run.json": json.dumps(record).encode(),
        "coarse/checkpoint.safetensors": (folder / "checkpoint").read_bytes(),
    }
