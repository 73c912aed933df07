"""Standard streams that take no more: the printing ends, the run does not."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.runs.progress import Progress
from pipeline.streams import Output, print_error


class Closed:
    """A stream that nobody reads any more."""

    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return False

    def fileno(self):
        raise OSError("no descriptor")


@pytest.mark.parametrize("stream", [Closed(), None])
def test_progress_goes_on_without_a_reader(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress()
    progress.note("a line")
    with progress.stage("coarse", 2, 0) as stage_progress:
        stage_progress.update(1, "size 1")
        stage_progress.update(2, "size 1")


@pytest.mark.parametrize("stream", [Closed(), None])
def test_an_error_without_a_reader_is_no_error(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    print_error("what: a")


def test_letters_that_the_encoding_lacks_are_written_as_their_numbers(monkeypatch):
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output = Output()
    output.write("caf\udce9 \N{SNOWMAN}")
    output.flush()
    assert raw.getvalue() == rb"caf\udce9 \u2603"


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full")
@pytest.mark.parametrize(("target", "code"), [("| head -1", 0), ("> /dev/full", 2), (">&-", 0)])
def test_what_becomes_of_a_command_whose_output_cannot_be_written(target, code, tmp_path):
    command = f"{sys.executable} -m pipeline recipes {target}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def _environment() -> dict[str, str]:
    from tests.fork_server import ROOT

    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_hangup_that_is_ignored_stays_ignored():
    from pipeline.runs.interrupt import StopRequest

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_two_hangups_ask_for_one_stop():
    from pipeline.runs.interrupt import StopRequest

    with StopRequest(lambda text: None) as stop:
        stop.gentle = True
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested and stop.exit_code == 128 + signal.SIGHUP
