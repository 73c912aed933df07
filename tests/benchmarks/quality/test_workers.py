"""The cells of a suite on workers: what breaks is reported, what is finished is kept."""

import argparse
import json

from benchmarks.quality import workers
from benchmarks.quality.cells import Cell


def test_a_cell_that_breaks_ends_no_other_and_finished_cells_are_kept(tmp_path, monkeypatch):
    made = []

    class InPlace:
        def run(self, call, tasks):
            for task in tasks:
                yield task, call(task)

    def make(cell, out, clips, words, threads, take_over):
        made.append((cell.system, words))
        if cell.prompt == "a cat":
            raise ValueError("broken")
        cell.folder(out).mkdir(parents=True)
        (cell.folder(out) / "result.json").write_text(json.dumps({"cost": {}, "mesh": {"faces": 8}}))

    asked = []
    monkeypatch.setattr(workers, "make_engine", lambda *words: asked.append(words) or InPlace())
    monkeypatch.setattr(workers, "make_cell", make)
    cells = [Cell(system, prompt, 0) for prompt in ("a cat", "a mug") for system in ("coarse", "magic3d")]
    words = {"coarse": ("a=1",), "magic3d": ("b=2",)}
    args = argparse.Namespace(
        out=tmp_path, clip=[], words=words, threads=1, take_over=True, workers=8, engine="ray", address="here:1"
    )
    broken = workers.run_cells(cells, args)
    assert [cell.prompt for cell in broken] == ["a cat", "a cat"]
    assert "ValueError: broken" in (broken[0].folder(tmp_path) / "error.txt").read_text()
    assert made == [("coarse", ("a=1",)), ("magic3d", ("b=2",))] * 2, "a system before those that take over its stage"
    assert asked == [("ray", 2, 1, tmp_path, "here:1")], "one worker for each prompt and seed at most"
    assert workers.run_cells(cells, args) == broken and len(made) == 6, "finished cells are kept"
