"""The audit of a diffusers folder, part by part: what it has, lacks and has wrong, before any work.

Nothing is loaded: configs are read, networks are built without memory (torch's meta device) and their tensors compared
by name and shape with the headers of the weight files; tokenizers and the scheduler are small enough to be made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from stages.errors import UserError, out_of_memory
from stages.guidance.diffusion.denoisers import Geometry
from stages.guidance.diffusion.families import (
    Configs,
    Family,
    check_sizes,
    components,
    encoder_specs,
    family_of,
    part_variants,
    read_configs,
)
from stages.guidance.diffusion.folder import Component, check_component, names_in, quiet, read_json
from stages.guidance.diffusion.noise_schedule import load_schedule
from stages.guidance.diffusion.text import load_tokenizer, token_limit
from stages.guidance.diffusion.weights import Header, parameter_count, read_headers

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Finding:
    """One line: the part, whether it is usable, what it is or why it is not, and what to do then."""

    part: str
    ok: bool
    detail: str
    fix: str = ""


def audit(folder: Path, variant: str | None = None, resolution: int | None = None) -> list[Finding]:
    """Check every part of a folder, the family first; returns findings, raises nothing for a fault."""
    try:
        family, classes = family_of(folder)
    except UserError as error:
        return [Finding("model_index.json", False, error.why, error.fix)]
    findings = []
    if (folder / "pocket.json").exists():
        words = _finding("pocket.json", partial(_pocket_words, folder))
        findings += [] if words.ok else [words]
    findings.append(Finding("family", True, f"{family.name} ({classes[family.part]})"))
    configs: Configs = {}
    parts = components(family, classes)
    variants = part_variants(parts, lambda part: names_in(folder / part), variant, half=False)
    for component in parts:
        findings.append(_part(folder, family, classes, component, variants.get(component.part), configs))
    if all(finding.ok for finding in findings):
        findings += _combination(folder, family, classes, configs, resolution)
    return findings


def _pocket_words(folder: Path) -> str:
    """The words of a pocket prior."""
    path = folder / "pocket.json"
    words = read_json(path, f"Cannot load the prior {folder}").get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"Cannot load the prior {folder}", f"{path} lists no words", "copy or download it again")
    return f"{len(words)} words"


def _part(
    folder: Path, family: Family, classes: dict[str, str], component: Component, variant: str | None, configs: Configs
) -> Finding:
    """One component; its config is left in `configs`."""

    def check() -> str:
        files = check_component(folder, component, variant)
        if component.stem is not None:
            config = read_configs(folder, family, {component.part: component.class_name})[component.part]
            headers = read_headers(files)
            _compare(component, config, headers)
            configs[component.part] = config
            total = parameter_count(headers)
            kinds = "/".join(sorted({h.dtype for h in headers.values()} - {"I64", "I32"}))
            return f"{component.class_name}, {total / 1e6:.1f} M parameters in {kinds}"
        return component.class_name

    return _finding(component.part, check)


def _finding(part: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(part, True, check())
    except UserError as error:
        return Finding(part, False, error.why, error.fix)


def _compare(component: Component, config: Any, headers: dict[str, Header]) -> None:
    """Check that the files hold each tensor of the class with this config, in its shape."""
    most = 2 * len(headers) + 1000
    shapes = {_plain(name): tuple(tensor.shape) for name, tensor in _tensors(component, config, most).items()}
    stored = {_plain(name): header.shape for name, header in headers.items()}
    what, fix = component.part, "weights and config.json are not of the same model: get both again"
    missing = [name for name in shapes if name not in stored]
    if missing:
        why = f"{len(missing)} tensors are missing from its weights, {missing[0]} first, by its config.json"
        raise UserError(what, why, fix)
    # some old autoencoders keep a linear layer as a convolution of one pixel, which loads all the same
    wrong = [name for name in shapes if [n for n in stored[name] if n != 1] != [n for n in shapes[name] if n != 1]]
    if wrong:
        name = wrong[0]
        which = f"{name} {stored[name]}, not {shapes[name]}"
        why = f"{len(wrong)} tensors have another shape than config.json says: {which}"
        raise UserError(what, why, fix)


def _tensors(component: Component, config: Any, most: int) -> dict[str, torch.Tensor]:
    """The tensors that a component of this config must find in its files, without memory.

    Args:
        most: of them; a config that makes many more than there are is refused before they are all made.
    """
    import diffusers
    import transformers

    library = transformers if component.stem == "model" else diffusers
    kind = getattr(library, component.class_name)
    count = 0

    def made(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it makes more than {most} tensors")

    hook = register_module_parameter_registration_hook(made)
    try:
        with quiet(), torch.device("meta"):
            module = kind(config) if library is transformers else kind.from_config(vars(config))
    except Exception as error:  # whatever a config of other values makes the class stumble over
        if out_of_memory(error):
            raise
        why = f"config.json does not make a {component.class_name}: {error}"
        raise UserError(component.part, why, "get it again") from None
    finally:
        hook.remove()
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in module.state_dict().items() if name not in tied}


def _plain(name: str) -> str:
    """A tensor's name without what changed between versions of the two libraries."""
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name.removeprefix("text_model.")


def _combination(
    folder: Path, family: Family, classes: dict[str, str], configs: Configs, resolution: int | None
) -> list[Finding]:
    """Check that the parts, all there, fit each other."""
    geometries: list[Geometry] = []

    def fit() -> str:
        geometry = check_sizes(family, configs, folder, resolution)
        geometries.append(geometry)
        space = "latents" if "vae" in classes else "pixels"
        return f"{geometry.resolution}x{geometry.resolution}, {space} [{geometry.channels}, {geometry.latents}, ...]"

    def schedule() -> str:
        noise = load_schedule(folder, classes["scheduler"], geometries[0].image_tokens if geometries else 0)
        first, last = float(noise.alphas_cumprod[0]), float(noise.alphas_cumprod[-1])
        return f"{noise.prediction}, {len(noise.alphas_cumprod)} levels, alpha_bar {first:.4f} to {last:.4f}"

    findings = [_finding("fit", fit), _finding("scheduler", schedule)]
    for spec in encoder_specs(family, classes):

        def tokens(spec=spec) -> str:
            tokenizer, config = load_tokenizer(folder, spec.tokenizer), configs[spec.part]
            if len(tokenizer) > config.vocab_size:
                raise UserError(
                    spec.tokenizer,
                    f"it knows {len(tokenizer)} tokens and {spec.part} has embeddings for {config.vocab_size}",
                    "use the tokenizer of the same model",
                )
            return f"reads {token_limit(spec, tokenizer, config)} tokens of a prompt, knows {len(tokenizer)}"

        findings.append(_finding(spec.tokenizer, tokens))
    return findings
