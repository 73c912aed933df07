"""Fixtures of the whole suite."""

import atexit
import functools
import gc
import json
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch loads
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores, and the cache of the first
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:
    os.environ["PIPELINE_CACHE"] = tempfile.mkdtemp(prefix="pipeline-cache-")  # no test reads what another run kept
    atexit.register(shutil.rmtree, os.environ["PIPELINE_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a module in one process under `pytest -n`, for they share fixtures; modules in their order."""
    if config.option.dist != "load":  # which is what -n alone says
        return None
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by the number of their tests, the longest modules would come last
    return LoadScopeScheduling(config, log)


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


@pytest.fixture(scope="session")
def hub_texts(tmp_path_factory):
    """What the hub has of an id beside its weights: that of a tiny model whose index is the one of its name."""
    folders = {}

    def make(model_id):
        from tests import tiny_families, tiny_folders

        builders = {"IF-I": lambda folder: tiny_folders.deepfloyd(folder, 77), "-xl-": tiny_families.sdxl}
        builders |= {"diffusion-3": tiny_families.sd3, "": tiny_folders.stable_diffusion}
        part = next(part for part in builders if part in model_id)
        if part not in folders:
            folders[part] = folder = builders[part](tmp_path_factory.mktemp("texts") / "model")
            for weights in folder.rglob("*.safetensors"):
                weights.unlink()
            config = folder / "transformer" / "config.json"
            if config.is_file():  # as large as the real one, for pictures of any size
                config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_max_size": 192}))
        return folders[part]

    return make


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path_factory, hub_texts):
    """Tests never ask the hub. Every id is there; its index, as those of its name have one, comes at once, and so does
    what it has beside weights.

    Returns: what does ask it, for a test that puts its own answers behind it.
    """
    from stages.guidance.diffusion import hub as module

    asks = module.fetch_index

    def answer(model_id, revision, what):
        folder = tmp_path_factory.mktemp("hub")
        index = next(index for part, index in _INDICES.items() if part in model_id)
        (folder / "model_index.json").write_text(json.dumps({part: ["", name] for part, name in index.items()}))
        return folder

    monkeypatch.setattr(module, "fetch_index", answer)
    monkeypatch.setattr(module, "fetch_texts", lambda model_id, revision, what: hub_texts(model_id))
    return asks


@pytest.fixture(scope="session")
def pipeline():
    """pipeline(*arguments, cwd=..., **environment) starts a `pipeline` process."""
    from tests.fork_server import forking

    with forking() as start:
        yield start


@pytest.fixture(scope="session")
def toy(pipeline):
    """As `pipeline`, with toy stages."""
    return functools.partial(pipeline, toy=True)


@pytest.fixture(scope="session")
def uninterrupted(toy, tmp_path_factory):
    """The folder of a finished toy run."""
    from tests.toy_runs import SMALL

    folder = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = toy("run", "--out", "run", "--seed", 3, *SMALL, cwd=folder).finish()
    assert code == 0, err
    assert "done: run/mesh.glb" in out
    return folder / "run"


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """pipeline.runs.run with the toys installed, in this process, standing in tmp_path."""
    import pipeline.runs.loop
    import pipeline.runs.run
    from tests import toy_pipeline

    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return pipeline.runs.run


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory):
    """Tiny models of SDXL, Stable Diffusion 3 and Flux by their short names."""
    from tests import tiny_families

    root = tmp_path_factory.mktemp("families")
    return {name: getattr(tiny_families, name)(root / name) for name in ("sdxl", "sd3", "flux")}


@pytest.fixture(scope="session")
def family_priors(family_folders):
    """The priors of those models, loaded."""
    from stages.guidance.diffusion.prior import load_prior
    from stages.guidance.diffusion.settings import DiffusionSettings

    settings = {"flux": DiffusionSettings(resolution=64)}
    return {name: load_prior(folder, "cpu", settings=settings.get(name)) for name, folder in family_folders.items()}


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Take what is alive between modules out of the garbage collector's rounds.

    Runs collect between their stages; in a process with torch's compiler and every family of diffusers loaded each
    round takes half a second, and the suite asks for hundreds.
    """
    yield
    gc.collect()
    gc.freeze()
