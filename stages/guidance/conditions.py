"""What the prior is told for each view: embeddings of every text of a run, and which of them a view needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.cameras import Views, orbit_views
from stages.guidance.prior import FreesText, Prior
from stages.prompts import ViewPrompts


@dataclass(frozen=True)
class ViewConditions:
    """Embeddings of B views by branch: prompt, negative, empty and, under Perp-Neg, against 0, against 1.

    embeddings: of all texts. rows, others, share: of a branch, the texts [B] of each view, the texts [B] they are mixed
        with and the share [B] of the first; a branch without `others` is not mixed.
    against: Perp-Neg's weights [B] <= 0 of each pushed branch; empty without it.
    """

    embeddings: Any
    rows: dict[str, Tensor]
    others: dict[str, Tensor]
    share: Tensor
    against: list[Tensor]

    def distinct(self, *names: str) -> tuple[list[str], list[int]]:
        """The first of each group of named branches that ask the same of every view, and each branch's group.

        Without a negative prompt `negative` is `empty`, so a rule that asks for both is answered with one prediction.
        """
        first: list[str] = []
        group: list[int] = []
        for name in names:
            same = [k for k, other in enumerate(first) if self._asks_the_same(name, other)]
            group.append(same[0] if same else len(first))
            first += [] if same else [name]
        return first, group

    def _asks_the_same(self, a: str, b: str) -> bool:
        mixed = self.others.get(a), self.others.get(b)
        if mixed[0] is not mixed[1] and (mixed[0] is None or mixed[1] is None or not torch.equal(*mixed)):
            return False
        return torch.equal(self.rows[a], self.rows[b])

    def embedding(self, *names: str) -> Any:
        """The embeddings of the named branches, one after the other: [len(names) B, ...]."""
        first = self.embeddings[torch.cat([self.rows[name] for name in names])]
        if not any(name in self.others for name in names):
            return first
        second = self.embeddings[torch.cat([self.others.get(name, self.rows[name]) for name in names])]
        share = self.share.repeat(len(names)).to(first).reshape(-1, *[1] * (first.dim() - 1))
        return torch.lerp(second, first, share)


class Conditions:
    """All texts of a run, embedded at once; the prior's text encoder is released after, unless it is to be kept.

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
    def plain(self) -> Any:
        """The embedding [1, ...] of the prompt as a front view asks for it."""
        return self.of(orbit_views([0.0], 0.0)).embedding("prompt")

    def _rows(self, texts: list[str]) -> Tensor:
        return torch.tensor([self._index[text] for text in texts])

    def of(self, views: Views, textureless: bool = False) -> ViewConditions:
        """What B views ask for."""
        asked = self.prompts.asked(views, textureless)
        rows = {
            "prompt": self._rows([a.text for a in asked]),
            "negative": self._rows([a.negative for a in asked]),
            "empty": self._rows([""] * len(asked)),
        }
        others, share = {}, torch.tensor([a.share for a in asked], dtype=torch.float32)
        if any(a.share != 1 for a in asked):
            others["prompt"] = self._rows([a.other for a in asked])
        against = []
        for k in range(max(len(a.against) for a in asked)):
            pushed = [a.against[k] if a.against else (a.text, 0.0) for a in asked]
            rows[f"against {k}"] = self._rows([text for text, _ in pushed])
            against.append(torch.tensor([weight for _, weight in pushed], dtype=torch.float32))
        return ViewConditions(self._embeddings, rows, others, share, against)
