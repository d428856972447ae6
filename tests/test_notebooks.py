"""Rules for every notebook in the folder and for all code beside it, so that a new one is covered.

Whether outputs are older than the code is not asked here, but by `make submission`.
"""

import ast
import html
import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import bs4
import pytest

from src import ROOT
from src.results import load_results, reports_folder
from tools import notebooks
from tools.html import digest
from tools.html.theory import parts
from tools.submission import checks

MAX_CELL, MAX_COLUMNS, MAX_CODE, MAX_SHOWN, MIN_WORDS, MAX_BYTES = 40, 100, 950, 450, 3, 6_000_000


def lines(cell) -> list[str]:
    return cell.source.splitlines()


def code_cells(notebook):
    return [(n, c) for n, c in enumerate(notebook.cells, 1) if c.cell_type == "code"]


def reading_problems(notebook) -> list[str]:
    """What makes a notebook hard to read, by the bars of CONTRIBUTING.md."""
    found, code = [], code_cells(notebook)
    for number, cell in code:
        if len(lines(cell)) > MAX_CELL:
            found.append(f"cell {number}: {len(lines(cell))} lines of code")
        found += [f"cell {number}: {len(x)} columns" for x in lines(cell) if len(x) > MAX_COLUMNS]
    total = sum(len(lines(cell)) for _, cell in code)
    shown = sum(len(lines(cell)) for _, cell in code if not notebooks.is_folded(cell))
    words = sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown")
    if total > MAX_CODE or shown > MAX_SHOWN:
        found.append(f"{total} lines of code, {shown} of them unfolded")
    if words < MIN_WORDS * shown:
        found.append(f"{words} words for {shown} unfolded lines of code")
    for number, cell in code:
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        if hidden != ("hide-input" in cell.metadata.get("tags", [])):
            found.append(f"cell {number}: the tag hide-input and jupyter.source_hidden disagree")
    return found


@pytest.mark.parametrize("name", notebooks.names())
def test_it_reads_like_a_book(name):
    assert reading_problems(notebooks.read(name)) == []


def test_the_rules_of_reading_can_be_broken():
    def problems(*cells):
        made = notebooks.nbformat.v4.new_notebook()
        for kind, source, *tags in cells:
            metadata = {"tags": tags} | ({"jupyter": {"source_hidden": True}} if tags else {})
            make = getattr(notebooks.nbformat.v4, f"new_{kind}_cell")
            made.cells.append(make(source, metadata=metadata))
        return reading_problems(made)

    words = ("markdown", "word " * 1500)
    assert problems(words, ("code", "x\n" * 40)) == []
    assert problems(words, ("code", "x\n" * 41)) == ["cell 2: 41 lines of code"]
    assert problems(words, ("code", "x" * 101)) == ["cell 2: 101 columns"]
    assert problems(words, *[("code", "x\n" * 40)] * 12) == [
        "480 lines of code, 480 of them unfolded"
    ]
    assert problems(words, *[("code", "x\n" * 40, "hide-input")] * 12) == []
    assert problems(("markdown", "two words"), ("code", "x")) == [
        "2 words for 1 unfolded lines of code"
    ]
    (found,) = problems(words, ("code", "x", "other"))
    assert found == "cell 2: the tag hide-input and jupyter.source_hidden disagree"


@pytest.mark.parametrize("name", notebooks.names())
def test_its_definitions_only_define(name):
    assert vars(notebooks.definitions(name))


def test_every_notebook_begins_alike():
    """The first cell finds the project; tests/test_run.py tries it in one notebook."""
    first = {code_cells(notebooks.read(name))[0][1].source for name in notebooks.names()}
    assert len(first) == 1


# --- imports


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


def declared(file: Path) -> set[str]:
    return set(map(plain, re.findall(r"^([\w.-]+)", file.read_text(encoding="utf-8"), re.M)))


def undeclared(names: set[str], files: list[Path]) -> set[str]:
    """The modules that no distribution named in the requirements brings."""
    given, brought = set().union(*map(declared, files)), set()
    for distribution in distributions():  # Python 3.10's packages_distributions() misses some
        if plain(distribution.metadata["Name"]) in given:
            brought |= {file.parts[0].removesuffix(".py") for file in distribution.files}
    return names - brought


def test_every_import_is_declared():
    names = set()
    for folder in ("src", "tools", "theory"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= imported(ast.parse(path.read_text(encoding="utf-8")))
    for name in notebooks.names():
        for _, cell in code_cells(notebooks.read(name)):
            names |= imported(ast.parse(cell.source))
    assert {"torch", "mistune", "PIL"} <= names
    requirements = ROOT / "requirements.txt"
    assert undeclared(names, [requirements]) == set()
    tests = set()
    for path in (ROOT / "tests").glob("*.py"):
        tests |= imported(ast.parse(path.read_text(encoding="utf-8")))
    assert undeclared(tests, [requirements, ROOT / "tests" / "requirements.txt"]) == set()
    assert undeclared({"nosuchmodule"}, [requirements]) == {"nosuchmodule"}


def test_every_requirement_has_bounds():
    for file in (ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"[\w.-]+>=[\w.]+,<[\w.]+", line), line


# --- what is committed


@pytest.fixture(params=notebooks.names())
def committed(request):
    """A committed run; skipped where outputs are still to be made."""
    path = notebooks.FOLDER / f"{request.param}.ipynb"
    run = checks.Run(request.param, path, notebooks.read(request.param))
    page = reports_folder() / f"{run.name}.html"
    if not any(cell.get("outputs") for cell in run.notebook.cells) and not page.exists():
        pytest.skip("outputs not yet made")
    return run


def test_committed_outputs_are_whole(committed):
    """Run once each, in order, without an error, on real data, with a page of the same state."""
    assert list(checks.order_problems(committed)) == []
    outputs = [o for _, cell in code_cells(committed.notebook) for o in cell.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert committed.about["standin"] is False
    assert list(checks.page_problems(committed)) == []
    assert committed.path.stat().st_size < MAX_BYTES


def test_committed_outputs_show_no_machine_path(committed):
    outputs = [o for _, cell in code_cells(committed.notebook) for o in cell.outputs]
    assert checks.machine_path(json.loads(json.dumps(outputs))) is None


def test_committed_outputs_and_results_are_of_one_run(committed):
    stored = load_results(committed.result)
    keys = ("profile", "data_source", "standin", "fingerprint")
    assert {key: stored.get(key) for key in keys} == {key: committed.about.get(key) for key in keys}


def test_every_question_of_the_assignment_has_its_answer():
    assert list(checks.answer_problems(checks.find_runs(allow_standin=False))) == []


def test_the_readme_says_what_the_committed_run_was(committed):
    stored = load_results(committed.result)
    place = committed.result.relative_to(ROOT).as_posix()
    rows = [x for x in (ROOT / "README.md").read_text("utf-8").splitlines() if f"({place})" in x]
    minutes = f"{stored['seconds'] / 60:.0f}"
    assert [row.split("|")[3:-1] for row in rows] == [
        [f" {cell} " for cell in (f"`{stored['profile']}`", minutes, stored["machine"])]
    ]


def test_committed_page_shows_every_figure(committed):
    page = committed.page.read_text(encoding="utf-8")
    soup = bs4.BeautifulSoup(page, "html.parser")
    assert not soup.find_all(class_="omitted"), "the page leaves an output out"
    for _, cell in code_cells(committed.notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata["image/png"]["alt"]
                assert alt.strip() and html.escape(alt, quote=False) in html.unescape(page)
    captions = [c.text for c in soup.find_all("figcaption")]
    assert [int(re.match(r"\s*Figure (\d+)\.", c)[1]) for c in captions] == [
        *range(1, len(captions) + 1)
    ]


RESULTS = sorted((ROOT / "reports" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_committed_results_are_whole_and_real(path):
    stored = load_results(path)  # which refuses what is not finite
    assert stored["standin"] is False
    assert checks.machine_path({k: v for k, v in stored.items() if k != "metrics"}) is None
    for name, metric in stored["metrics"].items():
        assert metric.n >= 1 and (metric.ci95 is None or metric.ci95[0] <= metric.ci95[1]), name


def test_committed_theory_page_comes_from_the_committed_answers():
    page = (ROOT / "reports" / "theory.html").read_text(encoding="utf-8")
    assert f'content="{digest(*parts())}"' in page
