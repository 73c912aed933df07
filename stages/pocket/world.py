"""The pocket world: captions, the coloured mesh each one stands for, and which of them are held out.

Grammar (colour, kind and pattern words from the tables below; "an" before a vowel):
    a COLOUR KIND                       a red mug
    a COLOUR PATTERN KIND               a red striped mug
    a COLOUR KIND on a COLOUR KIND      a red ball on a blue table
    a COLOUR KIND next to a COLOUR KIND a green cube next to a yellow cone   (the first at -x, left seen from the front)
Objects face +z, stand along y, have their bounding box centred at the origin and reach the radius 0.85.

    python -m stages.pocket.world --write-heldout    writes heldout.txt again
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stages.pocket import kinds_creatures, kinds_things, kinds_vehicles
from stages.pocket.palette import COLOURS, Palette, Vary
from stages.pocket.pattern import PATTERNS
from stages.pocket.shapes import Part

RADIUS = 0.85
HELDOUT_FILE = Path(__file__).with_name("heldout.txt")


@dataclass(frozen=True)
class Kind:
    """One kind of object. front: the features of the front (+z), "" if front and back look alike."""

    make: Callable[[Vary, Palette], list[Part]]
    front: str


KINDS: dict[str, Kind] = {
    "ball": Kind(kinds_things.ball, ""),
    "cube": Kind(kinds_things.cube, ""),
    "cone": Kind(kinds_things.cone, ""),
    "donut": Kind(kinds_things.donut, "sprinkles; stands on its rim"),
    "mug": Kind(kinds_things.mug, "label; handle to -x"),
    "teapot": Kind(kinds_things.teapot, "badge; spout to +x, handle to -x"),
    "vase": Kind(kinds_things.vase, ""),
    "chair": Kind(kinds_things.chair, "the seat's open side; back rest at -z"),
    "table": Kind(kinds_things.table, ""),
    "lamp": Kind(kinds_things.lamp, ""),
    "candle": Kind(kinds_things.candle, ""),
    "hat": Kind(kinds_things.hat, "buckle"),
    "mushroom": Kind(kinds_things.mushroom, ""),
    "tree": Kind(kinds_things.tree, ""),
    "house": Kind(kinds_things.house, "door and windows"),
    "castle": Kind(kinds_things.castle, "gate"),
    "car": Kind(kinds_vehicles.car, "drives to +z: headlights; red tail lights at -z"),
    "bus": Kind(kinds_vehicles.bus, "drives to +z: windscreen, headlights"),
    "boat": Kind(kinds_vehicles.boat, "bow"),
    "rocket": Kind(kinds_vehicles.rocket, "porthole"),
    "airplane": Kind(kinds_vehicles.airplane, "nose and propeller"),
    "snowman": Kind(kinds_creatures.snowman, "face and buttons"),
    "robot": Kind(kinds_creatures.robot, "face and chest panel"),
    "cat": Kind(kinds_creatures.cat, "face; tail to +x"),
    "duck": Kind(kinds_creatures.duck, "beak"),
    "fish": Kind(kinds_creatures.fish, "swims to +z: eyes and lips"),
}
PATTERNED = ("ball", "cube", "cone", "mug", "teapot", "vase", "lamp", "hat", "rocket", "fish")
RIDERS = ("ball", "cube", "cone", "mug", "donut", "hat", "cat", "duck")  # X of "X on Y"
SUPPORTS = ("table", "cube", "chair", "car")  # Y of "X on Y"
NEIGHBOURS = ("ball", "cube", "cone", "mug", "tree", "mushroom", "cat", "snowman")  # both of "X next to Y"
RELATIONS = {"on": ("on",), "next to": ("next", "to")}
WEIGHTS = {"plain": 0.45, "patterned": 0.20, "pair": 0.35}


@dataclass(frozen=True)
class Spec:
    """The objects of a caption and their relation. `other` is the second object of a pair and is itself plain."""

    kind: str
    colour: str
    pattern: str = "plain"
    relation: str | None = None
    other: Spec | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.colour not in COLOURS:
            raise ValueError(f"colour: wanted one of {', '.join(COLOURS)}, got {self.colour!r}")
        if self.pattern != "plain" and (self.pattern not in PATTERNS or self.kind not in PATTERNED):
            raise ValueError(
                f"pattern: wanted plain, or one of {PATTERNS} on {PATTERNED}, got {self.pattern!r} on {self.kind!r}"
            )
        if (self.relation is None) != (self.other is None):
            raise ValueError("relation and other: wanted both or neither")
        if self.other is not None:
            if (self.kind, self.relation, self.other.kind) not in _compositions():
                raise ValueError(f"pair: the world has no {self.kind} {self.relation} a {self.other.kind}")
            if self.pattern != "plain" or self.other.pattern != "plain" or self.other.other is not None:
                raise ValueError("pair: wanted two plain single objects")

    def objects(self) -> tuple[Spec, ...]:
        """Return the single objects of this spec, with their patterns."""
        return (self,) if self.other is None else (Spec(self.kind, self.colour), self.other)


@cache
def _compositions() -> dict[tuple[str, str, str], None]:
    """Return every pair of kinds with its relation; a dict for its order and its quick look-up."""
    on = [(x, "on", y) for x in RIDERS for y in SUPPORTS if x != y]
    beside = [(x, "next to", y) for x in NEIGHBOURS for y in NEIGHBOURS if x != y]
    return dict.fromkeys(on + beside)


def _phrase(*words: str) -> str:
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def caption(spec: Spec) -> str:
    """Return the sentence of a spec; the inverse of `parse`."""
    phrase = [spec.colour, spec.kind] if spec.pattern == "plain" else [spec.colour, spec.pattern, spec.kind]
    text = _phrase(*phrase)
    return text if spec.other is None else f"{text} {spec.relation} {caption(spec.other)}"


def geometry_caption(spec: Spec) -> str:
    """Return the sentence without colours and patterns: the caption of a textureless render."""
    text = _phrase(spec.kind)
    return text if spec.other is None else f"{text} {spec.relation} {geometry_caption(spec.other)}"


def parse(text: str) -> Spec:
    """Return the spec of a caption; case, spacing and a final full stop do not matter. Raises: ValueError."""
    tokens = text.lower().strip().rstrip(".").split()
    for relation, relation_words in RELATIONS.items():
        n = len(relation_words)
        for i in range(1, len(tokens) - n):
            if tuple(tokens[i : i + n]) == relation_words:
                first, second = _parse_single(tokens[:i], text), _parse_single(tokens[i + n :], text)
                return Spec(first.kind, first.colour, first.pattern, relation, second)
    return _parse_single(tokens, text)


def _parse_single(tokens: list[str], text: str) -> Spec:
    if len(tokens) not in (3, 4) or tokens[0] not in ("a", "an"):
        raise ValueError(f"caption: wanted 'a COLOUR [PATTERN] KIND [on|next to a COLOUR KIND]', got {text!r}")
    return Spec(tokens[-1], tokens[1], tokens[2] if len(tokens) == 4 else "plain")


def oddities(text: str) -> list[str]:
    """List in what a prompt of the world's words differs from every caption, a line each; empty if it is like one.

    Articles and other words do not count. A layout draws most of it all the same, from what it knows of each word.
    """
    sides, tokens = [[]], re.findall(r"\w+", text.lower())
    joints = {words_[0]: relation for relation, words_ in RELATIONS.items()}
    relations = [joints[token] for token in tokens if token in joints]
    for token in tokens:
        if token in joints:
            sides.append([])
        sides[-1].append(token)
    lines, kinds = [], [[token for token in side if token in KINDS] for side in sides]
    if sum(map(len, kinds)) == 0:
        return [f"it names no object; the world has {', '.join(KINDS)}"]
    if len(sides) > 2 or any(len(names) != 1 for names in kinds):
        return ["captions name one object, or two with 'on' or 'next to' between them"]
    for side, (kind,) in zip(sides, kinds, strict=True):
        colours, patterns = ([token for token in side if token in group] for group in (COLOURS, PATTERNS))
        if len(set(colours)) != 1:
            lines.append(f"it names {'no colour' if not colours else 'more than one colour'} for the {kind}")
        if len(sides) == 2 and patterns:
            lines.append("captions have no patterns in pairs")
        elif patterns and kind not in PATTERNED:
            lines.append(f"captions have patterns on {', '.join(PATTERNED)} alone")
    if len(sides) == 2 and (kinds[0][0], relations[0], kinds[1][0]) not in _compositions():
        lines.append(f"captions have no {kinds[0][0]} {relations[0]} a {kinds[1][0]}")
    return list(dict.fromkeys(lines))


def words() -> list[str]:
    """Return every word of captions and geometry captions, in a fixed order."""
    joints = ["a", "an", *itertools.chain.from_iterable(RELATIONS.values())]
    return [*joints, *COLOURS, *PATTERNS, *KINDS]


def true_front(kind: str) -> bool:
    """Return whether the object's front looks different from its back."""
    return bool(KINDS[kind].front)


@cache
def all_specs() -> tuple[Spec, ...]:
    """Return every spec of the world: plain, patterned, then pairs of objects."""
    plain = [Spec(k, c) for k in KINDS for c in COLOURS]
    patterned = [Spec(k, c, p) for k in PATTERNED for p in PATTERNS for c in COLOURS]
    pairs = [
        Spec(x, c, "plain", relation, Spec(y, d))
        for x, relation, y in _compositions()
        for c in COLOURS
        for d in COLOURS
    ]
    return tuple(plain + patterned + pairs)


def choose_heldout() -> list[str]:
    """Choose the lines of heldout.txt: a tenth of plain captions, of patterned ones and of pair compositions.

    Plain and pattern choices spread evenly: no kind and no colour loses more than two or three of its captions.
    Pair compositions are listed without colours ("a ball on a table"): all their colourings are held out.
    """
    rng = np.random.default_rng(20)
    kinds, colours = list(KINDS), list(COLOURS)
    lines = []
    # plain: one colour per kind, and a second one for five kinds; colours dealt from shuffled packs
    deal = list(itertools.chain.from_iterable(rng.permutation(colours).tolist() for _ in range(3)))
    for kind in [*kinds, *rng.permutation(kinds)[:5].tolist()]:
        i = next(i for i, c in enumerate(deal) if caption(Spec(kind, c)) not in lines)
        lines.append(caption(Spec(kind, deal.pop(i))))
    for i, spec in enumerate(map(parse, lines)):
        others = (Spec(spec.kind, c) for c in colours if learnable(spec.kind, c))
        if not learnable(spec.kind, spec.colour):
            lines[i] = next(caption(other) for other in others if caption(other) not in lines)
    singles = set(lines)
    # patterned: one per kind and pattern whose plain caption is trained on, and a second for six of them
    deal = list(itertools.chain.from_iterable(rng.permutation(colours).tolist() for _ in range(4)))
    looks = [(k, p) for k in PATTERNED for p in PATTERNS]
    for i in [*range(len(looks)), *rng.permutation(len(looks))[:6].tolist()]:
        kind, pattern = looks[i]
        j = next(
            j
            for j, c in enumerate(deal)
            if caption(Spec(kind, c)) not in singles and caption(Spec(kind, c, pattern)) not in lines
        )
        lines.append(caption(Spec(kind, deal.pop(j), pattern)))
    for relation in RELATIONS:
        group = [key for key in _compositions() if key[1] == relation]
        numbers = sorted(rng.permutation(len(group))[: round(len(group) / 10)].tolist())
        for x, _, y in (group[i] for i in numbers):
            lines.append(f"{_phrase(x)} {relation} {_phrase(y)}")
    return lines


@cache
def learnable(kind: str, colour: str) -> bool:
    """Return whether another colour of the same kind shows each choice of trim that this one makes.

    White is the only colour whose rocket has red fins: no model can know that from the other rockets' captions.
    """

    def choices(name: str) -> list[str]:
        palette = Palette(name, None)
        KINDS[kind].make(Vary(None), palette)
        return palette.choices

    others = [choices(name) for name in COLOURS if name != colour]
    return all(any(other[k] == name for other in others) for k, name in enumerate(choices(colour)))


@cache
def heldout_listing() -> frozenset[str]:
    """Return the lines of the committed heldout.txt."""
    return frozenset(HELDOUT_FILE.read_text(encoding="utf-8").split("\n")) - {""}


@cache
def _heldout_kind_colours() -> frozenset[tuple[str, str]]:
    singles = (parse(line) for line in heldout_listing() if line.split()[1] in COLOURS)
    return frozenset((s.kind, s.colour) for s in singles if s.pattern == "plain")


def held_out(spec: Spec) -> bool:
    """Return whether training must not see this spec.

    True if its caption is listed, if it is a pair whose composition is listed, or if any of its objects, with or
    without a pattern, is of a listed plain kind and colour: a held-out red mug never appears, also not on a table.
    """
    if any((o.kind, o.colour) in _heldout_kind_colours() for o in spec.objects()):
        return True
    return (caption(spec) if spec.other is None else geometry_caption(spec)) in heldout_listing()


@cache
def _listed(spec: Spec) -> bool:
    """Return whether a spec is held out by its own line: a pair whose objects are each in the training, or a single."""
    if spec.other is None:
        return caption(spec) in heldout_listing()
    return geometry_caption(spec) in heldout_listing() and not any(held_out(o) for o in spec.objects())


def sample_spec(rng: np.random.Generator, split: str = "train") -> Spec:
    """Draw a spec: single plain, single patterned or pair by WEIGHTS, uniform over kinds and colours within each.

    Args:
        split: "train" (never held out), "heldout" (only what the listing's own lines hold out) or "all".
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split: wanted train, heldout or all, got {split!r}")
    group = rng.choice(list(WEIGHTS), p=list(WEIGHTS.values()))
    colours = list(COLOURS)

    def pick(items):
        return items[int(rng.integers(len(items)))]

    first = pick(list(KINDS)) if group == "plain" else pick(PATTERNED)
    pattern = pick(PATTERNS)
    relation = pick(list(RELATIONS))
    composition = pick([key for key in _compositions() if key[1] == relation])
    while True:  # the shape of the caption is fixed first, so that the split does not unbalance the kinds
        if group == "pair":
            x, _, y = composition
            spec = Spec(x, pick(colours), "plain", relation, Spec(y, pick(colours)))
        else:
            spec = Spec(first, pick(colours), "plain" if group == "plain" else pattern)
        if split == "all" or (not held_out(spec) if split == "train" else _listed(spec)):
            return spec
        if group == "pair":  # a whole composition may be on the other side
            composition = pick([key for key in _compositions() if key[1] == relation])


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="The pocket world's held-out listing.")
    arguments.add_argument("--write-heldout", action="store_true", required=True, help="write heldout.txt again")
    arguments.parse_args()
    HELDOUT_FILE.write_text("\n".join(choose_heldout()) + "\n", encoding="utf-8")
    print(f"{HELDOUT_FILE.name}: {len(choose_heldout())} captions")
