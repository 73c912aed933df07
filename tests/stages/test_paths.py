"""Paths with a leading ~, wherever one can be given."""

from pathlib import Path

import pytest

from stages.errors import UserError
from stages.paths import from_home


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_leading_tilde_is_the_home_folder(home):
    assert from_home("~/mug") == home / "mug"
    assert from_home(Path("~")) == home
    assert from_home("a/~/b") == Path("a/~/b")


def test_a_user_that_is_not_there_is_refused_unless_a_file_has_that_name(home):
    with pytest.raises(UserError, match="~nobody-of-this-name"):
        from_home("~nobody-of-this-name/mug")
    Path("~nobody-of-this-name").write_text("")
    assert from_home("~nobody-of-this-name") == Path("~nobody-of-this-name")


def test_every_path_that_a_setting_names_is_expanded(home):
    from pipeline import load_config

    settings = {"reference.mesh": "~/a.glb", "prior.lora": "~/b.safetensors", "prior.coarse": "clip:~/c"}
    config = load_config(None, settings, {"init_mesh": "~/d.glb", "stages": "fine"})
    assert config.reference.mesh == str(home / "a.glb") and config.prior.lora == str(home / "b.safetensors")
    assert config.prior.coarse == f"clip:{home / 'c'}" and config.init_mesh == str(home / "d.glb")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["resume", "~/gone"], "gone/config.yaml:1"),
        (["export", "~/gone"], "gone/config.yaml:1"),
        (["run", "--from=~/gone", "--stages", "fine"], "gone/config.yaml:1"),
        (["run", "--config=~/gone"], "gone/config.yaml:1"),
        (["models", "check", "~/gone"], "gone/model_index.json is missing"),
        (["run", "prior.coarse=~/gone", "--stages", "coarse"], "gone/model_index.json is missing"),
        (["run", "prior.coarse=clip:~/gone", "--stages", "coarse"], "gone"),
    ],
)
def test_every_path_of_a_command_is_looked_for_at_home(home, words, part, capsys):
    """Each finds what lies at home: a configuration that cannot be used, in a folder that is no model."""
    import pipeline.cli as cli

    (home / "gone").mkdir()
    (home / "gone" / "config.yaml").write_text("seed: x\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    text = "".join(capsys.readouterr()).replace("\n", "")
    assert stopped.value.code == 2 and "Traceback" not in text
    assert f"{home}/{part}".replace(" ", "") in text.replace(" ", "")
    assert not list(Path().iterdir())
