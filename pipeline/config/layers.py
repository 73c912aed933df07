"""Layers of settings with the place each value came from, checked against a pydantic model.

yaml_text.py says what is read of YAML. Values are checked strictly: 3 is a float, "3" is not a number and true is not
1.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.yaml_text import LONGEST, Key, YamlFault, read_values
from stages.errors import UserError
from stages.ramp import FORM, Ramp

Model = typing.TypeVar("Model", bound=BaseModel)
NAME = "name"  # key of the kind in a group that is a Choice
_SHOWN = 5  # mistakes listed at once
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


@typing.runtime_checkable
class Choice(typing.Protocol):
    """A group of settings that is a choice among kinds, each with settings of its own, as a rule is."""

    @classmethod
    def variants(cls) -> dict[str, type[BaseModel]]:
        """Return the settings of each kind by its name."""


@dataclass
class Layer:
    """Nested values, the origin of each key ('recipe.yaml:12'), and the text of overrides before YAML read it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)


def from_file(path: Path) -> Layer:
    """Read one YAML file of settings. Raises UserError with file and line for anything that is not a mapping."""
    try:
        with open(path, "rb") as file:
            text = file.read(4 * LONGEST + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}", f"it is not text: {error}", "give a YAML file of settings") from None
    try:
        values, lines = read_values(text)
    except YamlFault as fault:
        line = f":{fault.line}" if fault.line is not None else ""
        raise UserError(f"{path}{line}: {fault.what}", fault.why, fault.fix) from None
    if values is None:
        return Layer()
    if not isinstance(values, dict):
        raise UserError(f"cannot read {path}", "it holds no `key: value` lines", "see configs/ for examples")
    return Layer(values, {key: f"{path}:{line}" for key, line in lines.items()})


def from_recipe(path: Path, find: Callable[[str], Path], over: Sequence[Layer] = ()) -> list[Layer]:
    """Read a YAML file and the recipes it is written over, lowest first: `extends: NAME` lays it over another.

    What a recipe sets below `on_base` is meant for the recipe that it extends, and left out where there is another.

    Args:
        path: of the file.
        find: the path of a recipe by its name.
        over: layers of another recipe, which takes the place of what this one extends. None of them comes back; where
            one of them is what it extends, nothing is left out. Empty for none.
    Raises: UserError for a chain that comes back to itself.
    """
    chain = _chain(path, find)
    known = [k for k, (layer, _) in enumerate(chain) if layer in over]
    if over:
        chain = chain[known[-1] + 1 :] if known else chain[-1:]
    layers: list[Layer] = []
    for layer, on_base in chain:
        layers += [layer] if on_base is None or (over and not known) else [layer, on_base]
    return layers


def _chain(path: Path, find: Callable[[str], Path]) -> list[tuple[Layer, Layer | None]]:
    """The recipes of from_recipe, each with what it sets below `on_base`."""
    layers: list[tuple[Layer, Layer | None]] = []
    visited: list[Path] = []
    while True:
        if path.resolve() in visited:
            raise UserError(
                f"{path}: extends itself",
                " -> ".join(p.name for p in [*visited, path]),
                "take one `extends` out of the chain",
            )
        visited.append(path.resolve())
        layer = from_file(path)
        layers.insert(0, (layer, _taken_out(layer, "on_base")))
        if "extends" not in layer.values:
            return layers
        name, origin = layer.values.pop("extends"), layer.origins.pop(("extends",))
        if not isinstance(name, str):
            raise UserError(f"{origin}: extends: {name!r}", "it is not the name of a recipe", "extends: default")
        path = find(name)


def _taken_out(layer: Layer, name: str) -> Layer | None:
    """Move what a layer holds below a key into a layer of its own; None where it holds nothing."""
    if name not in layer.values:
        return None
    values, origin = layer.values.pop(name), layer.origins[(name,)]
    if not isinstance(values, dict):
        raise UserError(f"{origin}: {name} = {values!r:.80}", "it is no group of settings", "write them below it")
    inner = [key for key in layer.origins if key[:1] == (name,)]
    return Layer(values, {key[1:]: layer.origins.pop(key) for key in inner if key[1:]} | {(): origin})


def from_overrides(overrides: list[str]) -> Layer:
    """Read `key.sub=value` words of the command line; the value is read as YAML: 3, 1e-3, [1, 2], true, text."""
    layer = Layer()
    for word in overrides:
        name, equals, text = word.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(re.fullmatch(r"\w+", part) for part in key):
            raise UserError(
                f"cannot read `{word}`", "a setting is written key.sub=value", "for example coarse.steps=300"
            )
        try:
            value, _ = read_values(text)
        except YamlFault as fault:
            raise UserError(f"cannot read `{word}`", f"{text!r:.200} is not a value: {fault.why}", "quote it") from None
        _set(layer, key, value, f"command line: {word}")
        layer.texts[key] = text
    return layer


def from_mapping(settings: Mapping[str, Any]) -> Layer:
    """Read settings of a Python program by dotted key.

    Tuples, paths, numpy's numbers and models are read as their YAML equivalents.
    """
    layer = Layer()
    for name, value in settings.items():
        _set(layer, tuple(str(name).split(".")), _plain(name, value), f"settings[{name!r}]")
    return layer


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(name, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, child) for child in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    why = f"{type(value).__name__} is no number, text, list or mapping"
    raise UserError(f"settings[{name!r}] = {value!r:.80}", why, "give one of these")


def from_flags(flags: Mapping[str, Any], *, dashes: bool = True) -> Layer:
    """Read options with a name of their own, top-level keys only: as --seed of the command, or a function's."""
    layer = Layer()
    for name, value in flags.items():
        flag = f"--{name.removesuffix('_run').replace('_', '-')}" if dashes else f"{name}="
        _set(layer, (name,), _plain(name, value), flag)
    return layer


def _set(layer: Layer, key: Key, value: Any, origin: str) -> None:
    values = layer.values
    for part in key[:-1]:
        if not isinstance(values.setdefault(part, {}), dict):
            values[part] = _as_group(values[part])
        values = values[part]
    group = values.get(key[-1])
    values[key[-1]] = group | {NAME: value} if isinstance(group, dict) and isinstance(value, str) else value
    layer.origins[key] = origin


def merge(layers: list[Layer]) -> Layer:
    """Later layers over earlier ones, key by key; lists are replaced whole."""
    merged = Layer()
    for layer in layers:
        merged.values = _over(merged.values, layer.values)
        merged.origins |= layer.origins
        merged.texts |= layer.texts
    return merged


def _over(below: Any, above: Any) -> Any:
    if not isinstance(above, dict):
        return above
    below = _as_group(below)
    if NAME in above and above[NAME] != below.get(NAME):
        return above  # another kind: nothing of what lies below is its own
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def _as_group(value: Any) -> dict[str, Any]:
    """Expand a choice that is written as its name alone: `rule: ism` is `rule: {name: ism}`."""
    return value if isinstance(value, dict) else {NAME: value} if isinstance(value, str) else {}


def validate(model: type[Model], layers: list[Layer]) -> Model:
    """Check the merged layers over the model's defaults; every field of the model must have a default.

    The defaults are a layer too: a group whose default differs from its class's own (the fine stage's cameras) keeps
    the rest of that default when one of its keys is set.
    Raises: UserError naming place, value, what is allowed, nearest name.
    """
    layer = merge([Layer(model().model_dump(mode="json")), *layers])
    for key, value in _leaves(layer.values):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_place(layer, key)}: {_dotted(key)} = {value}", "it must be finite", "give a number")
        for text in (*key, value):
            if isinstance(text, str) and (match := _NO_TEXT.search(text)):
                raise _no_text(_place(layer, key), _dotted(key), match[0])
    try:
        return _check(model, layer)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    messages = [_explain(model, layer, problem) for problem in problems[:_SHOWN]]
    what, why, fix = messages[0]
    if len(messages) == 1:
        raise UserError(what, why, fix)
    rest = len(problems) - len(messages)
    every = [f"{w}: {y} ({f})" for w, y, f in messages] + ([f"and {rest} more"] if rest else [])
    raise UserError(f"{len(problems)} settings cannot be used", "\n".join(every), "correct them; nothing was started")


def _no_text(place: str, name: str, letter: str) -> UserError:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # as Python reads a byte that is no UTF-8
        why, fix = f"its byte 0x{code - 0xDC00:02x} is no UTF-8", "write it in UTF-8, as LANG should say"
    else:
        why, fix = f"it holds U+{code:04X}, a control character or none at all", "remove it"
    return UserError(f"{place}: {name} is not text", why, fix)


def _check(model: type[Model], layer: Layer) -> Model:
    try:
        return model.model_validate_json(json.dumps(layer.values), strict=True)
    except ValidationError as error:  # an override such as prompt=2026 meant the text
        words = [e["loc"] for e in error.errors() if e["type"] == "string_type" and e["loc"] in layer.texts]
        if not words:
            raise
    for key in words:
        _set(layer, key, layer.texts[key], layer.origins[key])
    return model.model_validate_json(json.dumps(layer.values), strict=True)


def _leaves(values: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        yield key, values
        return
    for name, value in items:
        yield from _leaves(value, (*key, name))


def _explain(model: type[BaseModel], layer: Layer, problem: ErrorDetails) -> tuple[str, str, str]:
    key = tuple(problem["loc"])
    parent = _model_at(model, key[:-1])
    place, name = _place(layer, key), _dotted(key)
    if problem["type"] == "extra_forbidden" and parent is not None:
        allowed = sorted(_chosen(parent, layer.values, key[:-1]).model_fields)
        every = {path: path for path in _names(model)}
        short = {path.rpartition(".")[2]: path for path in reversed(every)}
        close = difflib.get_close_matches(str(key[-1]), allowed, 1, 0.6)
        nearest = ".".join(map(str, (*key[:-1], close[0]))) if close else short.get(str(key[-1]))
        nearest = nearest or next(iter(difflib.get_close_matches(name, every, 1, 0.7)), None)
        inside = f"{_dotted(key[:-1])} knows" if len(key) > 1 else "known here"
        return (
            f"{place}: unknown key {name}",
            f"{inside}: {', '.join(allowed)}",
            f"did you mean {nearest}?" if nearest else "remove it, or choose one of these",
        )
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    value_text = json.dumps(problem["input"], ensure_ascii=False, default=str)
    value_text = value_text if len(value_text) <= 80 else value_text[:77] + "..."
    why = message if problem["type"] == "value_error" else f"wanted {message}"
    return f"{place}: {name} = {value_text}", why, describe(model, key)


def _variants(group: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The settings of each kind that a group is a choice among, by name; empty where there is nothing to choose."""
    return group.variants() if issubclass(group, Choice) else {}


def _chosen(parent: type[BaseModel], values: Any, key: Key) -> type[BaseModel]:
    """The settings of the kind that a group's values choose; the group's own where there is nothing to choose."""
    for part in key:
        values = values[part]
    name = values.get(NAME) if isinstance(values, dict) else values
    return _variants(parent).get(name, parent) if isinstance(name, str) else parent


def _field_at(model: type[BaseModel], key: Key) -> FieldInfo | None:
    """A setting's field; of a group that is a choice that of the first kind which has it."""
    parent = _model_at(model, key[:-1])
    kinds = [] if parent is None else [parent, *_variants(parent).values()]
    return next((kind.model_fields[key[-1]] for kind in kinds if key[-1] in kind.model_fields), None)


def _place(layer: Layer, key: Key) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in layer.origins:
            return layer.origins[key[:length]]
    return layer.origins.get((), "defaults")


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key) or "the configuration"


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    for part in key:
        info = model.model_fields.get(str(part))
        if info is None or not (isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)):
            return None
        model = info.annotation
    return model


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _names(info.annotation, f"{prefix}{name}.")


def describe(model: type[BaseModel], key: Key) -> str:
    """Return one line about a setting: name, type, bounds, meaning, default."""
    while key and _field_at(model, key) is None:
        key = key[:-1]
    if not key:
        return "see configs/ for examples"
    info, parent = _field_at(model, key), _model_at(model, key[:-1])
    bounds = [
        str(m).partition("(")[2].rstrip(")") for m in info.metadata if type(m).__name__ in ("Ge", "Gt", "Le", "Lt")
    ]
    signs = {"ge=": ">= ", "gt=": "> ", "le=": "<= ", "lt=": "< "}
    bounds = [signs[b[:3]] + b[3:] for b in bounds]
    kind = re.sub(r"typing\.|<class '|'>|NoneType", lambda m: "none" if "None" in m[0] else "", str(info.annotation))
    kind = kind.replace(f"{Ramp.__module__}.{Ramp.__name__}", FORM)
    kind = re.sub(r"^Literal\[(.*)\]$", r"one of \1", kind).replace(" | None", " or null")
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
        kinds = _variants(info.annotation)
        kind = f"one of {', '.join(kinds)}" if kinds else f"a group of {', '.join(info.annotation.model_fields)}"
    if key[-1] == NAME and parent is not None and _variants(parent):
        kind = f"one of {', '.join(_variants(parent))}"
    default = _default_at(model, key)
    default = default.written() if isinstance(default, Ramp) else default
    default_text = (
        "" if isinstance(default, BaseModel) else f"; default {json.dumps(default, default=str, ensure_ascii=False)}"
    )
    return f"{_dotted(key)}: {', '.join([kind, *bounds])}; {info.description or 'see the code'}{default_text}"


def _default_at(model: type[BaseModel], key: Key) -> Any:
    """A setting's default where it stands: that of a group may differ from its class's (the fine stage's cameras)."""
    default = model.model_fields[key[0]].get_default(call_default_factory=True)
    for depth, name in enumerate(key[1:], 1):
        if not isinstance(default, BaseModel) or not hasattr(default, str(name)):  # none by default, or another kind
            default = _field_at(model, key[: depth + 1]).get_default(call_default_factory=True)
        else:
            default = getattr(default, name)
    return default
