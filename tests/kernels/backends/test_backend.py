"""Which backend computes: the rules, what is refused and how, what a user is told, what a run notes of itself."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import pipeline.doctor as doctor
from pipeline.config.model import load_config
from pipeline.runs.progress import Progress
from stages.errors import UserError
from stages.kernels import backend as kernels
from stages.kernels.backend import KernelSettings, Probe, Selection, choose_backend, resolve, selected
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode
from stages.kernels.raster import edge_topology
from tests import toy_pipeline

PACKAGES = ("warp", "tinycudann", "nvdiffrast", "kaolin")


def tensor(device="cpu", dtype=torch.float32):
    """What choose_backend looks at, on a device that this machine need not have."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def installed(monkeypatch, *names, cuda_warp=True):
    """Pretend that exactly these packages import."""
    absent = Probe("missing", "not installed")
    monkeypatch.setattr(kernels, "probe", lambda name: Probe("ok", "1.0") if name in names else absent)
    usable = None if "warp" in names and cuda_warp else "warp does not import: not installed"
    monkeypatch.setattr(kernels, "warp_off_cuda", lambda: usable)


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_auto_is_numba_on_the_cpu_warp_on_cuda_and_torch_for_what_they_do_not_compute(family, monkeypatch):
    installed(monkeypatch, "warp")
    assert choose_backend("auto", tensor(), tensor(), family=family) == "numba"
    assert choose_backend("auto", tensor("cuda"), family=family) == "warp"
    twins = (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float16), ("mps", torch.float32))
    for odd in (tensor(*of) for of in twins):
        assert choose_backend("auto", odd, family=family) == "torch"
    assert choose_backend("auto", tensor(), tensor("cuda"), family=family) == "torch"  # the op says what is wrong
    installed(monkeypatch)
    assert choose_backend("auto", tensor("cuda"), family=family) == "torch"
    assert choose_backend("auto", tensor(), family=family) == "numba"


def test_a_name_in_a_call_wins_over_the_selection_and_the_selection_over_the_device():
    with selected(Selection("cpu", {"hash": "torch"})):
        assert choose_backend("auto", tensor(), family="hash") == "torch"
        assert choose_backend("numba", tensor(), family="hash") == "numba"
        assert choose_backend("auto", tensor(), family="mlp") == "numba"


def test_a_selection_holds_for_float32_on_its_device_only_but_torch_for_all():
    with selected(Selection("cuda", {"hash": "tinycudann", "raster": "torch"})):
        assert choose_backend("auto", tensor("cuda"), family="hash", adaptor=True) == "tinycudann"
        assert choose_backend("auto", tensor(), family="hash", adaptor=True) == "numba"
        assert choose_backend("auto", tensor("cuda", torch.float64), family="hash", adaptor=True) == "torch"
        assert choose_backend("auto", tensor(), family="raster", adaptor=True) == "torch"


def test_an_op_that_its_familys_package_does_not_have_goes_by_device():
    with selected(Selection("cpu", {"raster": "nvdiffrast"})):
        assert choose_backend("auto", tensor(), family="raster") == "numba"
    assert choose_backend("nvdiffrast", tensor(), family="raster") == "numba"
    triangles = torch.tensor([[0, 1, 2], [2, 1, 3]], dtype=torch.int32)
    assert torch.equal(edge_topology(triangles, 4, backend="nvdiffrast"), edge_topology(triangles, 4))


def test_the_selection_before_is_back_after_an_error_and_nests():
    with selected(Selection("cpu", {"hash": "torch"})):
        with pytest.raises(RuntimeError), selected(Selection("cpu", {})):
            assert choose_backend("auto", tensor(), family="hash") == "numba"
            raise RuntimeError
        assert choose_backend("auto", tensor(), family="hash") == "torch"
    assert choose_backend("auto", tensor(), family="hash") == "numba"


def test_an_op_computes_what_the_selection_says():
    spec = HashGridSpec(levels=3, log2_table=8, base=3, finest=40)
    g = torch.Generator().manual_seed(0)
    points, table = torch.rand(500, 3, generator=g), torch.randn(spec.rows, 2, generator=g)
    twin, fast = (hash_encode(points, table, spec, backend=name) for name in ("torch", "numba"))
    assert not torch.equal(twin, fast)  # the last bits tell them apart
    with selected(resolve(KernelSettings(hash="torch"), "cpu")):
        assert torch.equal(hash_encode(points, table, spec), twin)
    assert torch.equal(hash_encode(points, table, spec), fast)


def test_a_call_by_a_wrong_name_lists_those_of_the_family():
    with pytest.raises(ValueError, match="unknown name 'nvdiffrast', have auto, torch, numba, warp, kaolin"):
        choose_backend("nvdiffrast", tensor(), family="marching", adaptor=True)
    with pytest.raises(ValueError, match="unknown name 'kaolin', have auto, torch, numba, warp$"):
        choose_backend("kaolin", tensor(), family="volume")


@pytest.mark.parametrize(
    "name, family, where, bad",
    [
        ("numba", "hash", "the CPU", tensor("cuda")),
        ("numba", "hash", "the CPU", tensor(dtype=torch.float64)),
        ("warp", "volume", "the CPU or CUDA", tensor(dtype=torch.float16)),
        ("tinycudann", "mlp", "CUDA", tensor()),
        ("nvdiffrast", "raster", "CUDA", tensor("cuda", torch.float64)),
        ("kaolin", "marching", "the CPU or CUDA", tensor(dtype=torch.float64)),
    ],
)
def test_a_call_by_name_refuses_tensors_that_the_backend_does_not_compute(name, family, where, bad, monkeypatch):
    installed(monkeypatch, *PACKAGES)
    got = f"{str(bad.dtype).removeprefix('torch.')} on {bad.device}"
    with pytest.raises(ValueError, match=f"'{name}' takes float32 tensors on {where}, got {got}"):
        choose_backend(name, bad, family=family, adaptor=True)


def test_a_call_by_name_of_what_is_not_installed_says_why(monkeypatch):
    installed(monkeypatch)
    for name, family in (("kaolin", "marching"), ("warp", "hash")):
        with pytest.raises(UserError) as error:
            choose_backend(name, tensor(), family=family, adaptor=True)
        assert name in error.value.what and "not installed" in error.value.why and "doctor" in error.value.fix


@pytest.mark.parametrize(
    "family, name, device, why",
    [
        ("volume", "numba", "cuda", "it computes on the CPU, and this run is on cuda"),
        ("hash", "tinycudann", "cpu", "it computes on CUDA, and this run is on cpu"),
        ("raster", "nvdiffrast", "cpu", "it computes on CUDA, and this run is on cpu"),
        ("marching", "kaolin", "cpu", "kaolin does not import: not installed"),
        ("mlp", "tinycudann", "cuda", "tinycudann does not import: not installed"),
        ("hash", "warp", "cuda", "warp does not import: not installed"),
        ("hash", "warp", "cpu", "warp does not import: not installed"),
    ],
)
def test_a_setting_that_cannot_be_met_is_answered_with_what_why_and_fix(family, name, device, why, monkeypatch):
    installed(monkeypatch)
    with pytest.raises(UserError) as error:
        resolve(KernelSettings(**{family: name}), device)
    assert error.value.what == f"kernels.{family}={name} cannot be used"
    assert error.value.why == why and error.value.fix.startswith(f"kernels.{family}=auto")


def test_settings_of_another_family_are_refused_with_the_names_that_are_allowed():
    with pytest.raises(UserError) as error:
        load_config(None, ["kernels.raster=kaolin"], {})
    message = str(error.value)
    assert "kernels.raster" in message and "kaolin" in message and "nvdiffrast" in message
    with pytest.raises(UserError, match="kernels.hush"):
        load_config(None, ["kernels.hush=numba"], {})


@pytest.mark.parametrize("error", ["OSError('libcuda.so: cannot open')", "SystemError('abi')", "Exception('stub')"])
def test_a_probe_imports_once_and_keeps_the_reason_of_any_failure(error, tmp_path, monkeypatch):
    (tmp_path / "brokenkernels.py").write_text(
        f"import builtins\nbuiltins.kernel_imports = getattr(builtins, 'kernel_imports', 0) + 1\nraise {error}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(kernels.PACKAGES, "broken", kernels.Package("brokenkernels", "none", "brokenkernels"))
    monkeypatch.setattr("builtins.kernel_imports", 0, raising=False)
    try:
        actual = [kernels.probe("broken") for _ in range(3)]
    finally:
        kernels.probe.cache_clear()
    import builtins

    assert actual[0].state == "broken" and actual[0].detail.split(":")[0] == error.split("(")[0]
    assert actual[0] is actual[2] and builtins.kernel_imports == 1


def test_a_run_on_cuda_without_warp_says_so_and_one_on_the_cpu_has_nothing_to_say(monkeypatch):
    installed(monkeypatch)
    assert resolve(KernelSettings(), "cpu") == Selection("cpu", dict.fromkeys(kernels.FAMILIES, "numba"), ())
    on_cuda = resolve(KernelSettings(mlp="torch"), "cuda")
    assert set(on_cuda.backends.values()) == {"torch"}
    (notice,) = on_cuda.notices
    assert "hash, volume, raster, marching run as plain torch" in notice and "not installed" in notice
    installed(monkeypatch, "warp")
    assert resolve(KernelSettings(), "cuda") == Selection("cuda", dict.fromkeys(kernels.FAMILIES, "warp"), ())


def test_a_run_with_nvdiffrast_or_tinycudann_is_told_what_comes_with_them(monkeypatch):
    installed(monkeypatch, *PACKAGES)
    notices = "\n".join(resolve(KernelSettings(raster="nvdiffrast", mlp="tinycudann"), "cuda").notices)
    assert notices.count("non-commercial") == 1 and "half precision" in notices and "not the same bytes" in notices
    assert not resolve(KernelSettings(marching="kaolin"), "cuda").notices


def test_the_doctor_gives_state_reason_cost_and_licence_of_every_package(monkeypatch):
    monkeypatch.setattr(
        kernels,
        "probe",
        lambda name: Probe("ok", "0.4.0") if name == "nvdiffrast" else Probe("broken", "OSError: no libcuda"),
    )
    monkeypatch.setattr(doctor, "_CHECKS", [check for check in doctor._CHECKS if check[0] in (*PACKAGES, "warp-lang")])
    monkeypatch.setattr(doctor, "_prior_checks", list)
    monkeypatch.setattr(doctor, "_network_checks", list)
    actual = {finding.name: finding for finding in doctor.examine()}
    assert set(actual) == {"warp-lang", "tinycudann", "nvdiffrast", "kaolin"}
    for name, finding in actual.items():
        assert not finding.required and finding.cost and "licence: " in finding.detail
        assert finding.state == ("ok" if name == "nvdiffrast" else "broken")
        assert ("0.4.0" if name == "nvdiffrast" else "OSError: no libcuda") in finding.detail
    assert "non-commercial" in actual["nvdiffrast"].detail


def test_the_doctor_calls_warp_broken_where_it_does_not_reach_the_gpu(monkeypatch):
    installed(monkeypatch, "warp", cuda_warp=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (check,) = [check for name, _, check, _ in doctor._CHECKS if name == "warp-lang"]
    state, detail = check()
    assert state == "broken" and detail.startswith("warp does not import")


@pytest.fixture
def toy_run(monkeypatch, tmp_path):
    """pipeline.runs.run in this process with toy stages, standing in tmp_path."""
    import pipeline.runs.loop
    import pipeline.runs.run

    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return pipeline.runs.run


SMALL = ["coarse.steps=2", "fine.steps=2", "export.turntable_frames=0", "device=cpu"]


def test_a_run_takes_its_settings_notes_what_they_came_to_and_puts_things_back(toy_run, tmp_path, monkeypatch):
    backends_used = set()
    step = toy_pipeline.ToyStage.step

    def watched(self):
        backends_used.add(tuple(choose_backend("auto", tensor(), family=family) for family in ("hash", "volume")))
        return step(self)

    monkeypatch.setattr(toy_pipeline.ToyStage, "step", watched)
    folder = toy_run.start_run(load_config(None, [*SMALL, "kernels.hash=torch"], {}), tmp_path / "run")
    session = json.loads((folder / "run.json").read_text())["sessions"][-1]
    expected = {"hash": "torch", "mlp": "numba", "volume": "numba", "raster": "numba", "marching": "numba"}
    assert session["kernels"] == expected and backends_used == {("torch", "numba")}
    assert choose_backend("auto", tensor(), family="hash") == "numba"
    assert "kernels:" in (folder / "config.yaml").read_text()


def test_a_run_tells_its_notices_once(toy_run, tmp_path, monkeypatch):
    notice = "kernels: something to know"
    monkeypatch.setattr(toy_run, "resolve", lambda settings, device: Selection("cpu", {}, (notice,)))
    notices, note = [], Progress.note
    monkeypatch.setattr(Progress, "note", lambda self, text: (notices.append(text), note(self, text)))
    toy_run.start_run(load_config(None, SMALL, {}), tmp_path / "run")
    assert notices.count(notice) == 1


def test_a_run_that_asks_for_what_is_not_there_ends_before_it_leaves_anything(toy_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaolin", None)  # as if not installed
    kernels.probe.cache_clear()
    with pytest.raises(UserError, match="kernels.marching=kaolin"):
        toy_run.start_run(load_config(None, [*SMALL, "kernels.marching=kaolin"], {}), tmp_path / "run")
    kernels.probe.cache_clear()
    assert not list(tmp_path.iterdir())
