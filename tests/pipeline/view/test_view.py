"""The page's way to a run: what it reads and serves, who may come in, and what it may ask of a running one."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import webbrowser

import pytest

from pipeline.cli import main
from pipeline.view.follow import Followed, downloads_of, facts_of, previews_of, runs_in
from pipeline.view.gallery import cards_of
from pipeline.view.gate import MARK, Gate, behind_gate
from pipeline.view.view import check_port
from pipeline.watch.mailbox import write_wish
from stages.errors import UserError
from tests.toy_runs import SMALL, lines


def line(stage: str, step: int, **values) -> str:
    return json.dumps({"stage": stage, "step": step, "seconds": 0.5} | values) + "\n"


def test_metrics_are_read_on_from_where_they_were_read_to(tmp_path):
    file, followed = tmp_path / "metrics.jsonl", Followed(tmp_path)
    assert not followed.read_on()
    file.write_text(line("coarse", 1, size=2.0) + line("coarse", 2, size=3.0)[:-9])
    assert followed.read_on() and followed.last == ("coarse", 1)
    file.write_text(line("coarse", 1, size=2.0) + line("coarse", 2, size=3.0) + "[1]\n{\n" + line("fine", 1, loss=1))
    assert followed.read_on() and not followed.read_on()
    assert followed.values["coarse"]["size"] == [2.0, 3.0] and followed.last == ("fine", 1)
    file.write_text(line("coarse", 1, size=4.0))  # resumed
    assert followed.read_on() and followed.values == {"coarse": {"seconds": [0.5], "size": [4.0]}}
    with file.open("a") as more:
        more.write(line("coarse", 2, size=5.0, late=1.0) + line("coarse", 1, size=6.0))  # a step taken again
    assert followed.read_on() and followed.values["coarse"]["size"] == [6.0]
    assert len(followed.values["coarse"]["late"]) == 1


def test_a_finished_run_is_told_with_its_files_and_none_from_elsewhere(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    followed = Followed(run)
    followed.read_on()
    facts = facts_of(followed)
    assert (facts.status, facts.stage, facts.step, facts.steps, facts.seed) == ("finished", "fine", 9, 9, 3)
    (run / "config.yaml").write_text("of: another version\n")
    assert facts_of(followed).steps == 9
    names = [path.name for path in downloads_of(run)]
    assert {"mesh.glb", "config.yaml", "metrics.jsonl"} <= set(names)
    pictures = previews_of(run)
    assert pictures and all(path.suffix == ".png" for path in pictures)
    secret = tmp_path / "secret.png"
    secret.write_bytes(pictures[0].read_bytes())
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(secret)
    assert not Followed(run).read_on()
    pictures[0].unlink()
    pictures[0].symlink_to(secret)
    record = json.loads((run / "run.json").read_text())
    record["outputs"] += ["../secret.png", str(secret)]
    (run / "run.json").write_text(json.dumps(record))
    assert not {"metrics.jsonl", "secret.png"} & {path.name for path in downloads_of(run)}
    assert pictures[0] not in previews_of(run)


def test_a_folder_of_runs_is_a_gallery_and_one_without_is_refused(uninterrupted, tmp_path):
    for name in ("b", "a"):
        shutil.copytree(uninterrupted, tmp_path / "runs" / name)
    (tmp_path / "runs" / "none").mkdir()
    assert [run.name for run in runs_in(tmp_path / "runs")] == ["a", "b"]
    assert runs_in(uninterrupted) == [uninterrupted]
    cards = cards_of(tmp_path / "runs")
    assert [(card.run.name, card.state, card.seed) for card in cards] == [("a", "done", 3), ("b", "done", 3)]
    assert cards[0].picture().ndim == 3 and cards == cards_of(tmp_path / "runs")
    for folder in (tmp_path / "runs" / "none", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no run"):
            runs_in(folder)


def no_browser():
    raise webbrowser.Error("could not locate runnable browser")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["view", "nowhere"], "holds no run"),
        (["run", "--port", "9"], "has no use here"),
        (["view", "RUN", "--port", "TAKEN"], "cannot listen at 127.0.0.1:"),
        (["view", "RUN", "--host", "not a host", "--port", "0"], "cannot listen at not a host"),
        (["run", "--view", "--port", "TAKEN", "--out", "new"], "cannot listen at 127.0.0.1:"),
        (["view", "RUN", "--port", "0", "--open"], "no browser to open the page in"),
    ],
)
def test_mistakes_are_told_in_three_lines(words, what, uninterrupted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("viser", reason="extra viewer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "get", no_browser)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        replaced = {"RUN": str(uninterrupted), "TAKEN": str(taken.getsockname()[1])}
        with pytest.raises(SystemExit) as stop:
            main([replaced.get(word, word) for word in words])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and what in told and len(told.strip().splitlines()) == 3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [["view", "RUN"], ["run", "--view", "--out", "new"]])
def test_a_page_without_viser_is_told_in_three_lines(words, uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "viser", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(uninterrupted) if word == "RUN" else word for word in words])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "[viewer]" in told and len(told.strip().splitlines()) == 3
    assert not (tmp_path / "new").exists()


@pytest.fixture
def inner():
    """The port of a server that answers every request with its path."""

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.path.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def ask(port: int, path: str = "/page", **headers: str) -> tuple[int, str, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_on_loopback_other_names_and_other_sites_are_turned_away(inner):
    gate = Gate("127.0.0.1", 0, inner, "secret")
    assert gate.token is None and ask(gate.port)[:2] == (200, "/page")
    here = f"127.0.0.1:{gate.port}"
    assert ask(gate.port, Origin=f"http://{here}")[0] == 200
    assert ask(gate.port, Host="localhost:1")[0] == 200
    for origin in ("http://evil.example", "null", "file://", ""):  # another page in the same browser, a frame in one
        assert ask(gate.port, Origin=origin)[0] == 403
    assert ask(gate.port, Host="evil.example", Origin="http://evil.example")[0] == 403  # a name that points here
    gate.close()


def test_others_need_the_token_once(inner):
    gate = Gate("0.0.0.0", 0, inner, "secret")
    assert len(gate.token) > 20
    assert ask(gate.port)[0] == 403 and ask(gate.port, "/?token=")[0] == 403
    assert ask(gate.port, f"/?token={gate.token}x")[0] == 403 and ask(gate.port, Cookie=f"{gate.cookie}=é")[0] == 403
    status, _, headers = ask(gate.port, f"/?token={gate.token}")
    assert status == 303 and "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].split(";")[0]
    assert ask(gate.port, Cookie=cookie)[:2] == (200, "/page")
    assert ask(gate.port, Cookie=cookie, Origin="http://evil.example")[0] == 403
    gate.close()


@pytest.mark.parametrize("text", [b"\0" * 100_000, b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b""])
def test_nonsense_breaks_no_gate(text, inner):
    gate = Gate("127.0.0.1", 0, inner, "secret")
    with socket.create_connection(("127.0.0.1", gate.port)) as one:
        one.sendall(text)
    assert ask(gate.port)[0] == 200
    gate.close()


@pytest.fixture
def server():
    """A viser server that answers to what brings the secret alone."""
    viser = pytest.importorskip("viser", reason="extra viewer")
    with behind_gate("secret"):
        made = viser.ViserServer("127.0.0.1", check_port(0, "127.0.0.1"), verbose=False)
    yield made
    made.stop()


def test_the_server_behind_the_gate_answers_to_the_gate_alone(server):
    port = server.get_port()
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
    upgrade |= {"Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    assert ask(port, "/")[0] == ask(port, "/", **upgrade)[0] == ask(port, "/", **{MARK: "guess"})[0] == 403
    gate = Gate("127.0.0.1", 0, port, "secret")
    assert ask(gate.port, "/")[0] == 200 and ask(gate.port, "/", **upgrade)[0] == 101
    gate.close()


@pytest.mark.parametrize("path", ["/../config.yaml", "/config.yaml", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"])
def test_the_server_behind_the_page_serves_no_file_of_ours(path, server):
    assert ask(server.get_port(), path, **{MARK: "secret"})[0] == 404


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_pause_go_on_and_stop_as_the_page_asks_and_the_run_resumes_to_the_same_bytes(toy, uninterrupted, tmp_path):
    run = tmp_path / "run"
    words = ["run", "--out", "run", "--seed", 3, *SMALL]
    began = time.monotonic()
    process = toy(*words, cwd=tmp_path, TOY_STEP_S="0.2")
    process.wait_until(lambda: lines(run))

    stop = threading.Event()
    asked = ["pause"]

    def page():
        while not stop.wait(0.1):
            write_wish(run, asked[0], None)

    thread = threading.Thread(target=page)
    thread.start()
    try:
        process.wait_until(lambda: "paused by the page" in (tmp_path / "out.txt").read_text())
        at = len(lines(run))
        assert not stop.wait(1.5) and len(lines(run)) <= at + 6  # what was in the buffer; no step of 0.2 s is taken
        at = len(lines(run))
        assert not stop.wait(1.0) and len(lines(run)) == at
        asked[0] = "run"
        process.wait_until(lambda: len(lines(run)) > at)
        asked[0] = "stop"
        code, out, err = process.finish()
        ended = time.monotonic()
    finally:
        stop.set()
        thread.join()
    assert code == 128 + signal.SIGINT and "the page asks to stop" in out and "pipeline resume run" in err
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    facts = record["stages"]["coarse"]
    assert facts["seconds"] < ended - began - 2.5, "a pause is not the stage's time"
    code, _, err = toy("resume", "run", cwd=tmp_path).finish()  # the stop was for the other session
    assert code == 0, err
    for name in ("mesh.glb", "mesh.obj"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()
