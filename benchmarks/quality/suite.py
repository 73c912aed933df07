"""What is asked of every system: prompts in groups, distractors, seeds. The pocket suite, or one's own caption file.

pocket_suite.json is fixed: results of different days compare only if nobody moves it. A caption file has one caption
a line (# starts a comment); its captions are each other's distractors, as in DreamFusion's 153-caption protocol.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import FOLDER
from benchmarks.quality import metrics
from stages.errors import UserError
from stages.paths import from_home
from stages.pocket import world

POCKET_SUITE = FOLDER / "pocket_suite.json"


@dataclass(frozen=True)
class Suite:
    """Prompts by group, and captions that stand beside them as candidates.

    distractors_textureless are added to those of the prompts and distractors themselves without their colours.
    """

    name: str
    groups: dict[str, list[str]]
    distractors: list[str]
    distractors_textureless: list[str]

    @property
    def prompts(self) -> list[str]:
        return [prompt for group in self.groups.values() for prompt in group]

    def candidates(self, look: str) -> list[str]:
        """Return the candidate captions of "colour" or "textureless" renders, every prompt's own among them."""
        bare = look == "textureless"
        return metrics.candidates(self.prompts, self.distractors + bare * self.distractors_textureless, bare)


def pocket_suite(quick: bool = False) -> Suite:
    """Return the fixed suite of the pocket world; `quick` keeps its four quick prompts and all its candidates."""
    data = json.loads(POCKET_SUITE.read_text(encoding="utf-8"))
    groups, distractors = data["prompts"], data["distractors"]
    if quick:
        chosen = {name: [p for p in group if p in data["quick"]] for name, group in groups.items()}
        distractors = [p for group in groups.values() for p in group if p not in data["quick"]] + distractors
        groups = {name: group for name, group in chosen.items() if group}
    name = "pocket-quick" if quick else "pocket"
    return Suite(name, groups, distractors, data["distractors_textureless"])


def read_captions(path: Path) -> list[str]:
    """Return the captions of a text file. UserError where it is missing or empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the captions of {path}", error.strerror or str(error), "check the path") from None
    captions = [" ".join(line.split("#")[0].split()) for line in lines]
    captions = list(dict.fromkeys(caption for caption in captions if caption))
    if not captions:
        raise UserError(f"{path} holds no caption", "every line is empty", "write one caption a line")
    return captions


def load_suite(prompts: str, distractors: Path | None = None, quick: bool = False) -> Suite:
    """Return the suite named on the command line: pocket, or a file of captions.

    Captions of the pocket world get its own distractors, up to a hundred candidates; others only each other and those
    of the `distractors` file.
    """
    if prompts == "pocket":
        return pocket_suite(quick)
    captions = read_captions(from_home(prompts))
    chosen = captions[:4] if quick else captions
    others = captions + (read_captions(distractors) if distractors else [])
    textureless: list[str] = []
    if all(_in_pocket_world(caption) for caption in captions):
        pocket = pocket_suite()
        others += pocket.prompts + pocket.distractors
        others = metrics.candidates(others, [], textureless=False, most=100)
        textureless = pocket.distractors_textureless
    groups: dict[str, list[str]] = {}
    for caption in chosen:
        groups.setdefault(_group(caption), []).append(caption)
    return Suite(Path(prompts).stem, groups, others, textureless)


def _in_pocket_world(caption: str) -> bool:
    return spec_of(caption) is not None


def _group(caption: str) -> str:
    spec = spec_of(caption)
    if spec is None:
        return "captions"
    return "held out" if world.held_out(spec) else "trained"


def spec_of(caption: str) -> world.Spec | None:
    """Return the pocket world's reading of a caption, None outside it."""
    try:
        return world.parse(caption)
    except ValueError:
        return None
