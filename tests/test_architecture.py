"""The shape of the house: who may import whom, how large a module may be, what the command line may load."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
MAX_MODULES = 20  # of one folder at one level
MAX_HELP_MODULES = 450  # 317 with typer's own; torch alone brings 800 more

# Rooms of the house, each with the rooms it may import; a room may always import itself. `ROOM.*` stands for a room and
# all rooms within it. A module that others of its folder build on is a room of its own.
_BASE = {"stages.errors", "stages.cameras", "stages.parallel", "stages.paths", "stages.phases", "stages.ramp"}
_SURFACE = _BASE | {"stages.kernels.*", "stages.mesh.*"}
_STAGE = _SURFACE | {
    "stages.networks",
    "stages.optimise",
    "stages.picture",
    "stages.stage",
    "stages.fields",
    "stages.render",
    "stages.guidance.guide",
}
_GUIDED = _STAGE | {"stages.guidance.*", "stages.prompts"}
_MESH = _BASE | {"stages.kernels.*", "stages.mesh"}
_TWINS = {"stages.kernels.grid", "stages.kernels.reference"}
_TABLES = {"benchmarks.environment", "benchmarks.markdown", "benchmarks.plots", "benchmarks.timing"}
_BENCHMARK = _TABLES | {"stages.*", "pipeline.*"}
ALLOWED = {
    "stages.errors": set(),
    "stages.paths": {"stages.errors"},
    "stages.networks": {"stages.errors", "stages.paths"},
    "stages.phases": set(),
    "stages.ramp": set(),
    "stages.cameras": {"stages.errors"},
    "stages.optimise": {"stages.errors"},
    "stages.parallel": {"stages.errors"},
    "stages.prompts": _BASE,
    "stages.kernels.grid": set(),
    "stages.kernels.reference": set(),
    "stages.kernels.cpu": _TWINS | {"stages.errors"},
    "stages.kernels.cuda": _TWINS | {"stages.errors"},
    "stages.kernels.adaptors": _TWINS,
    "stages.kernels": _BASE | _TWINS | {"stages.kernels.cpu", "stages.kernels.cuda", "stages.kernels.adaptors"},
    "stages.mesh": _MESH,
    "stages.mesh.files": _MESH,
    "stages.mesh.tets": _MESH,
    "stages.mesh.texture": _MESH,
    "stages.mesh.subdivision": _MESH | {"stages.mesh.texture"},
    "stages.fields": _BASE | {"stages.kernels.*"},
    "stages.render": _SURFACE,
    "stages.picture": _BASE | {"stages.kernels"},
    "stages.stage": {"stages.guidance.guide", "stages.mesh", "stages.optimise", "stages.picture"},
    "stages.guidance.guide": _BASE | {"stages.render"},
    "stages.guidance.prior": _BASE | {"stages.render"},
    "stages.guidance.vsd": _BASE | {"stages.guidance.prior"},
    "stages.guidance.diffusion": _BASE | {"stages.kernels.*", "stages.prompts", "stages.render"}
    | {"stages.guidance.prior", "stages.guidance.vsd"},
    "stages.guidance": _SURFACE | {"stages.prompts", "stages.render", "stages.guidance.*"},
    "stages.likeness": _BASE | {"stages.guidance.guide", "stages.kernels", "stages.picture", "stages.render"},
    "stages.backdrop": _STAGE,
    "stages.coarse": _GUIDED | {"stages.backdrop", "stages.likeness"},
    "stages.geometry": _STAGE,
    "stages.fine": _GUIDED | {"stages.geometry", "stages.likeness"},
    "stages.clip_mesh": _STAGE,
    "stages.triplane": _STAGE,
    "stages.gan": _STAGE,
    "stages.points": _STAGE | {"stages.guidance"},
    "stages.particles": _BASE | {"stages.coarse", "stages.guidance.guide", "stages.optimise", "stages.stage"},
    "stages.kinds": _GUIDED | {"stages.coarse", "stages.fine", "stages.clip_mesh", "stages.particles"}
    | {"stages.points", "stages.triplane", "stages.gan"},
    "stages.pocket": _SURFACE
    | {"stages.render", "stages.guidance.*", "stages.prompts", "stages.points", "stages.triplane"}
    | {"stages.gan"},
    "pipeline": {"pipeline.cli", "pipeline.import_names"},
    "pipeline.import_names": set(),
    "pipeline.streams": set(),
    "pipeline.errors": {"stages.*", "pipeline.streams"},
    "pipeline.output": {"stages.*"},
    "pipeline.priors": {"stages.*", "pipeline.errors"},
    "pipeline.config": {"stages.*", "pipeline.output", "pipeline.priors"},
    "pipeline.profile": {"stages.*", "pipeline.config", "pipeline.output"},
    "pipeline.runs": {"stages.*", "pipeline", "pipeline.errors", "pipeline.config", "pipeline.priors"}
    | {"pipeline.output", "pipeline.profile", "pipeline.streams", "pipeline.watch"},
    "pipeline.watch": {"stages.*"},
    "pipeline.view": {"stages.*", "pipeline.batch", "pipeline.config", "pipeline.runs", "pipeline.watch"},
    "pipeline.batch": {"stages.*", "pipeline.errors", "pipeline.config", "pipeline.output", "pipeline.priors"}
    | {"pipeline.runs"},
    "pipeline.doctor": {"stages.*", "pipeline", "pipeline.errors", "pipeline.import_names", "pipeline.priors"},
    "pipeline.api": {"stages.*", "pipeline.config", "pipeline.priors", "pipeline.profile", "pipeline.runs"},
    "pipeline.cli": {"stages.*", "pipeline.*"},
    "benchmarks.environment": {"pipeline.*"},
    "benchmarks.markdown": set(),
    "benchmarks.plots": set(),
    "benchmarks.timing": set(),
    "benchmarks.speed": _BENCHMARK,
    "benchmarks.kernels": _BENCHMARK | {"benchmarks.speed"},
    "benchmarks.quality": _BENCHMARK | {"benchmarks.speed"},
    "benchmarks.pocket": _BENCHMARK | {"benchmarks.quality"},
    "benchmarks.device_check": _BENCHMARK | {"benchmarks.speed"},
    "benchmarks.report": _BENCHMARK
    | {"benchmarks.device_check", "benchmarks.kernels", "benchmarks.quality", "benchmarks.speed"},
    "benchmarks": _BENCHMARK | {"benchmarks.quality"},
}  # fmt: skip


def sources() -> list[Path]:
    return [path for top in ("pipeline", "stages", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module, is a star import) of every import in the file, those inside functions included."""
    pairs = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            pairs += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            star = any(alias.name == "*" for alias in node.names)
            pairs += [(node.lineno, f"{node.module}.{alias.name}", star) for alias in node.names]
    return pairs


def room(module: str) -> str | None:
    """The longest room that holds a module; None for one that is not ours."""
    candidates = [name for name in (*ALLOWED, "stages", "tests") if module == name or module.startswith(name + ".")]
    return max(candidates, key=len, default=None)


def is_allowed(allowed: set[str], other: str) -> bool:
    parts = other.split(".")
    return other in allowed or any(".".join([*parts[:k], "*"]) in allowed for k in range(1, len(parts) + 1))


def import_graph() -> dict[str, set[str]]:
    """The modules of ours that each module of ours imports, also within its folder and inside functions."""
    modules = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = {module if module in modules else module.rpartition(".")[0] for _, module, _ in imports(path)}
        graph[name] = {target for target in targets if target in modules and target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules that reach each other by imports (strongly connected components of two and more)."""

    def reached(start: str) -> set[str]:
        visited, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - visited
            visited |= new
            waiting += new
        return visited

    reach = {name: reached(name) for name in graph}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


def back_edges() -> list[str]:
    wrong = []
    for path in sources():
        home = room(module_name(path))
        for line, module, star in imports(path):
            other = room(module)
            if star:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: star import of {module}")
            if other is None or other == home:
                continue
            if not is_allowed(ALLOWED.get(home, set()), other):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {home} imports {other}")
    return wrong


def test_imports_run_one_way():
    assert back_edges() == []


def test_every_module_has_a_room():
    homeless = [module_name(path) for path in sources() if room(module_name(path)) in (None, "stages")]
    assert homeless == ["stages"]  # the package itself


def test_the_import_walk_sees_a_back_edge(monkeypatch):
    """The walk is only worth something if it fails: forbid an edge that exists and look."""
    monkeypatch.setitem(ALLOWED, "pipeline.runs", set())
    assert any("pipeline.runs imports stages.errors" in line for line in back_edges())


def test_no_modules_import_each_other():
    """Also within a room, where any import is allowed: a circle hides which of two modules stands on which."""
    assert circles(import_graph()) == set()


def test_the_import_walk_sees_a_circle_inside_a_folder():
    """Back through a third module, and by an import inside a function."""
    graph = import_graph()
    assert "pipeline.runs.lineage" in graph["pipeline.runs.loop"] and "pipeline.runs.loop" in graph["pipeline.runs.run"]
    graph["pipeline.runs.lineage"].add("pipeline.runs.run")
    (new,) = circles(graph)
    assert {"pipeline.runs.lineage", "pipeline.runs.loop", "pipeline.runs.run"} <= new
    assert "stages.guidance.diffusion.prior" in graph["pipeline.priors.folders"]  # imported where it is needed


def test_no_folder_is_too_full_to_see_anything_in():
    counts = {}
    for path in (*sources(), *(ROOT / "tests").rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert not {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MAX_MODULES}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_module_is_short_or_says_why(path):
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert count <= MAX_LINES or "lines" in docstring, f"{count} lines"
    assert docstring or not text.strip(), "a module begins by saying what it is"


def test_no_comment_is_a_banner():
    banner = re.compile(r"#\s*[-=*#~]{3,}")
    files = [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]
    lines = [(path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [f"{path.name}: {line.strip()}" for path, line in lines if banner.match(line.strip())] == []


def test_no_module_is_named_after_nothing():
    assert not [path for path in sources() if path.stem in ("utils", "misc", "helpers", "common", "util", "helper")]


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["--version"]])
def test_help_loads_little_and_no_heavy_package(command):
    """What its time consists of, which a clock could not hold on a busy machine: modules that are loaded."""
    code = (
        "import sys\n"
        "from pipeline.cli import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numba', 'numpy', 'scipy', 'trimesh', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "ours = [name for name in sys.modules if name.split('.')[0] in ('pipeline', 'stages')]\n"
        f"assert len(sys.modules) < {MAX_HELP_MODULES} and len(ours) < 12, (len(sys.modules), ours)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
