"""Words that a model was never trained on: found before any work, and answered with the words it knows."""

from __future__ import annotations

import difflib
import re
import textwrap
import unicodedata

from stages.errors import UserError


def unknown_words(prompt: str, known: list[str]) -> list[str]:
    """Return the words of the prompt outside `known`, in order, each once.

    Emoji and other signs beyond ASCII are words, too; punctuation is none.
    """
    words = re.findall(r"\w+|[^\w\s\x00-\x7f]+", unicodedata.normalize("NFC", prompt.lower()))
    words = [word for word in words if not all(unicodedata.category(letter)[0] in "PZ" for letter in word)]
    return list(dict.fromkeys(word for word in words if word not in known))


def check_words(prompt: str, known: list[str], reader: str, another: str) -> None:
    """Raise UserError for words that a model has never seen, with the known ones and the way out.

    Args:
        prompt: what the model is asked for.
        known: all words that it was trained on.
        reader: the model, as the message calls it.
        another: what to use in place of its words, to end the advice with.
    """
    unknown = unknown_words(prompt, known)
    if not unknown:
        return
    near = {word: difflib.get_close_matches(word, known, 1, 0.66) for word in unknown}
    meant = ", ".join(f"{word} -> {match[0]}" for word, match in near.items() if match)
    raise UserError(
        f'{reader} cannot read "{prompt}"',
        f"it does not know {', '.join(map(repr, unknown))}; its {len(known)} words are:\n"
        + textwrap.fill(" ".join(sorted(known)), 100),
        (f"did you mean {meant}? " if meant else "") + f"use its words, or {another}",
    )
