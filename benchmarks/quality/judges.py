"""Which CLIPs may judge a run: any but those that guided it, which it has been optimised to please.

A CLIP is known by its weights' bytes, so a copy of it in another folder is recognised.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from pipeline.config.model import Config, load_config, read_config
from pipeline.priors.clips import ClipSource
from pipeline.priors.sources import parse_source
from stages.errors import UserError
from stages.networks import networks_folder


@functools.cache
def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a CLIP's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def guides_of(config: Config) -> list[Path]:
    """Return the folders of the CLIPs that guide the stages of a run, or tell their networks of the prompt."""
    sources = [parse_source(getattr(config.prior, stage)) for stage in config.stages]
    folders = [source.folder for source in sources if isinstance(source, ClipSource)]
    if "points" in config.stages:
        folders.append(networks_folder(config.points.clip, "clip"))
    return list(dict.fromkeys(folders))


def judges_among(clips: list[Path], guides: list[Path]) -> list[Path]:
    """Return those of the CLIPs that did not guide."""
    guilty = {fingerprint(folder) for folder in guides}
    return [clip for clip in clips if fingerprint(clip) not in guilty]


def judges_of_run(clips: list[Path], run: Path) -> list[Path]:
    """Return those of the CLIPs that did not guide the run in a folder; all of them where there was no run."""
    return judges_among(clips, guides_of(read_config(run)) if (run / "config.yaml").is_file() else [])


def check_judges(recipes: dict[str, str | None], clips: list[Path], options: dict[str, tuple[str, ...]]) -> None:
    """Raise UserError, before any work, for CLIPs of one name, and for a system that none of them may judge.

    Args:
        recipes: by system, the recipe that it runs, or None for one without a run.
        options: by system, of its runs.
    """
    names = [clip.name for clip in clips]
    if len(set(names)) < len(names):
        raise UserError(
            f"two CLIPs are called {max(names, key=names.count)}",
            f"scores are kept by the folder's name: {', '.join(map(str, clips))}",
            "rename one of the folders",
        )
    for system, recipe in recipes.items():
        guides = [] if recipe is None else guides_of(load_config(recipe, list(options[system]), {}))
        if guides and not judges_among(clips, guides):
            raise UserError(
                f"{system} is guided by the CLIP that would judge it",
                f"{guides[0]} is what it is optimised for, and every CLIP of --clip has its weights",
                "let another judge, for example one of another seed: "
                "python -m stages.pocket.train clip --seed 1 --data data/judge --work data/judge --out data/judge, and "
                "--clip data/judge/clip",
            )
