"""Memory: what a stage's prior will need, said before it is loaded, and what to change when memory runs out."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError, address_limit

if TYPE_CHECKING:
    import torch

    from pipeline.priors.source import Ask
    from pipeline.priors.sources import StagePrior

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory(most: int = 512 << 20) -> bool:
    """Let glibc keep up to `most` bytes of freed memory for the next allocation instead of giving them back.

    A step frees and allocates the same tensors again and again, and each page given back is zeroed and mapped anew:
    1,466 pages and 18 ms of system time in a fine step, 9 pages and none of it with this. Returns False where the C
    library is another one.
    """
    # Windows has no CDLL(None), and macOS no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, most))


def forecast(prior: StagePrior, device: torch.device) -> str | None:
    """Return a line on the memory that a fetched prior takes, with a warning where the device has less; None for one
    without a plan, as our own are.

    Raises: UserError for a folder that cannot be loaded.
    """
    ask, plan = prior.ask, prior.facts.plan
    if plan is None:
        return None
    from stages.guidance.diffusion.footprint import GB, footprint
    from stages.guidance.residuals import RULES, max_predictions

    settings, guidance, views = ask.diffusion, ask.guidance, images_at_once(ask)
    predictions = views * max_predictions(guidance, ask.prompts)
    vsd = guidance.rule if "trainable" in RULES[guidance.rule.name].needs else None
    try:
        decodes = guidance.image_term > 0
        need = footprint(plan, settings, device, images=views, predictions=predictions, vsd=vsd, decodes=decodes)
    except UserError:
        raise
    except Exception as error:  # an estimate is worth no run: a network that meta tensors cannot pass says why
        return f"memory: cannot be estimated ({type(error).__name__}: {error})"
    free = free_bytes(device)
    line = f"memory: {need.describe()}" + ("" if free is None else f", {free / GB:.2f} GB free")
    if free is not None and need.peak > free:
        line += "\nthis may not fit; what helps: " + ", ".join(advice(prior))
    return line


def images_at_once(ask: Ask) -> int:
    """Return how many views of a step go through the prior together."""
    from stages.parallel import size, splits

    settings = ask.settings
    views, parts = settings.views_per_step, getattr(settings, "accumulate", 1)
    return -(-views // (parts * size() if splits(views, parts) else parts))


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where nobody says."""
    if device.type == "cuda":
        import torch

        # What torch holds back is free for the next allocation.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024


def advice(prior: StagePrior) -> list[str]:
    """Return the three settings that save most and are not set yet, as one writes them on the command line.

    In the order of what they save on the known models, by stages.guidance.diffusion.footprint: views one by one (a
    512-pixel view takes 1.5 GB of the autoencoder in half precision), the autoencoder's blocks repeated (a third of
    that), the denoiser's weights in main memory (1.7 GB to 24 GB); then what costs quality.
    """
    settings, stage = prior.ask.settings, prior.ask.stage
    savings: list[str] = []
    if images_at_once(prior.ask) > 1 and hasattr(settings, "accumulate"):
        savings.append(f"{stage}.accumulate={settings.views_per_step}")
    savings += prior.source.savings(prior.ask)
    if settings.resolution > 64:
        savings.append(f"{stage}.resolution={settings.resolution // 2}")
    if settings.views_per_step > 1:
        savings.append(f"{stage}.views_per_step={settings.views_per_step // 2}")
    if hasattr(settings, "samples"):
        savings.append(f"{stage}.samples={max(settings.samples // 2, 16)}")
    return savings[:3]


def explain_shortage(error: BaseException, prior: StagePrior, folder: Path) -> UserError:
    """Return the UserError for memory that ran out in a stage: three settings that help, and how the run goes on."""
    reason = str(error).strip().partition("\n")[0] or "the machine refused an allocation"
    fix = f"set one or more of these in {folder / 'config.yaml'}: {', '.join(advice(prior))}"
    limit = address_limit()
    if limit:
        reason += f"; this shell lets a process address {limit / 2**30:.1f} GB"
        fix = f"ulimit -v unlimited, or {fix}"
    again = f"then go on from the last checkpoint: pipeline resume {folder}"
    return UserError(f"{prior.ask.stage} ran out of memory", reason, f"{fix}\n{again}")
