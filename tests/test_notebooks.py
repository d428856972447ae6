"""Rules for every notebook in the folder and for what is committed, so that a new one is covered.

Whether outputs are older than the code is not asked here, but by `make submission`.
"""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from src import ROOT
from src.run import load_results
from tools import notebooks

MAX_CELL, MAX_COLUMNS, MIN_WORDS, MAX_BYTES, MAX_METRICS = 40, 100, 3, 6_000_000, 60
NAMES = notebooks.names()


def code_cells(name):
    return [cell for cell in notebooks.read(name).cells if cell.cell_type == "code"]


def is_folded(cell):
    return "hide-input" in cell.metadata.get("tags", [])


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read(name):
    code = code_cells(name)
    words = sum(
        len(cell.source.split())
        for cell in notebooks.read(name).cells
        if cell.cell_type == "markdown"
    )
    shown = sum(len(cell.source.splitlines()) for cell in code if not is_folded(cell))
    assert max(len(cell.source.splitlines()) for cell in code) <= MAX_CELL
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= MAX_COLUMNS
    assert words >= MIN_WORDS * shown
    assert not [cell for cell in code if "fmt: skip" in cell.source or "fmt: off" in cell.source]
    for cell in code:
        assert is_folded(cell) == cell.metadata.get("jupyter", {}).get("source_hidden", False)


@pytest.mark.parametrize("name", NAMES)
def test_its_training_loop_is_in_sight(name):
    shown = "\n".join(cell.source for cell in code_cells(name) if not is_folded(cell))
    assert re.search(r"for .+ in training\.epochs\(", shown) and "training.step(" in shown


@pytest.mark.parametrize("name", NAMES)
def test_its_last_cell_saves_the_results(name):
    # The results name the cells that were run before them: no other can be told from a changed one.
    saves = ["run.save(" in cell.source for cell in code_cells(name)]
    assert saves[-1] and sum(saves) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_lead_to_headings(name):
    cells = notebooks.read(name).cells
    answers = next(
        cell for cell in cells if "Answers(" in cell.source and "import" not in cell.source
    )
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    rows = ast.literal_eval(re.search(r"Answers\(\s*(\[.*\])\s*,?\s*\)", answers.source, re.S)[1])
    assert rows and {row[2] for row in rows} <= set(headings)


def test_every_notebook_begins_alike():
    assert len({code_cells(name)[0].source for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["notebooks", "elsewhere"])
def test_the_first_cell_finds_the_project(name, folder, tmp_path):
    place = ROOT / "notebooks" if folder == "notebooks" else tmp_path
    other = tmp_path / "copy" / "src"  # another copy that HW3_ROOT names does not answer for this
    other.mkdir(parents=True)
    (other / "run.py").write_text("")
    outside = str(ROOT if folder == "elsewhere" else other.parent)
    code = code_cells(name)[0].source + "\nimport src\nprint(src.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=os.environ | {"HW3_ROOT": outside},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(ROOT / "src" / "__init__.py"), done.stderr


# --- requirements ---------------------------------------------------------------------------------
def imported(tree) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"src", "tools", "theory", "tests"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(names: set[str], *files: Path) -> set[str]:
    """The modules that no distribution named in the requirements brings."""
    lines = "\n".join(file.read_text(encoding="utf-8") for file in files)
    given, brought = set(map(plain, re.findall(r"(?m)^([\w.-]+)", lines))), set()
    for distribution in distributions():
        if plain(distribution.metadata["Name"]) in given:
            brought |= {file.parts[0].removesuffix(".py") for file in distribution.files}
    return names - brought


def test_every_import_is_declared():
    names, tests, ours = set(), set(), ROOT / "requirements.txt"
    for folder in ("src", "tools", "theory"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= imported(ast.parse(path.read_text(encoding="utf-8")))
    for name in NAMES:
        for cell in code_cells(name):
            names |= imported(ast.parse(cell.source))
    for path in (ROOT / "tests").glob("*.py"):
        tests |= imported(ast.parse(path.read_text(encoding="utf-8")))
    assert {"torch", "PIL"} <= names and not undeclared(names, ours)
    assert not undeclared(tests, ours, ROOT / "tests" / "requirements.txt")
    assert undeclared({"nosuchmodule"}, ours) == {"nosuchmodule"}


# --- what is committed ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_of_one_run_on_real_data(name):
    path, code = notebooks.FOLDER / f"{name}.ipynb", code_cells(name)
    if not any(cell.outputs for cell in code):
        pytest.skip("outputs are not yet made")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    about = notebooks.about(notebooks.read(name))
    assert about["standin"] is False and path.stat().st_size < MAX_BYTES
    page = (ROOT / "reports" / f"{name}.html").read_text(encoding="utf-8")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert page.count("data:image/png") == len(pictures) > 0
    if about["profile"] == "demo":
        pytest.skip("outputs of a demonstration: results at full size are not yet made")
    stored = load_results(ROOT / "reports" / "results" / f"{name}.json")
    assert {key: stored[key] for key in about} == about
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    minutes, machine = f"{stored['seconds'] / 60:.0f}", stored["machine"]
    row = next(x for x in readme.splitlines() if f"results/{name}.json" in x)
    assert row.split("|")[3:-1] == [f" {x} " for x in (f"`{stored['profile']}`", minutes, machine)]


RESULTS = sorted((ROOT / "reports" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_committed_results_are_whole_and_real(path):
    stored = load_results(path)
    if stored and "code" not in stored:
        pytest.skip("measured by earlier code; the next run at full size replaces it")
    assert stored and stored["standin"] is False and len(stored["metrics"]) <= MAX_METRICS
    for name, estimate in stored["metrics"].items():
        low, high = estimate.ci95 or (estimate.value, estimate.value)
        assert estimate.n >= 1 and low - 1e-9 <= estimate.value <= high + 1e-9, name
