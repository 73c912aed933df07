"""What the READMEs say is so: links, commands, settings, recipes, messages, tables and code."""

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from functools import cache

import pytest
import typer

from benchmarks.report.tables import markdown_blocks, put_into, readmes
from pipeline import cli, load_config
from pipeline.config.recipes import find_recipe, recipes, split_names
from tests import toy_pipeline
from tests.readme_cases import READMES, ROOT, anchors, commands, fenced, indented, inline, links, written

PAGES = pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))
MOST = 12 * 1024  # bytes of the first page
FILES = (".py", ".yaml", ".md", ".json", ".jsonl")
GROUPS = {name for name, value in load_config().model_dump().items() if isinstance(value, dict)}


def test_the_first_page_is_short_and_says_first_what_it_is_and_is_not_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST
    start = " ".join(text.splitlines()[:10])
    for fact in ("It is for", "It is not for", "Apache-2.0", "rasteriser", "closed", "No compiler", "26 kinds"):
        assert fact in start, fact


def test_every_readme_is_looked_at():
    assert {page for page in ROOT.rglob("README.md") if not {"node_modules", ".venv"} & set(page.parts)} == set(READMES)


@PAGES
def test_links_and_anchors_resolve(page):
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            target = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@PAGES
def test_commands_are_the_command_lines_own(page):
    """Subcommands and options by the parser itself; what a run is given by the configuration itself."""
    root = typer.main.get_command(cli.app)
    for words in commands(page, "pipeline"):
        command, rest = root, words
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        if command is root or not rest:  # named, not called
            assert all(word in {option for p in command.params for option in p.opts} for word in rest), words
            continue
        values = command.make_context("pipeline", list(rest)).params
        if command.name == "run":
            arguments = {name: values[name] for name in ("prompt", "stages", "seed", "device", "init_mesh")}
            arguments = {
                key: value if key == "seed" else str(value) for key, value in arguments.items() if value is not None
            }
            config = values["config"]
            if values["from_run"] is not None:  # of a run that is not there
                config, arguments["stages"] = "default", "coarse,fine"
            load_config(split_names(config), values["overrides"] or [], arguments)
        elif command.name == "settings":
            if values["config"] is not None:
                find_recipe(values["config"])
            assert not values["prefix"] or exists(values["prefix"])


@PAGES
def test_settings_that_are_named_exist_and_take_the_value(page):
    text = written(page)
    for code in [*inline(text), *indented(text)]:
        words = [word for word in code.split() if word.partition(".")[0] in GROUPS]
        given = [word for word in words if re.fullmatch(r"\w+(\.\w+)+=\S+", word)]
        if given:
            load_config("default", given)
        for word in words:
            if re.fullmatch(r"\w+(\.\w+)+", word) and not word.endswith(FILES):
                assert exists(word), word


@cache
def settings_of(recipe: str) -> dict:
    """All settings of a recipe, in their groups."""
    return load_config(recipe).model_dump()


def exists(key: str) -> bool:
    """Whether a key is a setting or a group of them in any recipe."""
    for name in recipes():
        values = settings_of(name)
        for part in key.split("."):
            values = values.get(part, ...) if isinstance(values, dict) else ...
        if values is not ...:
            return True
    return False


@PAGES
def test_files_that_are_named_are_there(page):
    for code in inline(written(page)):
        path = re.fullmatch(r"[\w.-]+(/[\w.*-]+)+/?|\w+\.py", code)
        if path and not code.startswith(("runs/", "coarse/", "OUT/", "RUN/")):
            places = (ROOT, ROOT / "stages", page.parent, page.parent / "weights")
            hub = re.fullmatch(r"[\w-]+/[\w.-]+", code) and not code.endswith(FILES)
            actual = any(list(place.glob(code.rstrip("/"))) for place in places)
            assert actual or (hub and not (ROOT / code.partition("/")[0]).exists()), code


@PAGES
def test_python_blocks_compile_and_their_imports_resolve(page):
    text = written(page)
    added = {name.replace("/", ".") for name in re.findall(r"^\+\+\+ b/(\S+)\.py$", text, re.MULTILINE)}
    for code in fenced(text, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module not in added:  # by a diff: see test_howto.py
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names)


@PAGES
def test_extras_that_are_installed_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    mentions = [
        name for part in re.findall(r"pip install[^\n]*\[([\w,]+)\]", written(page)) for name in part.split(",")
    ]
    mentions += re.findall(r"extra `(\w+)`", written(page))
    assert set(mentions) <= set(extras), mentions


def test_the_automatic_check_passes_the_tests_as_the_first_page_does():
    whole, *others = commands(ROOT / "README.md", "pytest")
    assert others == [whole, [*whole, "-m", "not slow"]]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in (
        'pip install --quiet -e ".[dev]"',
        "ruff check .",
        "ruff format --check .",
        shlex.join(["pytest", *whole]),
    ):
        assert command in lines, command
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert any(name.startswith("pytest-xdist") for name in options["project"]["optional-dependencies"]["dev"])  # its -n


@PAGES
def test_tables_are_those_of_the_results_and_recipes(page, tmp_path):
    """python -m benchmarks.report --readmes puts them there."""
    copy = tmp_path / "README.md"
    copy.write_bytes(page.read_bytes())
    put_into(copy, markdown_blocks())
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_every_table_has_its_place():
    text = "".join(page.read_text(encoding="utf-8") for page in READMES)
    places = re.findall(r"<!-- benchmarks:([\w-]+) -->", text)
    assert sorted(places) == sorted(markdown_blocks()), "each table once"
    assert set(readmes()) <= set(READMES)


def test_messages_of_the_troubleshooting_table_are_those_of_the_code():
    sources = [path for top in ("pipeline", "stages") for path in (ROOT / top).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    text = re.sub(r'"\s*\n\s*f?"', "", code)  # messages go over several lines
    page = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
    rows = page[page.index("| message |") : page.index("By what you see")].splitlines()[2:]
    messages = [message for row in rows if row for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 25
    missing = [message for message in messages if message not in text]
    assert missing == []


def test_the_python_of_the_first_page_runs(tmp_path, monkeypatch, capsys):
    (block,) = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert len(block.strip().splitlines()) <= 13
    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    few = block.replace('"coarse.steps": 100', '"coarse.steps": 3, "fine.steps": 2, "export.turntable_frames": 0')
    assert few != block
    exec(compile(few, "README.md", "exec"), {})
    assert (tmp_path / "mug.glb").stat().st_size > 100
    assert capsys.readouterr().out.splitlines()[:4] == ["coarse 1", "coarse 2", "coarse 3", "fine 1"]


def test_the_python_of_the_tools_page_runs(tmp_path, monkeypatch, capsys):
    (block,) = fenced((ROOT / "pipeline" / "README.md").read_text(encoding="utf-8"), "python")
    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    few = block.replace('"coarse.steps=100"', '"coarse.steps=2", "fine.steps=3", "export.turntable_frames=0"')
    assert few != block
    exec(compile(few, "pipeline/README.md", "exec"), {})
    assert (tmp_path / "printing" / "mesh.stl").is_file()
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()][-1] == ["fine", "3"]


MODULES = sorted({words[0] for page in READMES for words in commands(page, "python -m")})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_modules_that_are_run_take_the_options_that_are_given(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    text = capsys.readouterr().out
    assert not stop.value.code
    options = {word for page in READMES for words in commands(page, "python -m") for word in words[1:]
               if words[0] == module and word.startswith("--")}  # fmt: skip
    assert {option for option in options if not re.search(rf"{option}\b", text)} == set()
