"""Settings written as YAML, a line each with its meaning."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.config.yaml_text import Dumper


def dump(settings: BaseModel, without: Collection[str] = ()) -> str:
    """Return the settings as YAML, each line with its meaning; it reads back to an equal model.

    Args:
        settings: any model of settings.
        without: dotted keys of settings and of whole groups to leave out, which read back as their defaults.
    """
    return "\n".join(_lines(settings, settings.model_dump(mode="json"), (), without)) + "\n"


def _lines(
    settings: BaseModel, values: dict[str, Any], above: tuple[str, ...], without: Collection[str]
) -> Iterator[str]:
    indent = "  " * len(above)
    for name, info in type(settings).model_fields.items():
        value, key = getattr(settings, name), (*above, name)
        if ".".join(key) in without:
            continue
        if isinstance(value, BaseModel) and type(value).model_fields:
            lines = list(_lines(value, values[name], key, without))
            yield from [f"{indent}{name}:", *lines] if lines else []
            continue
        text = yaml.dump(values[name], Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
        comment = " ".join((info.description or "").split())
        line = f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}"
        yield f"{line}  # {comment}" if comment else line
