"""Text conditions of the prior: embeddings of every text of a run, and which of them each view needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stages.cameras import Views, orbit_views
from stages.guidance.prior import FreesText, Prior
from stages.prompts import ViewPrompts


@dataclass(frozen=True)
class ViewConditions:
    """Embeddings of B views by branch: "prompt", "negative", "empty" and, under Perp-Neg, "perp_neg 0", "perp_neg 1".

    Args:
        embeddings: of all texts of the run.
        rows: by branch, the text [B] of each view as a row of `embeddings`.
        others: by branch, the text [B] that it is mixed with; a branch that is not in it is not mixed.
        share: [B], of the first text in a mixture.
        perp_neg_weights: Perp-Neg's weights [B] <= 0 of its branches; empty without it.
    """

    embeddings: Any
    rows: dict[str, Tensor]
    others: dict[str, Tensor]
    share: Tensor
    perp_neg_weights: list[Tensor]
    twin: ViewConditions | None = None  # the same on the embeddings' device, to index them with

    def on_device(self, device: torch.device, t: Tensor) -> tuple[ViewConditions, Tensor]:
        """Return the conditions with their twin on a device, `perp_neg_weights` moved, and t: in one copy.

        Args:
            device: of the predictions.
            t: [B] long, timesteps.
        """
        if device.type == "cpu":
            return self, t
        row_names, other_names = list(self.rows), list(self.others)
        host = [*self.rows.values(), *self.others.values(), self.share, *self.perp_neg_weights, t]
        numbers = iter(torch.stack([values.double() for values in host]).to(device).unbind())
        rows = {name: next(numbers).long() for name in row_names}
        others = {name: next(numbers).long() for name in other_names}
        share = next(numbers).float()
        perp_neg_weights = [next(numbers).float() for _ in self.perp_neg_weights]
        twin = None
        if isinstance(self.embeddings, Tensor) and self.embeddings.device == device:
            twin = ViewConditions(self.embeddings, rows, others, share, perp_neg_weights)
        return replace(self, perp_neg_weights=perp_neg_weights, twin=twin), next(numbers).long()

    def distinct(self, *names: str) -> tuple[list[str], list[int]]:
        """Return the first of each group of named branches with the same texts for every view, and each branch's group.

        Without a negative prompt `negative` is `empty`, so a rule that reads both costs one prediction.
        """
        first: list[str] = []
        group: list[int] = []
        for name in names:
            same = [k for k, other in enumerate(first) if self._same_texts(name, other)]
            group.append(same[0] if same else len(first))
            first += [] if same else [name]
        return first, group

    def _same_texts(self, a: str, b: str) -> bool:
        mixed = self.others.get(a), self.others.get(b)
        if mixed[0] is not mixed[1] and (mixed[0] is None or mixed[1] is None or not torch.equal(*mixed)):
            return False
        return torch.equal(self.rows[a], self.rows[b])

    def embedding(self, *names: str) -> Any:
        """Return the embeddings of the named branches, one after the other: [len(names) B, ...]."""
        if self.twin is not None:
            return self.twin.embedding(*names)
        first = self.embeddings[torch.cat([self.rows[name] for name in names])]
        if not any(name in self.others for name in names):
            return first
        second = self.embeddings[torch.cat([self.others.get(name, self.rows[name]) for name in names])]
        share = self.share.repeat(len(names)).to(first).reshape(-1, *[1] * (first.dim() - 1))
        return torch.lerp(second, first, share)


class Conditions:
    """All texts of a run, embedded at once.

    Args:
        prior: embeds the texts.
        prompts: the texts by view.
        release_text: whether the prior's text encoder is freed after.
    Raises: UserError from the prior for a text that its encoder would cut.
    """

    def __init__(self, prior: Prior, prompts: ViewPrompts, *, release_text: bool = True) -> None:
        self.prompts = prompts
        texts = list(dict.fromkeys([*prompts.all_texts(), ""]))
        self._index = {text: i for i, text in enumerate(texts)}
        self._embeddings: Any = prior.embed(texts)
        if release_text and isinstance(prior, FreesText):
            prior.release_text_encoder()

    @property
    def front(self) -> Any:
        """The embedding [1, ...] of the prompt for a front view."""
        return self.for_views(orbit_views([0.0], 0.0)).embedding("prompt")

    def _rows(self, texts: list[str]) -> Tensor:
        return torch.tensor([self._index[text] for text in texts])

    def for_views(self, views: Views, textureless: bool = False) -> ViewConditions:
        """Return the conditions of B views; textureless: of renders without colours."""
        texts = self.prompts.view_texts(views, textureless)
        rows = {
            "prompt": self._rows([view.text for view in texts]),
            "negative": self._rows([view.negative for view in texts]),
            "empty": self._rows([""] * len(texts)),
        }
        others, share = {}, torch.tensor([view.share for view in texts], dtype=torch.float32)
        if any(view.share != 1 for view in texts):
            others["prompt"] = self._rows([view.other for view in texts])
        perp_neg_weights = []
        for k in range(max(len(view.perp_neg) for view in texts)):
            pairs = [view.perp_neg[k] if view.perp_neg else (view.text, 0.0) for view in texts]
            rows[f"perp_neg {k}"] = self._rows([text for text, _ in pairs])
            perp_neg_weights.append(torch.tensor([weight for _, weight in pairs], dtype=torch.float32))
        return ViewConditions(self._embeddings, rows, others, share, perp_neg_weights)
