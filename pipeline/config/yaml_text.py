"""YAML as settings are written in it: a safe loader that knows less than YAML 1.1 on purpose, and stops at what is too
much.

Only true and false are booleans (so a prompt may be `no`), 1e-3 is a number, dates are text, a repeated key is an
error, and so is what a file can do to its reader: a value that contains itself, one that its aliases multiply without
end, one nested without end.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import yaml
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

Key = tuple[str | int, ...]
LONGEST = 100_000  # characters: four times as many as a written configuration has, and read in about a second
_MOST = 10_000  # values, each as often as aliases repeat it; a whole configuration has some 500
_DEEPEST = 40
_PLAIN = [
    ("bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
     list("-+.0123456789")),
    ("null", re.compile(r"^(?:~|null|Null|)$"), ["~", "n", "N", ""]),
]  # fmt: skip
_TAG = "tag:yaml.org,2002:"
_TAGS = {f"{_TAG}{name}" for name in ("bool", "int", "float", "null", "str")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def fetch_flow_collection_start(self, token: type) -> None:
        """Stop at what is nested too deeply while it is read: the scanner's time grows with the square of the depth."""
        if self.flow_level >= _DEEPEST:
            raise ScannerError(None, None, f"it is nested more than {_DEEPEST} deep", self.get_mark())
        super().fetch_flow_collection_start(token)


class Dumper(yaml.SafeDumper):
    """Writes what :func:`read_values` reads back."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


for _name, _pattern, _first in _PLAIN:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


class YamlFault(Exception):
    """A fault of a YAML text: what, why, the fix, and the line where it is known."""

    def __init__(
        self, why: str, line: int | None, what: str = "not valid YAML", fix: str = "correct that line"
    ) -> None:
        super().__init__(why)
        self.what, self.why, self.fix, self.line = what, why, fix, line


def read_values(text: str) -> tuple[Any, dict[Key, int]]:
    """Return the values of a text and the line, from 1, of each key; None for an empty text. Raises: YamlFault."""
    if len(text) > LONGEST:
        raise YamlFault(f"it has {len(text)} characters, and settings take {LONGEST} at most", None, "too long")
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Values(loader, lines).of(node, ()), lines
        finally:
            loader.dispose()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        why = f"U+{ord(text[error.position]):04X} is a control character or none at all"
        raise YamlFault(why, line, fix="remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlFault(error.problem or str(error), None if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise YamlFault(str(error).split("\n")[0], None) from None
    except RecursionError:
        raise YamlFault("it is nested too deeply", None) from None


class _Values:
    """The values of a document's nodes; what aliases repeat is counted as often as it comes."""

    def __init__(self, loader: _Loader, lines: dict[Key, int]) -> None:
        self._loader, self._lines = loader, lines
        self._count = 0
        self._open: list[yaml.Node] = []

    def of(self, node: yaml.Node, key: Key) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(key, line)
        self._count += 1
        if self._count > _MOST:
            place = self._lines.get(key[:1], line)
            raise YamlFault(f"its aliases make more than {_MOST} values of it", place, "too many values")
        if any(other is node for other in self._open):
            raise YamlFault("the value contains itself", line)
        if len(self._open) >= _DEEPEST:
            raise YamlFault(f"it is nested more than {_DEEPEST} deep", line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.append(node)
        value = self._mapping(node, key) if isinstance(node, yaml.MappingNode) else self._sequence(node, key)
        self._open.pop()
        return value

    def _sequence(self, node: yaml.SequenceNode, key: Key) -> list[Any]:
        return [self.of(child, (*key, i)) for i, child in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlFault("a key is one word, not a list or a mapping", line)
            name = str(self._scalar(key_node))
            if name in values:
                why, fix = "only one of them can count", "remove one of the lines"
                raise YamlFault(why, line, f"{name} is set twice", fix)
            self._lines[(*key, name)] = line
            values[name] = self.of(value_node, (*key, name))
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        line = node.start_mark.line + 1
        if node.tag not in _TAGS:
            raise YamlFault(f"settings have no values of the kind {node.tag.removeprefix(_TAG)}", line)
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError, AttributeError, IndexError):  # of a value that its tag does not go with
            short = node.value if len(node.value) <= 40 else f"{node.value[:37]}..."
            raise YamlFault(f"{short!r} is no {node.tag.removeprefix(_TAG)}", line) from None
