"""Words for a picture that comes without any: the caption of the pocket world that the pocket CLIP finds nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.paths import from_home


def picture_options(image: str | Path | None, prompt: str | None) -> tuple[dict[str, Any], str]:
    """Return the settings of a run that is given a picture, and a line for the user, empty where nothing is to say.

    Args:
        image: the picture, or None.
        prompt: the words, or None: the picture's nearest caption.
    """
    if image is None:
        return {}, ""
    options: dict[str, Any] = {"image": {"file": str(image)}}
    if prompt is not None:
        return options, ""
    words, line = words_of(image)
    return options | {"prompt": words}, line


def words_of(image: str | Path) -> tuple[str, str]:
    """Return a caption for a picture, and a line that tells the user.

    Raises: UserError where the file is no picture, or its object cannot be told from what is behind it.
    """
    from pipeline.priors.clips import POCKET_CLIP
    from stages.guidance.clip import ClipScorer
    from stages.picture import PictureSettings, nearest_caption, read_picture
    from stages.pocket.world import all_specs, caption

    picture = read_picture(PictureSettings(), from_home(image))
    captions = list(dict.fromkeys(caption(spec) for spec in all_specs() if spec.other is None))
    text, cosine = nearest_caption(picture, ClipScorer(POCKET_CLIP), captions)
    return text, f'no --prompt: taken as "{text}", the nearest caption by the pocket CLIP (cosine {cosine:.2f})'
