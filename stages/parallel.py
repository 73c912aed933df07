"""The parts that a step's views are rendered in, over one process or several.

Every process of a run holds the same scene and draws the same views. Each renders its own parts; gradients and metrics
are summed over the processes before the optimiser moves, so N processes take the steps of one with N times as many
parts (`accumulate`), to rounding. Processes are those of torch.distributed; without it there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.errors import UserError


class RankLost(Exception):
    """Another process of the run ended while this one worked with it."""


class FirstFailed(RankLost):
    """The first process of the run could not go on, and says why."""


def size() -> int:
    """Return how many processes work on the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0; the first one writes and prints."""
    return dist.get_rank() if size() > 1 else 0


@dataclass(frozen=True)
class Part:
    """One of the equal parts of a step's views.

    Args:
        index: its number in the step, from 0.
        count: parts of the step, of all processes together.
        views: how many views it has.
        mine: whether this process renders it.
        first: whether it is the first one of the step that this process renders.
        last: whether it is the last one.
    """

    index: int = 0
    count: int = 1
    views: int = 1
    mine: bool = True
    first: bool = True
    last: bool = True

    @property
    def slice(self) -> slice:
        """Its views among the step's."""
        return slice(self.index * self.views, (self.index + 1) * self.views)


WHOLE = Part()


class StepParts:
    """The parts of a step's views, and the sums over those of all processes.

    With N processes the step has N times `accumulate` parts. Where that does not divide the views, as for one view a
    step, every process does the whole step, and nothing is summed.

    Args:
        views: of a step.
        accumulate: parts that one process renders one after the other; divides `views`.
    """

    def __init__(self, views: int, accumulate: int) -> None:
        self.split = splits(views, accumulate)
        self.copies = size() if self.split else 1  # how often `join` sums what every process does for itself
        self.count = accumulate * self.copies
        low = rank() * accumulate if self.split else 0
        high = low + accumulate
        self._parts = [
            Part(k, self.count, views // self.count, low <= k < high, k == low, k == high - 1)
            for k in range(self.count)
        ]

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def join(self, leaves: Sequence[Tensor], totals: dict[str, float | Tensor]) -> None:
        """Sum the gradients of leaves, and metrics, over the processes, in place.

        Args:
            leaves: the same ones in the same order in every process; one that got no gradient anywhere keeps none.
            totals: metrics by name, each the sum over this process's parts.
        Raises: RankLost.
        """
        if self.split:
            join(leaves, totals)


def join(leaves: Sequence[Tensor], totals: dict[str, float | Tensor]) -> None:
    """Sum the gradients of leaves, and metrics, over the processes, in place; see StepParts.join."""
    names = sorted(totals)
    device = leaves[0].device
    flags = [float(leaf.grad is not None) for leaf in leaves]
    numbers = [torch.as_tensor(value, device=device).double() for value in (*flags, *(totals[n] for n in names))]
    gradients = [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves]
    summed, flat = torch.stack(numbers), torch.cat(gradients)
    _together(lambda: (dist.all_reduce(summed), dist.all_reduce(flat)))
    flags, values = summed[: len(leaves)].tolist(), summed[len(leaves) :]
    for leaf, gradient, flag in zip(leaves, flat.split([leaf.numel() for leaf in leaves]), flags, strict=True):
        leaf.grad = gradient.view_as(leaf) if flag else None
    totals.update(zip(names, values.tolist() if device.type == "cpu" else values.unbind(), strict=True))


class Draws:
    """The random numbers of a guide: a stream for a whole step, or for each of its parts, in whichever process.

    Args:
        generator: on the CPU; all follows from its state.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self._seed = generator, 0

    def of_part(self, part: Part) -> tuple[torch.Generator, torch.Generator]:
        """Return the step's stream, from its beginning, and the part's; they are one where the step has one part."""
        if part.count == 1:
            return self.generator, self.generator
        if part.first:
            self._seed = int(torch.randint(2**62, (), generator=self.generator))
        step, stream = (torch.Generator().manual_seed(self._seed + k) for k in (0, 1 + part.index))
        return step, stream


def splits(views: int, accumulate: int) -> bool:
    """Return whether the views of a step are split over several processes."""
    return size() > 1 and views % (accumulate * size()) == 0


def any_rank(flag: bool) -> bool:
    """Return whether a flag is set in any process. Raises: RankLost."""
    if size() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    _together(lambda: dist.all_reduce(flags, dist.ReduceOp.MAX))
    return bool(flags)


def agree(name: str, state: Callable[[], Mapping[str, Tensor]]) -> None:
    """Check that all processes hold the same numbers. Raises: UserError where they do not; RankLost.

    Args:
        name: of what holds them, for the message.
        state: returns them by name.
    """
    if size() == 1:
        return
    tensors = [tensor for tensor in state().values() if tensor.is_floating_point()]
    sums = torch.stack([tensor.detach().double().sum().cpu() for tensor in tensors])
    low, high = sums.clone(), sums.clone()
    _together(lambda: (dist.all_reduce(low, dist.ReduceOp.MIN), dist.all_reduce(high, dist.ReduceOp.MAX)))
    if not torch.equal(low, high):
        raise UserError(
            f"The processes of this run no longer hold the same {name}",
            f"sums of the same parameters differ by up to {float((high - low).abs().max()):.2g}",
            "use devices of one kind and one build of torch, or fewer processes",
        )


def first_then_others(call: Callable[[], Any]) -> Any:
    """Call in the first process, then in the others; returns what it returns here.

    Raises: what the call raises; in the others FirstFailed where it failed in the first.
    """
    if size() == 1:
        return call()
    if rank() == 0:
        try:
            value = call()
        except BaseException:
            with contextlib.suppress(RankLost):
                any_rank(True)
            raise
        any_rank(False)
        return value
    if any_rank(False):
        raise FirstFailed
    return call()


def from_first(call: Callable[[], str]) -> str:
    """Return the text of a call that the first process alone makes. Raises: what it raises; RankLost in the others."""
    if size() == 1:
        return call()
    text = first_then_others(call) if rank() == 0 else first_then_others(lambda: "")
    texts = [text]
    _together(lambda: dist.broadcast_object_list(texts))
    return texts[0]


@contextlib.contextmanager
def undone_if_lost(generators: Sequence[torch.Generator | None], *modules: nn.Module) -> Iterator[None]:
    """Put generators and buffers back where a process is lost inside: a step that was not taken leaves no trace."""
    if size() == 1:
        yield
        return
    streams = [(stream, stream.get_state()) for stream in generators if stream is not None]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    except RankLost:
        for stream, state in streams:
            stream.set_state(state)
        for buffer, values in buffers:
            buffer.copy_(values)
        raise


def _together(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except (RuntimeError, ValueError) as error:  # torch's backends raise one or the other when a peer is gone
        raise RankLost(str(error).split("\n")[0]) from error
