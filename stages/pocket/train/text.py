"""Train the text encoder that all pocket priors share, and the classifier of words on its hidden states.

A UNet's losses ask an encoder for little: "a pink mug" and "a pink lamp" may end up in nearly one place. A layout must
know each word, so the encoder is taught to keep them apart, on captions and on sentences of random words.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.guidance.diffusion.layout import CLASSES, Layout
from stages.pocket import models, world
from stages.pocket.train.device import device_of

SUFFIXES = ("", ", front view", ", left side view", ", right side view", ", back view", ", overhead view")
STAY = 3.0  # weight of the change, relative to what was there, of captions that UNets know


@torch.no_grad()
def encode_text(tokenizer, text_encoder, captions: list[str]) -> Tensor:
    """Encode captions to [B, TOKENS, WIDTH]; equal ones are encoded once."""
    texts = list(dict.fromkeys(captions))
    rows = torch.tensor([texts.index(caption) for caption in captions], device=text_encoder.device)
    return text_encoder(token_ids(tokenizer, texts).to(text_encoder.device)).last_hidden_state[rows]


def token_ids(tokenizer, texts: list[str]) -> Tensor:
    """Return token ids [B, TOKENS], cut or padded."""
    options = {"padding": "max_length", "truncation": True, "max_length": models.TOKENS, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def find_text(args: argparse.Namespace):
    """Return tokenizer and frozen encoder from --work, else those of --start or of the exported pixel prior."""
    from transformers import AutoTokenizer, CLIPTextModel

    folder = args.start or args.out / "pixel"
    work_folder = args.work / "text" / "model"
    encoder = CLIPTextModel.from_pretrained(work_folder if work_folder.is_dir() else folder / "text_encoder")
    has_tokenizer = (folder / "tokenizer").is_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer") if has_tokenizer else models.make_tokenizer()
    return tokenizer, encoder.float().eval().requires_grad_(False).to(device_of(args))


class Sentences:
    """Captions and sentences of random words, with the number of each token's word among a layout's classes."""

    def __init__(self, words: dict[str, list[str]]) -> None:
        class_words = [word for name in CLASSES for word in words[name]]
        others = [word for word in [*world.words(), *models.VIEW_WORDS] if word not in class_words]
        self.other = len(class_words)  # the number of every word that belongs to no class
        self.number = {word: k for k, word in enumerate(class_words)} | dict.fromkeys(others, self.other)

    def draw(self, rng: np.random.Generator, count: int, random: float) -> tuple[list[str], Tensor]:
        """Draw sentences and the numbers of their words [count, TOKENS].

        Args:
            random: share of sentences of random words, which come first; the rest are captions with a view's words.
        """
        every, sentences = list(self.number), []
        for k in range(count):
            if k < random * count:
                numbers = rng.integers(0, len(every), rng.integers(1, models.TOKENS - 2))
                sentences.append([every[n] for n in numbers])
            else:
                caption = world.caption(world.sample_spec(rng)) + SUFFIXES[int(rng.integers(len(SUFFIXES)))]
                caption += ", clay render" if rng.random() < 0.2 else ""
                sentences.append(caption.replace(",", " ,").split())
        truth = torch.full((count, models.TOKENS), self.other)
        for k, sentence in enumerate(sentences):
            truth[k, 1 : len(sentence) + 1] = torch.tensor([self.number[word] for word in sentence])
        return [" ".join(sentence) for sentence in sentences], truth


def fit_reader(layout: Layout, encode: Callable[[list[str]], Tensor], seed: int, steps: int = 1500) -> float:
    """Train a layout's reader to classify each token's word; returns its accuracy on words that belong to a class."""
    rng, sentences = np.random.default_rng([seed, 8]), Sentences(layout.config["words"])
    optimiser = torch.optim.AdamW(layout.reader.parameters(), lr=3e-3)
    right = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        texts, truth = sentences.draw(rng, 48, 0.25)
        logits = layout.word_logits(encode(texts))
        truth = truth.to(logits.device)
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), truth.flatten()).backward()
        optimiser.step()
        in_class = truth < sentences.other
        right = 0.98 * right + 0.02 * float((logits.argmax(-1) == truth)[in_class].float().mean())
    return right


def train_text(args: argparse.Namespace) -> None:
    """Train the text encoder, from nothing or from --start; then its hidden states stay near to what they were."""
    from transformers import AutoTokenizer, CLIPTextModel

    torch.manual_seed(args.seed)
    if args.start is None:
        tokenizer = models.make_tokenizer()
        encoder, before = models.make_text_encoder(len(tokenizer)).train(), None
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.start / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(args.start / "text_encoder").float().train()
        before = copy.deepcopy(encoder).eval().requires_grad_(False)
    device = device_of(args)
    layout, encoder = models.make_layout(fine=False).to(device), encoder.to(device)
    before = None if before is None else before.to(device)
    rng, sentences = np.random.default_rng([args.seed, 7]), Sentences(layout.config["words"])
    rates = [(encoder, 1e-3), (layout.reader, 3e-3)]
    groups = [{"params": module.parameters(), "lr": rate, "peak": rate} for module, rate in rates]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    right, change = 0.0, torch.zeros(())
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + np.cos(np.pi * step / args.steps))
        texts, truth = sentences.draw(rng, 64, 0.5)
        ids, truth = token_ids(tokenizer, texts).to(device), truth.to(device)
        hidden = encoder(ids).last_hidden_state
        if before is not None:
            with torch.no_grad():
                hidden_before = before(ids).last_hidden_state
            change = (hidden - hidden_before)[32:].square().mean() / hidden_before.square().mean()
        logits = layout.word_logits(hidden)
        optimiser.zero_grad()
        (F.cross_entropy(logits.flatten(0, 1), truth.flatten()) + STAY * change).backward()
        optimiser.step()
        in_class = truth < sentences.other
        right = 0.98 * right + 0.02 * float((logits.argmax(-1) == truth)[in_class].float().mean())
        if step % 250 == 249:
            print(
                {"step": step + 1, "words read right": round(right, 4), "change": round(float(change), 4)}, flush=True
            )
    folder: Path = args.work / "text" / "model"
    encoder.eval().save_pretrained(folder)
