"""Whole inputs of every kind that a run reads, and the random changes that break them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fuzz.changes import (
    TEXTS,
    mutated,
    mutated_json,
    mutated_mesh,
    mutated_tensors,
    mutated_yaml,
    near_text,
    state_changed,
    tree_changed,
)
from benchmarks.fuzz.samples import mesh_samples
from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.model import Config

_VALUES = "0 1 -1 2 0.5 1e9 true none auto 1,2 [0.03,0.003] [0.03,0.003,0,1,cosine] [1,0,1,0] sds ism pocket reference "
_VALUES += "{name:\\ ism} glb,stl glb,glb python:x clip: y front 4x4 08 1_000 0x10 1e3"
_UNET = "unet/diffusion_pytorch_model.safetensors"
Read = Callable[[], object]


class Inputs:
    """The whole inputs that are mutated, and what reads each kind of them; files lie in `folder`.

    A kind is a function (rng) -> (the input as bytes, a function that reads it).
    """

    def __init__(self, folder: Path) -> None:
        import yaml

        from pipeline.config.recipes import recipes
        from stages.pocket.models import WEIGHTS

        self._folder, self._number = folder, 0
        self.kinds: dict[str, Callable[[random.Random], tuple[bytes, Read]]] = {
            "config": self._config,
            "override": self._override,
            "mesh": self._mesh,
            "run": self._run,
            "model": self._model,
            "clip": self._clip,
            "lora": self._lora,
        }
        self._recipes = [path.read_bytes() for path in recipes().values()]
        self._meshes = mesh_samples(folder / "meshes")
        self._whole_run = _run_files(folder / "whole")
        self._settings = list(_dotted(yaml.safe_load(self._whole_run["config.yaml"])))
        for space in ("pixel", "latent"):  # what is loaded or compiled at first is not the first input's time
            _check(WEIGHTS / space)
        _ask_clip(WEIGHTS / "clip")
        _start_from(folder / "meshes" / "plain.stl")

    def _new(self, name: str) -> Path:
        """A path in a folder of its own; the one before is gone."""
        shutil.rmtree(self._folder / f"{self._number}", ignore_errors=True)
        self._number += 1
        path = self._folder / f"{self._number}" / name
        path.parent.mkdir()
        return path

    def _config(self, rng: random.Random) -> tuple[bytes, Read]:
        from pipeline import load_config

        source = self._whole_run["config.yaml"] if rng.random() < 0.5 else rng.choice(self._recipes)
        data, path = mutated_yaml(source.decode(), rng), self._new("config.yaml")
        path.write_bytes(data)
        return data, lambda: _check_config(load_config(path), path.with_name("again.yaml"))

    def _override(self, rng: random.Random) -> tuple[bytes, Read]:
        from pipeline import load_config

        words = []
        for _ in range(rng.randint(1, 2)):
            key, value = rng.choice(self._settings)
            text = near_text(value, rng) if rng.random() < 0.7 else rng.choice((*_VALUES.split(), *TEXTS))
            words.append(f"{key}={text}".encode())
        words[-1] = mutated(words[-1], rng) if rng.random() < 0.2 else words[-1]
        texts = [word.decode("utf-8", "surrogateescape") for word in words]
        return b" ".join(words), lambda: _check_config(load_config(None, texts), self._new("again.yaml"))

    def _mesh(self, rng: random.Random) -> tuple[bytes, Read]:
        """A mesh's file with those beside it, one of them mutated."""
        name = rng.choice(sorted(self._meshes))
        files, path = self._meshes[name], self._new(name)
        other = name if rng.random() < 0.7 else rng.choice(sorted(files))
        data = mutated_mesh(files[other], Path(other).suffix, rng)
        for beside, content in files.items():
            (path.parent / beside).write_bytes(data if beside == other else content)
        return data, lambda: _start_from(path)

    def _run(self, rng: random.Random) -> tuple[bytes, Read]:
        """A run's folder with one of its files mutated, read as `pipeline resume`, a run from it and Python do."""
        name = rng.choice(("run.json", "coarse/checkpoint.safetensors", "config.yaml", "metrics.jsonl"))
        source = self._whole_run[name]
        if name == "run.json":
            data = mutated_json(source.decode(), rng)
        elif name == "config.yaml":
            data = mutated_yaml(source.decode(), rng)
        elif name == "metrics.jsonl":
            lines = source.splitlines()
            lines[rng.randrange(len(lines))] = mutated_json(lines[0].decode(), rng)
            data = b"\n".join(lines) + b"\n" if rng.random() < 0.5 else mutated(source, rng)
        else:
            data = mutated_tensors(source, rng) if rng.random() < 0.5 else self._checkpoint_changed(rng)
        folder = self._new("run")
        for other, whole in self._whole_run.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(data if other == name else whole)
        return data, lambda: _read_run(folder)

    def _checkpoint_changed(self, rng: random.Random) -> bytes:
        """A checkpoint whose tensors or facts are others, with a checksum that is right."""
        from pipeline.runs.checkpoint import load_checkpoint, save_checkpoint

        path = self._folder / "changed"
        state, meta = load_checkpoint(self._folder / "whole" / "checkpoint")
        if rng.random() < 0.2:
            state = {"a": state["a"][:1].double()} if rng.random() < 0.5 else {"b": state["a"]}
        else:
            meta = tree_changed(meta, rng)
            meta = meta if isinstance(meta, dict) else {}
        save_checkpoint(path, state, meta)
        return path.read_bytes()

    def _model(self, rng: random.Random) -> tuple[bytes, Read]:
        """A model's folder with one of its files mutated, as `pipeline models check` reads it."""
        from stages.pocket.models import WEIGHTS

        data, folder = self._folder_changed(WEIGHTS / rng.choice(("pixel", "latent")), rng)
        return data, lambda: _check(folder)

    def _clip(self, rng: random.Random) -> tuple[bytes, Read]:
        """A CLIP's folder with one of its files mutated, loaded and asked."""
        from stages.pocket.models import WEIGHTS

        data, folder = self._folder_changed(WEIGHTS / "clip", rng)
        return data, lambda: _ask_clip(folder)

    def _lora(self, rng: random.Random) -> tuple[bytes, Read]:
        """Personal weights of the pocket prior, a file or a folder, mutated, as a run that is given them reads them."""
        from pipeline import load_config
        from pipeline.priors.sources import check_priors

        if rng.random() < 0.25:
            data, path = self._dreambooth_changed(rng)
        else:
            data, path = _lora_changed(rng), self._new("mine.safetensors")
            path.write_bytes(data)
        settings = {"prior.lora": str(path), "prior.lora_stages": ["coarse"]}
        return data, lambda: check_priors(load_config(None, settings))

    def _folder_changed(self, source: Path, rng: random.Random) -> tuple[bytes, Path]:
        """What one file of a model's folder became, and the folder with it and links to the others."""
        names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        name = rng.choice([name for name in names if name.parts[0] != "layout"])
        whole = (source / name).read_bytes()
        data = mutated_json(whole.decode(), rng) if name.suffix == ".json" else mutated_tensors(whole, rng)
        return f"{name}: ".encode() + data[:2000], self._folder_with(source, name, data)

    def _dreambooth_changed(self, rng: random.Random) -> tuple[bytes, Path]:
        """What one file of a whole model that is given as personal weights became, and its folder."""
        from safetensors.torch import load, save

        from stages.pocket.models import WEIGHTS

        source = WEIGHTS / "pixel"
        name = rng.choice(("scheduler/scheduler_config.json", "text_encoder/model.safetensors", _UNET))
        whole = (source / name).read_bytes()
        if name.startswith("scheduler"):
            data = mutated_json(whole.decode(), rng)
        else:
            data = mutated_tensors(whole, rng) if name == _UNET else save(state_changed(load(whole), rng))
        return f"{name}: ".encode() + data[:2000], self._folder_with(source, Path(name), data)

    def _folder_with(self, source: Path, name: Path, data: bytes) -> Path:
        """A model's folder with other content in one file, and links to the others."""
        folder = self._new("model")
        for other in (path.relative_to(source) for path in source.rglob("*") if path.is_file()):
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            if other == name:
                (folder / other).write_bytes(data)
            else:
                (folder / other).symlink_to(source / other)
        return folder


def _start_from(path: Path) -> None:
    """As the fine stage begins with a mesh, on a coarse lattice."""
    from stages.mesh.files.read import read_mesh
    from stages.mesh.place import PlaceSettings, place, without_far_specks
    from stages.mesh.tets.solidify import dmtet_from_mesh
    from stages.mesh.tets.tetrahedra import Lattice

    mesh, _ = place(without_far_specks(read_mesh(path))[0], PlaceSettings())
    dmtet_from_mesh(mesh, Lattice(16))


def _dotted(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """All settings and groups of a configuration, by dotted name."""
    for name, value in tree.items():
        yield above + name, value
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{name}.")


def _check_config(config: Config, again: Path) -> None:
    """As `pipeline run` does before any work; and what a run writes of it, to `again`, reads back as the same."""
    from pipeline import load_config
    from pipeline.config.written import dump_read, read_part
    from pipeline.priors.folders import FolderSource
    from pipeline.priors.sources import check_priors, parse_source
    from pipeline.runs.inputs import check_inputs

    config = read_part(config)
    text = dump_read(config)
    again.write_text(text, encoding="utf-8")
    if dump_read(load_config(again)) != text:
        raise AssertionError("what is written of a configuration reads back as another")
    check_inputs(config)
    sources = [parse_source(getattr(config.prior, stage)) for stage in config.stages]
    if not any(isinstance(source, FolderSource) for source in sources):  # which would ask the hub
        check_priors(config)


def _check(folder: Path) -> None:
    """As `pipeline models check`, and on to what a run looks at first."""
    from stages.guidance.diffusion.audit import audit
    from stages.guidance.diffusion.plan import make_plan
    from stages.guidance.diffusion.settings import DiffusionSettings

    for finding in audit(folder):
        if not finding.ok:
            raise UserError(finding.part, finding.detail, finding.fix)
    make_plan(folder, DiffusionSettings(), ["a red mug"])


def _ask_clip(folder: Path) -> None:
    """As a CLIP that guides is loaded and used."""
    import torch

    from stages.guidance.clip import ClipScorer

    with torch.no_grad():
        ClipScorer(folder).scores(torch.full((1, 32, 32, 3), 0.5), ["a red mug"])


def _lora_changed(rng: random.Random) -> bytes:
    """The file of personal weights with its header, one of its tensors or its adapter's facts mutated."""
    from safetensors.torch import save

    state, facts = rng.choice((_lora_of_diffusers, _lora_of_diffusers, _lora_of_kohya, _whole_layer))()
    change = rng.random()
    if change < 0.3:
        return mutated_tensors(save(state, facts), rng)
    if facts and change < 0.65:
        return save(state, {key: mutated_json(text, rng).decode("utf-8", "replace") for key, text in facts.items()})
    return save(state_changed(state, rng), facts)


def _lora_of_diffusers() -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a LoRA of the pixel prior as diffusers names them, and its file's facts."""
    import torch

    layer = "unet.mid_block.attentions.0.to_q"
    state = {"lora_A.weight": torch.ones(2, 192), "lora_B.weight": torch.zeros(192, 2), "alpha": torch.tensor(2.0)}
    adapter = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}, "unet.alpha_pattern": {"to_q": 1}}
    return {f"{layer}.{name}": tensor for name, tensor in state.items()}, {"lora_adapter_metadata": json.dumps(adapter)}


def _lora_of_kohya() -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a LoRA of the pixel prior's denoiser and text encoder as kohya names them; no facts."""
    import torch

    state: dict[str, Any] = {}
    layers = {"unet_mid_block_attentions_0_to_q": 192, "te_text_model_encoder_layers_0_self_attn_q_proj": 128}
    for layer, size in layers.items():
        state[f"lora_{layer}.lora_down.weight"] = torch.ones(2, size)
        state[f"lora_{layer}.lora_up.weight"] = torch.zeros(size, 2)
        state[f"lora_{layer}.alpha"] = torch.tensor(2.0)
    return state, {}


def _whole_layer() -> tuple[dict[str, Any], dict[str, str]]:
    """Whole weights of one layer of the pixel prior, as DreamBooth leaves them; no facts."""
    import torch

    layer = "unet.mid_block.attentions.0.to_k"
    return {f"{layer}.weight": torch.ones(192, 192)}, {}


def _read_run(folder: Path) -> None:
    """As `pipeline resume`, `pipeline run --from` and the calls of Python read a run, one after the other."""
    from pipeline import load_config
    from pipeline.runs.checkpoint import CHECKPOINT, load_checkpoint
    from pipeline.runs.inputs import check_inputs
    from pipeline.runs.log import Metrics, Record
    from pipeline.runs.result import Result
    from pipeline.runs.run import read_run, stands

    refused: UserError | None = None

    def resume() -> None:
        if not stands(folder, read_run(folder)):
            Record(folder)
            Metrics(folder).rewind("coarse", 1, ("fine",))
        load_checkpoint(folder / "coarse" / CHECKPOINT)

    def begin() -> None:
        check_inputs(load_config(None, {"stages": "fine", "from_run": str(folder)}))

    def look() -> None:
        result = Result(folder)
        _ = result.status, result.seconds, result.files, result.metrics, result.config

    for read in (resume, begin, look):
        try:
            read()
        except UserError as error:
            if isinstance(error.__cause__, Exception):
                raise  # for the fuzzer to look at
            refused = error
    if refused is not None:
        raise refused


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
    rows = [{"stage": "coarse", "step": step, "seconds": 0.5, "loss": 1.0} for step in (1, 2)]
    return {
        "metrics.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
        "config.yaml": dump_read(config).encode(),
        "run.json": json.dumps(record).encode(),
        "coarse/checkpoint.safetensors": (folder / "checkpoint").read_bytes(),
    }
