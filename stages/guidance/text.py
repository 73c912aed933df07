"""The text half of a diffusion prior: tokenizer, encoder loaded when needed and freed after, cached embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.prompts import check_length

T5_LENGTH = 77  # DeepFloyd IF's own limit; the T5 tokenizer itself states none


class TextEncoder:
    """Prompts to last hidden states [P, L, D]; each prompt is encoded once and remembered.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        load: gives the encoder module in evaluation mode on its device; called again after :meth:`release`.
        family: "clip" (attention mask only if the encoder's config asks for it) or "t5" (mask always, lower case).
    """

    def __init__(self, tokenizer: Any, load: Callable[[], torch.nn.Module], family: str) -> None:
        self.tokenizer, self._load, self.family = tokenizer, load, family
        self._model: torch.nn.Module | None = load()
        self._cache: dict[str, Tensor] = {}
        self.use_mask = family == "t5" or bool(getattr(self._model.config, "use_attention_mask", False))
        self.width: int = self._model.config.hidden_size
        limit = tokenizer.model_max_length
        if family == "t5":
            self.limit = min(limit, T5_LENGTH)
        else:
            self.limit = min(limit, self._model.config.max_position_embeddings)

    def _clean(self, prompt: str) -> str:
        return prompt.lower().strip() if self.family == "t5" else prompt

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, special tokens included, without cutting or padding."""
        ids = self.tokenizer(self._clean(prompt), padding=False, truncation=False, verbose=False).input_ids
        return len(ids)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the tokenizer maps to its unknown token, in order, each once.

        Empty for byte-level tokenizers, which know every string.
        """
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return []
        encoded = self.tokenizer(
            self._clean(prompt),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        text = self._clean(prompt)
        words = [
            text[first:last]
            for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if token == unknown
        ]
        return list(dict.fromkeys(word for word in words if any(c.isalnum() for c in word)))

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Last hidden states [P, L, D] of prompts padded to the encoder's length; refuses prompts that do not fit."""
        new = list(dict.fromkeys(p for p in prompts if p not in self._cache))
        if new:
            check_length(new, self.count, self.limit)
            if self._model is None:
                self._model = self._load()
            device = next(self._model.parameters()).device
            tokens = self.tokenizer(
                [self._clean(p) for p in new],
                padding="max_length",
                max_length=self.limit,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens.attention_mask.to(device) if self.use_mask else None
            hidden = self._model(tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
            self._cache.update(zip(new, hidden, strict=True))
        return torch.stack([self._cache[p] for p in prompts])

    def release(self) -> None:
        """Free the encoder; prompts not yet embedded load it again."""
        self._model = None
