"""Shared parts of the stages' optimisation.

A step of Adam with a rate for every group, which leaves out gradients that are not finite; the part of a saved state
that lies below a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from stages.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_accumulate(stage: str, views: int, parts: int) -> None:
    """Raise UserError unless the views of a step can be rendered in that many equal parts, `accumulate`."""
    if views % parts:
        raise UserError(
            f"{stage}.accumulate does not divide {stage}.views_per_step",
            f"{views} views cannot be rendered in {parts} equal parts",
            f"set {stage}.accumulate to a divisor of {views}",
        )


def under_prefix(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries NAME.KEY of a flat state, by KEY."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _read(number: Tensor | float, metrics: dict[str, float | Tensor]) -> float:
    """A number's value, and in place those of the metrics that are tensors: one wait for the device for all of them."""
    names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
    if not names:
        return float(number)
    waiting = [torch.as_tensor(number, device=metrics[names[0]].device), *(metrics[name] for name in names)]
    first, *values = torch.stack([value.double() for value in waiting]).tolist()
    metrics.update(zip(names, values, strict=True))
    return first


class GroupedAdam:
    """Adam over groups of named parameters.

    Args:
        groups: by name, one mapping for every learning rate.
        betas: Adam's decay rates.
        eps: Adam's.
        patience: gradients in a row that are not finite after which `step` gives up.
        stage: whose name the error then gives.
        advice: what the error says to do.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        patience: int,
        stage: str,
        advice: str,
    ) -> None:
        self.parameters = {name: p for group in groups for name, p in group.items()}
        sets = [{"params": list(group.values())} for group in groups]
        self.optimiser = torch.optim.Adam(sets, lr=1.0, betas=betas, eps=eps, fused=True)
        self.patience, self.stage, self.advice, self.skipped = patience, stage, advice, 0

    def step(self, rates: Sequence[float], at: int, metrics: dict[str, float | Tensor] | None = None) -> float:
        """Move against the gradients and forget them.

        Args:
            rates: of each group.
            at: the step's number, for the message.
            metrics: of the step; those that are still on the device become floats, read together with the norm.
        Returns: the gradients' norm; -1 for a step that was skipped because it is not finite (metrics are finite).
        Raises: UserError after `patience` skipped steps in a row.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        norm = _read(torch.linalg.vector_norm(torch.stack(norms)) if norms else 0.0, metrics or {})
        if math.isfinite(norm):
            self.skipped = 0
            for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
                group["lr"] = rate
            self.optimiser.step()
        else:
            norm, self.skipped = -1.0, self.skipped + 1
            if self.skipped >= self.patience:
                raise UserError(
                    f"The {self.stage} stage diverged",
                    f"the gradient was not finite in {self.skipped} steps in a row, last at step {at}",
                    self.advice,
                )
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def moments(self, *parameters: Parameter) -> Iterator[tuple[dict[str, Tensor], str]]:
        """Return (state, key) of Adam's moments of these parameters, to be exchanged; none before a step."""
        for parameter in parameters:
            state = self.optimiser.state.get(parameter, {})
            yield from ((state, key) for key in MOMENTS if key in state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the count of skipped steps, and Adam's state as adam.NAME.KEY."""
        state = {"skipped": torch.tensor(self.skipped)}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"adam.{name}.{key}"] = value.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what state_dict returned; other keys are left alone."""
        self.skipped = int(state["skipped"])
        for name, parameter in self.parameters.items():
            if f"adam.{name}.step" in state:
                saved = {key: state[f"adam.{name}.{key}"] for key in ("step", *MOMENTS)}
                self.optimiser.state[parameter] = {k: v.to(parameter.device).clone() for k, v in saved.items()}
