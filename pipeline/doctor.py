"""`pipeline doctor`: what is installed, what is missing, why, and what that costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import __version__
from pipeline.errors import EXIT_USER_ERROR
from pipeline.import_names import ROOT, clashes


@dataclass
class Finding:
    """One line of the report. state: ok, missing (not there) or broken (there, and fails); detail: version or why."""

    name: str
    required: bool
    state: str
    detail: str
    cost: str  # what its absence costs; shown where it is absent


def probe(module: str, package: str | None = None) -> tuple[str, str]:
    """State and detail of a package, by importing it: tinycudann raises OSError without CUDA, kaolin's stub anything.

    Returns: ('ok', version), ('missing', hint) or ('broken', the exception it raised).
    """
    package = package or module
    try:
        available = importlib.util.find_spec(module) is not None
    except Exception as error:
        return "broken", _reason(error)
    if not available:
        return "missing", "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        return "broken", _reason(error)
    try:
        return "ok", importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "ok", "version unknown"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _cuda() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB"
    return "missing", "torch finds no device" if torch.version.cuda else f"torch {torch.__version__} is a CPU build"


def _prior_checks() -> list[tuple[str, bool, Callable[[], tuple[str, str]], str]]:
    """A line for each prior that should be on this machine, by the table of prior sources."""
    try:
        from pipeline.priors.sources import SOURCES
    except Exception as error:  # without torch, of which another line tells
        reason = _reason(error)
        return [("priors", True, lambda: ("broken", reason), "no default prior")]
    offers = [offer for source in SOURCES.values() for offer in source.offers()]
    return [
        (f"{offer.text} prior, {offer.stages}", True, offer.check, offer.cost)
        for offer in offers
        if offer.check is not None
    ]


def _network_checks() -> list[tuple[str, bool, Callable[[], tuple[str, str]], str]]:
    """A line for each stage with networks of its own, by the table of stages."""
    try:
        from stages.kinds import STAGES
    except Exception:  # the line of the prior sources says why
        return []
    folders = {name: kind.weights for name, kind in STAGES.items() if kind.weights is not None}
    return [
        (f"networks of {stage}", False, lambda folder=folder: _networks(folder), f"no {stage} stage")
        for stage, folder in folders.items()
    ]


def _networks(name: str) -> tuple[str, str]:
    """Networks that come with the toolkit, or are made with it."""
    from stages.errors import UserError
    from stages.networks import WEIGHTS, check_networks, networks_folder, training_of

    folder = networks_folder("pocket", name)
    try:
        check_networks(folder, name)
    except UserError as error:
        return "missing", f"{error.why}; train them: {training_of(name)}"
    return "ok", f"{(folder / WEIGHTS).stat().st_size / 2**20:.1f} MB"


def _import_names() -> tuple[str, str]:
    sentences = clashes(Path.cwd())
    return ("broken", "; ".join(sentences)) if sentences else ("ok", str(ROOT))


def _numba() -> tuple[str, str]:
    """numba, whose compiler an environment variable can switch off."""
    state, detail = probe("numba")
    if state == "ok" and importlib.import_module("numba").config.DISABLE_JIT:
        return "broken", "NUMBA_DISABLE_JIT is set: unset it"
    return state, detail


def _bfloat16() -> tuple[str, str]:
    """Whether the cores multiply bfloat16, in which the pocket prior's networks then run."""
    from stages.guidance.diffusion.plan import cores_have_bfloat16

    return ("ok", "AVX512-BF16 or AMX") if cores_have_bfloat16() else ("missing", "not among what these cores can do")


def _kernel_cache() -> tuple[str, str]:
    """Find where compiled kernels are kept: beside the package, in the home folder, or where NUMBA_CACHE_DIR says."""
    from stages.kernels.cpu import jit, srgb

    trouble = jit.cache_trouble()
    return ("broken", trouble) if trouble else ("ok", str(jit.cache_folder(srgb)))


def _gltf_validator() -> tuple[str, str]:
    node = shutil.which("node")
    if node is None:
        return "missing", "node is not on PATH"
    script = "console.log(require('gltf-validator').version())"
    process = subprocess.run([node, "-e", script], capture_output=True, text=True, timeout=30, cwd=ROOT)
    if process.returncode == 0:
        return "ok", process.stdout.strip()
    return "missing", "node is there; install with: npm install gltf-validator"


def _kernels(name: str) -> Callable[[], tuple[str, str]]:
    """A package behind ops of ours: as in :func:`probe`, with its licence."""

    def check() -> tuple[str, str]:
        import torch

        from stages.kernels.backend import PACKAGES, probe, warp_off_cuda

        status = probe(name)
        state, detail = status.state, status.detail
        if name == "warp" and state == "ok" and torch.cuda.is_available() and warp_off_cuda():
            state, detail = "broken", warp_off_cuda()
        return state, f"{detail}; licence: {PACKAGES[name].licence}"

    return check


def _package(module: str, package: str | None = None) -> Callable[[], tuple[str, str]]:
    return lambda: probe(module, package)


# name, required, check, what its absence costs
_CHECKS: list[tuple[str, bool, Callable[[], tuple[str, str]], str]] = [
    ("torch", True, _package("torch"), "nothing runs"),
    ("numpy", True, _package("numpy"), "nothing runs"),
    ("numba", True, _numba, "no fast CPU kernels: the plain-torch twins are 10 to 70 times slower"),
    ("cache of compiled kernels", False, _kernel_cache, "every run compiles its kernels anew: 28 s on two cores"),
    ("bfloat16 cores", False, _bfloat16, "the pocket prior runs in float32: fine stages take half as long again"),
    ("scipy", True, _package("scipy"), "no mesh cleaning"),
    ("safetensors", True, _package("safetensors"), "no checkpoints, no weights"),
    ("diffusers", True, _package("diffusers"), "no learned prior; the reference prior still works"),
    ("transformers", True, _package("transformers"), "no text encoder: no learned prior"),
    ("sentencepiece", False, _package("sentencepiece"), "DeepFloyd IF's tokenizer cannot be read (extra: t5)"),
    ("trimesh", True, _package("trimesh"), "no reading of meshes for the reference prior"),
    ("pillow", True, _package("PIL", "pillow"), "no pictures"),
    ("pydantic", True, _package("pydantic"), "no configuration"),
    ("pyyaml", True, _package("yaml", "pyyaml"), "no configuration"),
    ("rich", True, _package("rich"), "no progress display"),
    ("typer", True, _package("typer"), "no command line"),
    ("xatlas", True, _package("xatlas"), "UV charts come from the simpler unwrapper of our own: more seams"),
    ("import names", False, _import_names, "Python started in this folder cannot import pipeline; the command can"),
    ("CUDA device", False, _cuda, "runs on the CPU: the pocket prior in minutes, Stable Diffusion hardly"),
    ("warp-lang", False, _kernels("warp"), "on CUDA our kernels run as plain torch, slower (extra: cuda)"),
    ("imageio-ffmpeg", False, _package("imageio_ffmpeg", "imageio-ffmpeg"), "turntable as WebP only (extra: video)"),
    ("usd-core", False, _package("pxr", "usd-core"), "no USDZ files (extra: usd)"),
    ("tensorboard", False, _package("tensorboard"), "no --log tensorboard (extra: tensorboard)"),
    ("viser", False, _package("viser"), "no page of a run (extra: viewer)"),
    ("ray", False, _package("ray"), "no --engine ray (extra: cluster)"),
    ("gltf-validator", False, _gltf_validator, "the test that validates mesh.glb is skipped"),
    ("tinycudann", False, _kernels("tinycudann"), "nothing: our own hash grid and perceptron are used; built by hand"),
    ("nvdiffrast", False, _kernels("nvdiffrast"), "nothing: our own rasteriser is used; built by hand, never needed"),
    ("kaolin", False, _kernels("kaolin"), "nothing: our own marching tetrahedra are used; on PyPI is only a stub"),
]  # fmt: skip


def examine() -> list[Finding]:
    """Run every check; one that fails in an unforeseen way is reported as broken, with its reason."""
    findings = []
    for name, required, check, cost in [*_CHECKS, *_prior_checks(), *_network_checks()]:
        try:
            state, detail = check()
        except Exception as error:
            state, detail = "broken", _reason(error)
        findings.append(Finding(name, required, state, detail, cost))
    return findings


def print_report(as_json: bool) -> None:
    """Print the report; exits with code 2 where something required is absent."""
    findings = examine()
    fit = all(finding.state == "ok" for finding in findings if finding.required)
    if as_json:
        facts = {"pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
        print(json.dumps(facts | {"fit": fit, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
        print("everything required is there" if fit else "something required is missing: see above")
    if not fit:
        sys.exit(EXIT_USER_ERROR)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"pipeline {__version__}, Python {platform.python_version()}, {platform.platform()}")
    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "state", "version or why", "what its absence costs"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        colour = "red" if finding.required and finding.state != "ok" else colours[finding.state]
        name = finding.name if finding.required else f"{finding.name} (optional)"
        cost = "" if finding.state == "ok" else finding.cost
        table.add_row(name, f"[{colour}]{finding.state}[/]", finding.detail, cost)
    Console(highlight=False).print(table)
