"""One full run, coarse and fine, on a random folder of every prior family: prompt to mesh through the command."""

import json

import pytest

from pipeline.cli import main
from tests import tiny_families, tiny_folders

TINY = [
    *("coarse.steps=2", "coarse.resolution=16", "coarse.views_per_step=1", "coarse.samples=16"),
    *("coarse.field.levels=2", "coarse.field.log2_table=10"),
    *("fine.steps=2", "fine.resolution=32", "fine.tets=12"),
    *("export.turntable_frames=0", "export.texture_size=64", "export.unwrap=boxes", "export.faces=500"),
]
FAMILIES = {
    "stable_diffusion": (tiny_folders.stable_diffusion, []),
    "deepfloyd": (tiny_folders.deepfloyd, []),
    "sdxl": (tiny_families.sdxl, ["prior.diffusion.vae_slicing=true"]),
    "sd3": (tiny_families.sd3, ["prior.diffusion.offload=blocks"]),
    "flux": (
        tiny_families.flux,
        ["prior.diffusion.resolution=64", "guidance.coarse.rule=csd", "guidance.coarse.rescale=0"],
    ),
}


def run(*words):
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_of_every_family_end_in_a_mesh(name, tmp_path, monkeypatch, capsys):
    build, settings = FAMILIES[name]
    folder = build(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = ["--config", "stable-diffusion", "--out", "out", "--prompt", "a red mug"]
    words += [f"prior.coarse={folder}", f"prior.fine={folder}"]
    assert run("run", *words, *TINY, *settings) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert (out / "mesh.glb").stat().st_size > 1000
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in steps] == [("coarse", 1), ("coarse", 2), ("fine", 1), ("fine", 2)]
    assert all(line["grad_rms"] > 0 and line["nonfinite"] == 0 for line in steps)
