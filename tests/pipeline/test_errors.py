"""What the boundary makes of exceptions, and what the user reads."""

import errno

import pytest

import pipeline.cli as cli
from pipeline.errors import Interrupted, explain, show
from stages.errors import UserError


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.glb"), "gone.glb"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), "runs"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), "/mnt/x"),
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
    ],
)
def test_failures_of_files_and_memory_become_user_errors(error, part):
    explained = explain(error)
    assert part in f"{explained.what} {explained.why}" and explained.fix


def test_safetensors_that_cannot_be_read_become_user_errors(tmp_path):
    from safetensors import SafetensorError, safe_open

    (tmp_path / "weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(SafetensorError) as error:
        safe_open(tmp_path / "weights.safetensors", framework="pt")
    assert "damaged" in explain(error.value).fix


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), OSError(5, "socket"), RuntimeError("shape mismatch")]
)
def test_bugs_keep_their_traceback(error):
    assert explain(error) is None


def test_user_error_is_shown_as_three_lines(capsys):
    show(UserError("w", "because\nof this", "f"))
    assert capsys.readouterr().err == "what: w\nwhy:  because\n      of this\nfix:  f\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("w", "y", "f"), 2, "what: w\nwhy:  y\nfix:  f\n"),
        (Interrupted("stopped at step 3", 130), 130, "stopped at step 3"),
        (Interrupted("stopped at step 3", 143), 143, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_code_and_text_of_each_ending(monkeypatch, capsys, error, code, text):
    import pipeline.runs.run

    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline.runs.run, "resume_run", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["resume", "anywhere"])
    assert stopped.value.code == code and text in capsys.readouterr().err


def test_bug_in_a_command_raises_through_main(monkeypatch):
    import pipeline.runs.run

    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline.runs.run, "resume_run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["resume", "anywhere"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["rn"], "No such command 'rn'"),
        (["run", "--stags", "coarse"], "No such option: --stags"),
        (["run", "--seed", "x"], "Invalid value for '--seed'"),
        (["resume"], "Missing argument 'RUN'"),
        (["export", "x", "--format"], "--format"),
    ],
)
def test_mistyped_command_lines_are_three_lines(capsys, words, why):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("what: cannot read the command line\nwhy:  ") and why in err and "--help`" in err


def test_version_is_the_packages(capsys):
    from pipeline import __version__

    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert not stopped.value.code and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", [[], ["models"]])
def test_a_command_alone_shows_its_help_and_is_no_mistake(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    out, err = capsys.readouterr()
    assert stopped.value.code == 0 and "Usage" in out and not err
