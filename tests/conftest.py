"""Fixtures of the whole suite."""

import gc
import json
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch loads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` skip where torch finds no device."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def same_threads():
    """Commands called in place set their own numbers of threads: the next test gets back what there was before.

    One that left torch at 4,096 made the suite after it ten times slower.
    """
    import sys

    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


_SD = {"unet": "UNet2DConditionModel", "scheduler": "DDPMScheduler", "vae": "AutoencoderKL"}
_SD |= {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_SECOND = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
_INDICES = {  # class by part, by a part of the hub id; the last is any other's
    "IF-I": {k: v for k, v in _SD.items() if k != "vae"} | {"text_encoder": "T5EncoderModel"},
    "-xl-": _SD | _SECOND,
    "diffusion-3": {k: v for k, v in (_SD | _SECOND).items() if k != "unet"}
    | {"transformer": "SD3Transformer2DModel", "text_encoder": "CLIPTextModelWithProjection"},
    "": _SD,
}


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path_factory):
    """Tests never ask the hub. Every id is there, and its index, as those of its name have one, comes at once.

    Returns: what does ask it, for a test that puts its own answers behind it.
    """
    from stages.guidance.diffusion import folder as module

    asks = module.fetch_index

    def answer(model_id, revision, what):
        folder = tmp_path_factory.mktemp("hub")
        index = next(index for part, index in _INDICES.items() if part in model_id)
        (folder / "model_index.json").write_text(json.dumps({part: ["", name] for part, name in index.items()}))
        return folder

    monkeypatch.setattr(module, "fetch_index", answer)
    return asks


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Take what is alive between modules out of the garbage collector's rounds.

    Runs collect between their stages; in a process with torch's compiler and every family of diffusers loaded each
    round takes half a second, and the suite asks for hundreds.
    """
    yield
    gc.collect()
    gc.freeze()
