"""The start of a run: nothing, a finished coarse stage of another run, or a user's mesh. Checked before any work.

What it starts from is copied into the run's folder, which then stands on its own:
    RUN/coarse/checkpoint.safetensors   the coarse stage of --from that the fine stage refines
    RUN/start/checkpoint.safetensors    the coarse stage of --from that this run's coarse stage edits
    RUN/start/picture.png               the picture of --image, in its own format; start/depth.png its depth
    RUN/start/mesh.safetensors          the mesh of --init-mesh as it was read
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.model import read_config
from pipeline.output.surface import GENERATOR
from pipeline.runs import stages
from pipeline.runs.checkpoint import STEPS, load_checkpoint, read_meta, save_checkpoint
from pipeline.runs.folder import open_folder
from pipeline.runs.lineage import EDITED, GIVEN, afresh, check_settings, checkpoint_of, remedy, upstream_of
from stages.errors import UserError
from stages.kinds import STAGES, beginners, chains
from stages.picture import Picture, read_picture

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config
    from stages.mesh.mesh import Mesh
    from stages.stage import Asset

PICTURE, DEPTH = "start/picture", "start/depth"  # without the ending, which is the file's
_PARTS = ("vertices", "faces", "colours", "uv", "uv_faces", "texture", "normals", "face_materials")
_FINISH = ("metallic", "roughness")


@dataclass
class Inputs:
    """The start of a new run.

    Args:
        copies: files of another run, by their place in the new folder.
        mesh: of --init-mesh, which of its axes points up where the settings leave it to the format, and its format.
        note: in a line for the user, empty where there is nothing to say.
    """

    copies: dict[str, Path] = field(default_factory=dict)
    mesh: Mesh | None = None
    up: str = "y"
    format: str = ""
    note: str = ""

    def write(self, folder: Path) -> None:
        """Put the files into a new run's folder."""
        for place, source in self.copies.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / place)
        if self.mesh is not None:
            import torch

            parts = {name: getattr(self.mesh, name) for name in _PARTS}
            state = {name: torch.from_numpy(part.copy()) for name, part in parts.items() if part is not None}
            finish = {name: getattr(self.mesh, name) for name in _FINISH}
            finish["materials"] = [[m.name, m.metallic, m.roughness] for m in self.mesh.materials or ()]
            save_checkpoint(folder / GIVEN, state, {"up": self.up, "format": self.format} | finish)


def check_inputs(config: Config) -> Inputs:
    """Find and check what a new run starts from. UserError where it is missing, unfinished, damaged or of no use."""
    inputs = _check_start(config)
    if config.image.file is None:
        if config.image.depth_file is not None:
            why = "image.file names no picture"
            raise UserError("image.depth_file has no use here", why, "give --image, or leave it out")
        return inputs
    if not all(STAGES[name].pictures for name in config.stages):
        why = f"{config.stages[0]} holds on to no picture"
        raise UserError(f"--image {config.image.file} has no use here", why, "choose --stages coarse,fine")
    file, depth_file = _pictures(config)
    picture = read_picture(config.image, file, depth_file)
    share = f"{100 * float(picture.mask.mean()):.0f} % of the frame"
    view = f"azimuth {config.image.azimuth_deg:g}, elevation {config.image.elevation_deg:g} degrees"
    inputs.copies |= {_place_of(PICTURE, file): file}
    inputs.copies |= {} if depth_file is None else {_place_of(DEPTH, depth_file): depth_file}
    inputs.note = "; ".join(filter(None, [inputs.note, f"held to {file.name}, {share}, seen from {view}"]))
    return inputs


def _pictures(config: Config) -> tuple[Path, Path | None]:
    depth_file = config.image.depth_file
    return Path(config.image.file), None if depth_file is None else Path(depth_file)


def _place_of(name: str, file: Path) -> str:
    return f"{name}{file.suffix.lower()}"


def load_picture(folder: Path, config: Config) -> Picture | None:
    """Read the picture that a run holds on to, out of its own folder; None for a run without one."""
    if config.image.file is None:
        return None
    file, depth_file = _pictures(config)
    depth_copy = None if depth_file is None else folder / _place_of(DEPTH, depth_file)
    return read_picture(config.image, folder / _place_of(PICTURE, file), depth_copy)


def _check_start(config: Config) -> Inputs:
    first = config.stages[0]
    kind = STAGES[first]
    if config.init_mesh is not None:
        return _from_mesh(config, first)
    if config.from_run is None and "nothing" not in kind.begins_with:
        raise UserError(
            f"--stages {','.join(config.stages)} lacks a beginning",
            f"the run begins with {first}, which starts from {kind.start}",
            f"choose another --stages, such as {','.join(chains()[0])}, or give --from or --init-mesh",
        )
    if config.from_run is None:
        return Inputs(note=f"fine starts from a sphere of radius {config.fine.sphere:g}" if first == "fine" else "")
    if "run" not in kind.begins_with:
        raise UserError(
            f"--from {config.from_run} has no use here",
            f"the run begins with {first}, which starts from {kind.start}",
            f"leave it out, or choose --stages {','.join(chains()[0])}",
        )
    base = kind.follows or first  # the stage of the other run that this one refines, or edits
    source, meta = _finished(Path(config.from_run), base)
    theirs = read_config(source)
    if kind.follows is not None:
        if getattr(theirs, base) != getattr(config, base):
            raise UserError(
                f"{base}.* differs from {source}",
                f"its {base} stage was made with other settings and is not made again",
                f"leave {base}.* as in {source / 'config.yaml'}",
            )
        steps = getattr(config, base).steps
        if meta["step"] < steps:  # raised in its config.yaml since
            raise UserError(
                f"--from {source} has not taken all its {base} steps",
                f"its config.yaml asks for {steps}, it stands at step {meta['step']}",
                f"set {base}.steps={meta['step']} there, or go on with it first: pipeline resume {source}",
            )
    file = checkpoint_of(base)
    check_settings(source / file, meta, config, base, f"as when {source / 'config.yaml'} was written")
    if kind.follows is not None:
        return Inputs({file: source / file})
    note = f'{base} goes on from step {meta["step"]} of {source}, "{theirs.prompt}", as "{config.prompt}"'
    return Inputs({EDITED: source / file}, note=note)


def _from_mesh(config: Config, first: str) -> Inputs:
    from stages.mesh.files.read import GREY, read_mesh
    from stages.mesh.place import place

    if "mesh" not in STAGES[first].begins_with:
        raise UserError(
            f"--init-mesh {config.init_mesh} has no use here",
            f"the run begins with {first}, which starts from {STAGES[first].start}",
            f"choose {' or '.join(f'--stages {name}' for name in beginners('mesh'))}",
        )
    if config.from_run is not None:
        raise UserError(
            "--from and --init-mesh were both given",
            f"the {first} stage starts from one thing",
            "leave one of them out",
        )
    path = Path(config.init_mesh)
    mesh, up = read_mesh(path), _up(path)
    specks = _body_of(mesh, config)[1]
    place(mesh, config.place, up)  # refuses a mesh without extent, or outside the scene
    coats = "its texture" if mesh.texture is not None else "its colours"
    if mesh.texture is None and (mesh.colours == GREY).all():
        coats = "plain grey, for it has none"
    use = "is painted and keeps its shape" if _is_locked(config) else "is refined"
    note = f"{path.name}, {len(mesh.faces)} faces, {use}, starting with {coats}"
    if specks:
        note += f"; left out are specks far away ({specks}), which would make the rest small in the scene"
    return Inputs(mesh=mesh, up=up, format=path.suffix.lower()[1:], note=note)


def _up(path: Path) -> str:
    """The axis that points up in a file of this kind: z in STL, which printers and CAD write; y in the others.

    Our own STL files say in their header who wrote them, and which axis points up where it is not y.
    """
    if path.suffix.lower() != ".stl":
        return "y"
    with open(path, "rb") as file:
        header = re.match(rf"{GENERATOR}(?: (-?[xyz]) up)?", file.read(80).decode("latin-1"))
    return "z" if header is None else header.group(1) or "y"


def _finished(source: Path, stage: str) -> tuple[Path, dict[str, Any]]:
    """A run's folder and the meta of its stage of that name. Raises UserError where that is not finished."""
    open_folder(source)
    path = source / checkpoint_of(stage)
    what = f"--from {source} has no finished {stage} stage"
    theirs = read_config(source)
    if not path.is_file():
        fix = f"pipeline resume {source}, or another run" if stage in theirs.stages else "another run"
        raise UserError(what, f"no {path}", fix)
    meta = read_meta(path, remedy(source, theirs, stage), STEPS)
    if meta["step"] < meta["steps"]:
        raise UserError(what, f"it stands at step {meta['step']} of {meta['steps']}", f"pipeline resume {source}")
    return source, meta


def load_inputs(folder: Path, config: Config, device: torch.device) -> Asset | None:
    """Load what the first stage of a run starts from, out of its own folder; None for nothing."""
    first = config.stages[0]
    file = upstream_of(config, first)
    if file == GIVEN:
        return _given_mesh(folder, config)
    if file != EDITED:
        return None
    state, _ = _loaded(folder, config, EDITED)
    stage = stages.make_stage(first, getattr(config, first), None, device, config.seed, None)
    stage.load_state_dict(state)
    return stage.finish()


def _given_mesh(folder: Path, config: Config) -> Asset:
    from stages.mesh.mesh import Material, Mesh
    from stages.mesh.place import place
    from stages.stage import Asset

    state, meta = _loaded(folder, config, GIVEN)
    finish = {name: meta[name] for name in _FINISH}
    finish["materials"] = tuple(Material(*material) for material in meta["materials"]) or None
    mesh = Mesh(**{name: part.numpy() for name, part in state.items()}, **finish)
    mesh, placement = place(_body_of(mesh, config)[0], config.place, meta["up"], meta["format"])
    return Asset(mesh=mesh, placement=placement)


def _is_locked(config: Config) -> bool:
    return config.stages[0] == "fine" and config.fine.geometry == "locked"


def _body_of(mesh: Mesh, config: Config) -> tuple[Mesh, int]:
    """What of a user's mesh a run starts from, and how many specks are left out: none where its triangles are kept."""
    from stages.mesh.place import without_far_specks

    return (mesh, 0) if config.stages[0] != "fine" or _is_locked(config) else without_far_specks(mesh)


def _loaded(folder: Path, config: Config, file: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = folder / file
    try:
        return load_checkpoint(path)
    except (UserError, OSError) as error:
        why = error.why if isinstance(error, UserError) else str(error)
        raise UserError(f"what {folder} started from is damaged: {path}", why, afresh(folder, config)) from None
