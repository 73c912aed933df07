"""The generators of all classes as one module, and their folder.

FOLDER/config.json          sizes, the classes, and other words that name objects, which are refused
FOLDER/model.safetensors    the generators, float16
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from stages.gan.generator import GanSizes, Generator
from stages.networks import load_config, load_networks, save_networks


@dataclass(frozen=True)
class Sizes:
    """The sizes of a generator, the classes that there are, and other words for objects."""

    generator: GanSizes
    classes: tuple[str, ...]
    others: tuple[str, ...] = ()


class GanModel(nn.Module):
    """A generator of each class, `generators[CLASS]`. Source: GET3D (arXiv 2209.11163), which has one each as well."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.generators = nn.ModuleDict({name: Generator(sizes.generator) for name in sizes.classes})

    def save(self, folder: Path) -> None:
        """Write the folder; float16."""
        save_networks(self, asdict(self.sizes), folder)


def load_model(folder: Path) -> GanModel:
    """Return the networks of a folder, frozen, float32. Raises: UserError for one that is missing or damaged."""
    return load_networks(lambda values: GanModel(_read_sizes(values)), folder, "gan", "gan")


def load_sizes(folder: Path) -> Sizes:
    """Return the sizes and classes alone. Raises: UserError for a folder that is missing or damaged."""
    return load_config(_read_sizes, folder, "gan", "gan")


def _read_sizes(values: dict) -> Sizes:
    generator = dict(values["generator"])
    generator["channels"] = tuple(generator["channels"])
    return Sizes(GanSizes(**generator), tuple(values["classes"]), tuple(values["others"]))
