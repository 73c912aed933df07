"""One training loop for all pocket models: AdamW, warm-up and cosine decay, EMA, resumable to the step.

Every step's data order and noise come from generators seeded by (seed, step), so nothing random is stored.
The schedule runs over a number of steps, or over minutes of training time for a machine of unknown speed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LossStep = Callable[[int], Tensor]  # step number -> loss


@dataclass(frozen=True)
class Schedule:
    """The length of a training: a number of steps, or minutes of training time; exactly one of them."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("steps, minutes: wanted exactly one of them")

    def share(self, step: int, seconds: float) -> float:
        """Return how much of it is over after so many steps and seconds, in [0, 1]."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))


class Training:
    """Parameters, moments and averages of one run in `folder`.

    Args:
        modules: what is trained, by name. folder: where state.safetensors, state.json and log.jsonl live.
        lr: peak learning rate. steps / minutes: the length of the schedule, exactly one of them.
        ema: decay of the averaged weights, warmed up over the first steps.
        rates: factors on the rate of some of the modules, by name.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        folder: Path,
        *,
        lr: float,
        steps: int | None = None,
        minutes: float | None = None,
        ema: float = 0.995,
        weight_decay: float = 0.01,
        warmup: int = 200,
        rates: dict[str, float] | None = None,
    ) -> None:
        self.schedule, self.folder, self.lr, self.ema_decay = Schedule(steps, minutes), folder, lr, ema
        self.warmup = warmup
        self.parameters = {
            f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.average = {key: p.detach().clone() for key, p in self.parameters.items()}
        groups = []
        for name in modules:
            members = [p for key, p in self.parameters.items() if key.startswith(f"{name}.")]
            factor = (rates or {}).get(name, 1.0)
            for part, decay in (
                ([p for p in members if p.ndim > 1], weight_decay),
                ([p for p in members if p.ndim <= 1], 0.0),
            ):
                groups.append({"params": part, "weight_decay": decay, "factor": factor})
        groups = [group for group in groups if group["params"]]
        self.optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
        self.step_index, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            self._load()

    @property
    def progress(self) -> float:
        """Return the share of the schedule that is over, in [0, 1]."""
        return self.schedule.share(self.step_index, self.seconds)

    def run(self, loss_step: LossStep, *, save_minutes: float = 3.0, sample: Callable[[], None] | None = None) -> None:
        """Train to the end of the schedule; saves every `save_minutes` and at the end, calling `sample` each time."""
        last_save, running = time.perf_counter(), None
        while self.progress < 1:
            start = time.perf_counter()
            rate = self.lr * min(1, (self.step_index + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.progress))
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            loss = loss_step(self.step_index)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimiser.step()
            self.step_index += 1
            decay = min(self.ema_decay, (1 + self.step_index) / (10 + self.step_index))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
            self.seconds += time.perf_counter() - start
            value = loss.item()  # where the device is waited for, once a step
            running = value if running is None else 0.98 * running + 0.02 * value
            if self.step_index % 50 == 0:
                self._log({"step": self.step_index, "loss": round(running, 5), "lr": rate, "s": round(self.seconds, 1)})
            if time.perf_counter() - last_save > 60 * save_minutes:
                self.save()
                with self.averaged():
                    if sample is not None:
                        sample()
                last_save = time.perf_counter()
        self.save()

    def finish(self, loss_step: LossStep, sample: Callable[[], None], export: Callable[[], None], only: bool) -> None:
        """Train to the end unless `only` exporting, then sample and export the averaged weights."""
        if not only:
            self.run(loss_step, sample=sample)
        with self.averaged():
            sample()
            export()

    def averaged(self) -> _Swapped:
        """Return a context in which the modules hold the averaged weights."""
        return _Swapped(self.parameters, self.average)

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename."""
        tensors = {f"p/{k}": v.detach() for k, v in self.parameters.items()}
        tensors |= {f"e/{k}": v for k, v in self.average.items()}
        for key, p in self.parameters.items():
            for name, value in self.optimiser.state.get(p, {}).items():
                tensors[f"o/{name}/{key}"] = value
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, self.folder / "state.part")
        os.replace(self.folder / "state.part", self.folder / "state.safetensors")
        (self.folder / "state.json").write_text(json.dumps({"step": self.step_index, "seconds": self.seconds}))

    def _load(self) -> None:
        meta = json.loads((self.folder / "state.json").read_text())
        self.step_index, self.seconds = meta["step"], meta["seconds"]
        tensors = load_file(self.folder / "state.safetensors")
        if strange := {f"p/{key}" for key in self.parameters} ^ {key for key in tensors if key.startswith("p/")}:
            raise SystemExit(
                f"the training in {self.folder} is of other parts ({min(strange).removeprefix('p/')} first): give "
                "another --work, or delete it"
            )
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(tensors[f"p/{key}"])
                self.average[key].copy_(tensors[f"e/{key}"])
                names = ("step", "exp_avg", "exp_avg_sq")
                moments = {n: tensors[f"o/{n}/{key}"] for n in names if f"o/{n}/{key}" in tensors}
                self.optimiser.state[p] = {n: value.to(p.device) for n, value in moments.items()}
        print(f"resumed at step {self.step_index}, {self.seconds:.0f} s", flush=True)

    def _log(self, row: dict) -> None:
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


class _Swapped:
    """Swaps two sets of tensors on entry and back on exit."""

    def __init__(self, parameters: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        self.pairs = [(parameters[k], average[k]) for k in parameters]

    def _swap(self) -> None:
        with torch.no_grad():
            for a, b in self.pairs:
                copy = a.clone()
                a.copy_(b)
                b.copy_(copy)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
