"""The text half of a diffusion prior: tokenizers, encoders loaded when needed and freed after, cached embeddings."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stages.errors import UserError
from stages.guidance.diffusion.folder import load_part
from stages.guidance.diffusion.text_store import TextStore
from stages.prompts import check_length


@dataclass(frozen=True)
class EncoderSpec:
    """The outputs that a model family uses of one of its text encoders, as its diffusers pipeline does.

    Args:
        part: folder of the encoder.
        tokenizer: folder of its tokenizer.
        classes: transformers classes that may fill it.
        tokens: which hidden states are used, the last ones (after the final norm) or those before the last layer.
        pooled: the output that sums up the prompt.
        limit: tokens at most, where the family sets it; else the encoder does.
        mask: padding masked out always, never, or as the encoder's config says.
        clean: prompts stripped, in lower case.
        optional: a folder may leave it out.
    """

    part: str
    tokenizer: str
    classes: tuple[str, ...]
    tokens: Literal["last", "penultimate", "none"] = "last"
    pooled: Literal["pooler_output", "text_embeds"] | None = None
    limit: int | None = None
    mask: Literal["always", "never", "config"] = "never"
    clean: bool = False
    optional: bool = False

    def clean_text(self, prompt: str) -> str:
        """Return the prompt as the encoder reads it."""
        return prompt.lower().strip() if self.clean else prompt

    def count(self, tokenizer: Any, prompt: str) -> int:
        """Count the tokens of a prompt, special tokens included, without truncation or padding."""
        return len(tokenizer(self.clean_text(prompt), padding=False, truncation=False, verbose=False).input_ids)


Encoded = tuple[Tensor | None, Tensor | None]  # tokens [P, L, D], pooled [P, W]


class TextEncoder:
    """One tokenizer and its encoder.

    Args:
        spec: what is taken from it.
        tokenizer: a transformers tokenizer with a padding token.
        load: gives the encoder module in evaluation mode on its device; called again after :meth:`release`.
        config: the encoder's transformers config.
    """

    def __init__(self, spec: EncoderSpec, tokenizer: Any, load: Callable[[], torch.nn.Module], config: Any) -> None:
        self.spec, self.tokenizer, self._load = spec, tokenizer, load
        self._model: torch.nn.Module | None = None
        self.limit = token_limit(spec, tokenizer, config)
        masks = bool(getattr(config, "use_attention_mask", False))
        self.use_mask = spec.mask == "always" or (spec.mask == "config" and masks)

    def count(self, prompt: str) -> int:
        """Count the tokens of a prompt; see EncoderSpec.count."""
        return self.spec.count(self.tokenizer, prompt)

    def load(self) -> torch.nn.Module:
        """Return the encoder, loading it first if needed."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Encoded:
        """Encode prompts, padded to the encoder's length: tokens and pooled embedding, None for what is not taken."""
        model, spec = self.load(), self.spec
        device = next(model.parameters()).device
        tokens = self.tokenizer(
            [self.spec.clean_text(p) for p in prompts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device) if self.use_mask else None
        deep = {"output_hidden_states": True} if spec.tokens == "penultimate" else {}
        out = model(tokens.input_ids.to(device), attention_mask=mask, **deep)
        hidden = out.hidden_states[-2] if deep else out.last_hidden_state if spec.tokens == "last" else None
        return hidden, getattr(out, spec.pooled) if spec.pooled else None

    def release(self) -> None:
        """Free the encoder."""
        self._model = None


class PromptEncoder:
    """All text encoders of a prior, with a cache of embeddings.

    Args:
        encoders: in the family's order.
        join: one tensor [P, L, D] from what they give, on `device`.
        empty_is_zero: the empty prompt stands for zeros, as SDXL's pipeline has it.
        store: where embeddings outlive the process; None: nowhere.
    """

    def __init__(
        self,
        encoders: list[TextEncoder],
        join: Callable[[list[Encoded]], Tensor],
        device: torch.device,
        empty_is_zero: bool = False,
        store: TextStore | None = None,
    ) -> None:
        self.encoders, self._join, self._device, self._empty_is_zero = encoders, join, device, empty_is_zero
        self._store = store
        self._cache: dict[str, Tensor] = {}

    @property
    def limit(self) -> int:
        """Tokens of the encoder that reads least."""
        return min(encoder.limit for encoder in self.encoders)

    def check(self, prompts: list[str]) -> None:
        """Refuse prompts that any of the encoders would cut."""
        for encoder in self.encoders:
            check_length(prompts, encoder.count, encoder.limit)

    def embed(self, prompts: list[str], keep: bool = True) -> Tensor:
        """Embed prompts, [P, L, D]. Raises: UserError for those that do not fit.

        keep: encoders stay loaded for further prompts until :meth:`release`; otherwise each is freed before the next
            is loaded, so that no two are in memory at once.
        """
        new = list(dict.fromkeys(p for p in prompts if p not in self._cache))
        if new:
            self.check(new)
            self._cache.update(zip(new, self._encoded(new, keep), strict=True))
            if self._empty_is_zero and "" in new:
                self._cache[""] = torch.zeros_like(self._cache[""])
        return torch.stack([self._cache[p] for p in prompts])

    def _encoded(self, prompts: list[str], keep: bool) -> Tensor:
        """Embeddings of prompts that were not asked for before, from the disk or from the encoders."""
        embeddings = None if self._store is None else self._store.load(prompts)
        if embeddings is not None:
            return embeddings.to(self._device)
        encoded = []
        for encoder in self.encoders:
            parts = encoder.encode(prompts)
            encoded.append(tuple(part if part is None else part.to(self._device) for part in parts))
            if not keep:
                encoder.release()
                _collect()
        joined = self._join(encoded)
        if self._store is not None:
            self._store.save(prompts, joined)
        return joined

    def forget(self) -> None:
        """Forget the prompts that were embedded: the next ones are encoded as a newly loaded prior would."""
        self._cache.clear()

    def release(self) -> None:
        """Free the encoders; prompts not yet embedded load them again."""
        for encoder in self.encoders:
            encoder.release()
        _collect()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_max_length(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer whose config says how long a text may be in something that is no number."""
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float) or limit < 1:
        raise UserError(what, f"its tokenizer_config.json says model_max_length {limit!r}", "get the folder again")


def token_limit(spec: EncoderSpec, tokenizer: Any, config: Any) -> int:
    """Return how many tokens an encoder reads: the least that family, tokenizer and encoder allow."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), spec.limit]
    return min(limit for limit in limits if limit is not None)


def load_tokenizer(folder: Path, part: str) -> Any:
    """Load the tokenizer in a part of a folder. Raises: UserError, naming the missing file or package.

    The files are looked at first: without them transformers makes a tokenizer that knows no word, and says nothing.
    """
    import transformers

    what = f"Cannot load the {part} of {folder}"
    names = {path.name for path in (folder / part).iterdir()}
    if not ("tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names):
        if not any(name.endswith(".model") for name in names):
            why = "it has neither tokenizer.json, nor vocab.json and merges.txt, nor a .model file"
            raise UserError(what, why, "get the folder again")
        absent = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if absent:
            why = f"reading its .model file takes a package that is not installed ({', '.join(absent)})"
            raise UserError(what, why, "pip install sentencepiece protobuf")

    def load() -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / part, local_files_only=True)
        tokenizer("a", verbose=False)  # some damage to its file shows first in a text
        return tokenizer

    tokenizer = load_part(folder, part, load)
    check_max_length(tokenizer, what)
    if tokenizer.pad_token is None:
        raise UserError(what, "it has no padding token", "get the folder again")
    if "tokenizer.json" not in names and type(tokenizer).__name__.startswith("CLIPTokenizer"):
        _check_merges(folder / part, tokenizer, what)
    return tokenizer


def _check_merges(part: Path, tokenizer: Any, what: str) -> None:
    """Refuse a CLIP tokenizer whose merges.txt does not make all tokens of its vocab.json.

    One that is cut at the end of a line loads all the same, and reads prompts in smaller pieces than the model knows.
    CLIP's vocabulary holds 256 letters, each within and at the end of a word, what each merge makes, and the special
    tokens (byte pair encoding, Sennrich et al., arXiv 1508.07909).
    """
    vocabulary = json.loads((part / "vocab.json").read_text(encoding="utf-8"))
    lines = (part / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = {"".join(line.split()) for line in lines if not line.startswith("#version")}
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    long = [token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in special]
    absent = sum(token not in merges for token in long)
    if absent:
        why = f"merges.txt makes {len(long) - absent} of vocab.json's {len(long)} tokens of several letters"
        raise UserError(what, f"{why}: it is cut off", "get the folder again")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
