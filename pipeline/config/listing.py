"""`pipeline settings`: every key that `key.sub=value` can set, with its value, what is allowed and what it means."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipeline.config.layers import describe
from pipeline.config.model import config_model, load_config
from pipeline.config.recipes import split_names
from stages.errors import UserError


def print_settings(prefix: str, recipe: str | None) -> None:
    """Print one line a setting below `prefix`, in the order of config.yaml.

    Args:
        prefix: a key or a group, as fine.cameras; empty for all.
        recipe: whose values to show, with the default beside those that differ; None for the defaults, which lie beside
            the code.
    Raises: UserError for an unknown prefix or recipe.
    """
    default = dict(leaves(config_model()()))
    values = default if recipe is None else dict(leaves(load_config(split_names(recipe), [], {})))
    chosen = [key for key in values if not prefix or key == prefix or key.startswith(f"{prefix}.")]
    if not chosen:
        raise _unknown(prefix, list(values))
    for key in chosen:
        other = key in default and values[key] != default[key]  # a rule other than the default's has keys of its own
        differs = f" (default {_shown(default[key])})" if other else ""
        print(f"{key} = {_shown(values[key])}{differs}  # {meaning(key)}")
    if recipe is None and not prefix:
        print("# These are the code's defaults. `pipeline run` takes the recipe `default` where none is given; to see")
        print("# its values: pipeline settings --config default")


def leaves(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return dotted key and JSON value of every setting that is not a group."""
    values = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel) and type(value).model_fields:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, values[name]


def meaning(key: str) -> str:
    """Type, bounds and meaning with unit; not the default, of which a group may have another than its class."""
    return describe(config_model(), tuple(key.split("."))).removeprefix(f"{key}: ").rpartition("; default ")[0]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _unknown(prefix: str, keys: list[str]) -> UserError:
    every = dict.fromkeys(part for key in keys for part in _above(key))
    last = prefix.rpartition(".")[2]
    near = sorted((key for key in every if key.rpartition(".")[2] == last), key=lambda key: key.count("."))[:3]
    near = near or difflib.get_close_matches(prefix, every, 1, 0.6)
    groups = dict.fromkeys(key.partition(".")[0] for key in keys)
    return UserError(
        f"no setting is called {prefix}",
        f"keys and groups at the top: {', '.join(groups)}",
        f"did you mean {' or '.join(near)}?" if near else "choose one of these; without a name all are listed",
    )


def _above(key: str) -> Iterator[str]:
    """The key and every group that it lies in."""
    while key:
        yield key
        key = key.rpartition(".")[0]
