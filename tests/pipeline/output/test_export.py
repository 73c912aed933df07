"""Exports of finished runs with settings of their own and levels of detail; toy stages, real meshes."""

import os
import shutil

import numpy as np
import pytest

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.output import asset
from pipeline.output.asset import finished_mesh  # before the toys take its place
from pipeline.runs.export import ExportRequest, export_run
from stages.errors import UserError
from stages.mesh.files.read import read_mesh
from tests.toy_runs import contents


def test_export_takes_settings_of_its_own_and_levels_of_detail(
    in_process, uninterrupted, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(asset, "finished_mesh", finished_mesh)
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    before = contents(folder)
    request = ExportRequest(
        "glb,stl", ["faces=6", "export.texture_size=32", "unwrap=boxes", "size_mm=120", "roughness=0.4"], 2
    )
    paths = export_run(folder, request, tmp_path / "out")
    assert [path.name for path in paths] == ["mesh.glb", "mesh.stl", "mesh_lod1.glb", "mesh_lod1.stl"]
    full, coarse = (read_mesh(tmp_path / "out" / name) for name in ("mesh.glb", "mesh_lod1.glb"))
    assert len(full.faces) == 6 and len(coarse.faces) == 4
    assert full.texture.shape == (32, 32, 3) and full.roughness == pytest.approx(0.4)
    assert np.ptp(read_mesh(tmp_path / "out" / "mesh.stl").vertices, axis=0).max() == pytest.approx(120, rel=1e-5)
    assert "120 mm" in capsys.readouterr().out
    assert contents(folder) == before  # the run's settings and record are its own


@pytest.mark.parametrize(
    ("request_", "what", "why"),
    [
        (ExportRequest("glb", ["faces=6"]), "already holds mesh.glb", "other settings"),
        (ExportRequest("glb", ["coarse.steps=6"]), "coarse.steps has no use here", "not the object"),
        (ExportRequest("glb", ["face=6"]), "export.face", ""),
        (ExportRequest("glb", ["faces=2"]), "export.faces = 2", ""),
        (ExportRequest("glb", [], 9), "--lods 9", "1 to 8"),
    ],
)
def test_exports_that_cannot_be_are_refused_before_any_work(in_process, uninterrupted, tmp_path, request_, what, why):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    before = contents(folder)
    with pytest.raises(UserError) as error:
        export_run(folder, request_)
    assert what in error.value.what and why in error.value.why
    assert contents(folder) == before
