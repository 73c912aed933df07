"""Files that are not what their names say, and formats that are not read: told in words."""

import pytest

from pipeline.output.glb import glb_bytes
from pipeline.output.ply import ply_bytes
from stages.errors import UserError
from stages.mesh.files.kinds import READ, format_of
from tests.mesh.mesh_shapes import box

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.mark.parametrize(
    ("name", "content", "words", "fix"),
    [
        ("a.glb", b"\n<!DOCTYPE HTML>\n<p>Not found", "web page", "download"),
        ("a.stl", b"<html><body>403", "web page", "download"),
        ("a.obj", LFS, "Git LFS pointer to the file of 4567 bytes", "git lfs pull"),
        ("a.glb", b"", "it is empty", "whole file"),
        ("a.glb", b"no mesh", "it is not GLB at all", "GLB"),
        ("a.ply", b"no mesh", "it is not PLY at all", "GLB"),
        ("a.gltf", b"no mesh", "it is not glTF at all", "GLB"),
        ("a.glb", b"PK\x03\x04", "ZIP archive", "GLB"),
        ("a.obj", b"\x1f\x8b", "gzip", "unpack"),
        ("a.obj", b'{"asset": {}}', "JSON", "rename it to a.gltf"),
        ("a.stl", ply_bytes(box()), "its content is a PLY", "rename it to a.ply"),
        (
            "a.dae",
            b"<?xml version='1.0'?>",
            f"DAE is not supported; its content is XML, as COLLADA is; read are {READ}",
            "GLB",
        ),
        ("a.3mf", b"PK\x03\x04", "3MF is not supported", "save it as GLB"),
        ("a.usdz", b"PK\x03\x04", "USDZ is not supported", "save it as GLB"),
        ("a.fbx", b"Kaydara FBX Binary", "FBX is not supported", "save it as GLB"),
        ("a.off", b"OFF\n3 1 0", "OFF is not supported", "save it as GLB"),
        ("a", glb_bytes(box()), "no ending that tells its format; its content is a GLB", "rename it to a.glb"),
    ],
)
def test_what_a_file_is_instead_is_told(tmp_path, name, content, words, fix):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        format_of(tmp_path / name)
    assert words in error.value.why and fix in error.value.fix and "pip" not in error.value.fix


def test_the_formats_that_are_read_are_known_by_their_names_in_any_case(tmp_path):
    for name, content in (("A.GLB", glb_bytes(box())), ("b.Ply", ply_bytes(box())), ("c.OBJ", b"v 0 0 0")):
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) == name[1:].lower()
