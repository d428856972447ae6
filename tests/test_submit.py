"""The archive to hand in: what is refused, what is named, what goes in."""

import hashlib
import io
import json
import re
import sys
import zipfile

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from src import ROOT, ProjectError
from src.run import cell_digest, src_digest
from tools import page, submit

NAMES = ("one", "two", "three")
SOURCES = ["x = 1", "# nothing", "x += 1", "print(x)"]
ERROR = new_output("error", ename="ValueError", evalue="no", traceback=[])
TWO, RESULT = "notebooks/two.ipynb", "reports/results/two.json"


class Project:
    """A small project, fit to be handed in; tests spoil it."""

    def __init__(self, root):
        self.root = root
        self.write("src/tool.py", "x = 1\n")
        self.write("README.md", "# Read me\n")
        self.write("theory/1_all.md", "# Answers\n\nSo.\n")
        for name in NAMES:
            self.run(name)

    def write(self, path, content):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def run(self, name, folder="notebooks", reports="reports", **about):
        """Writes what a run of a notebook leaves behind."""
        cells = [new_code_cell(source, execution_count=i) for i, source in enumerate(SOURCES, 1)]
        kind = {"profile": "cpu", "standin": False} | about
        cells[0].outputs = [new_output("display_data", {"text/plain": ""}, metadata={"hw3": kind})]
        notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells])
        self.write(f"{folder}/{name}.ipynb", nbformat.writes(notebook))
        self.result(f"{reports}/results/{name}.json")

    def result(self, path, **changed):
        code = {"src": src_digest(self.root), "cells": [*filter(None, map(cell_digest, SOURCES))]}
        self.write(path, json.dumps({"metrics": {}, "code": code | changed}))

    def edit(self, number, **fields):
        """Changes a cell of the second notebook, counted from 1."""
        notebook = nbformat.read(self.root / TWO, as_version=4)
        notebook.cells[number - 1].update(fields)
        self.write(TWO, nbformat.writes(notebook))

    def build(self, name="Ali", number="1", **options):
        """Gives the archive's files; keeps what was said."""
        self.lines = submit.build(name, number, root=self.root, **options)
        (path,) = self.root.glob("HW3-*.zip")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            return {name.removeprefix(f"{path.stem}/"): archive.read(name) for name in names}


@pytest.fixture
def project(tmp_path, monkeypatch):
    dates = iter((20260101000000, 20270101000000, 20280101000000))  # Chromium dates its PDF

    def images(folder, theory):
        folder.mkdir()
        (folder / "theory-page-1.png").write_bytes(b"PNG")
        (folder / "theory.pdf").write_text(f"/CreationDate (D:{next(dates)}+00'00')")

    def copy(notebook, html):
        html.parent.mkdir(exist_ok=True)
        html.write_bytes(b"page of " + notebook.read_bytes())

    monkeypatch.setattr(page, "theory_images", images)
    monkeypatch.setattr(page, "notebook_to_html", copy)
    return Project(tmp_path / "درس 3")


REFUSALS = [
    (lambda p: p.edit(4, outputs=[ERROR]), f"{TWO}, cell 4 ('x += 1') ended with ValueError: mend"),
    (lambda p: p.edit(5, execution_count=None), f"{TWO}, cell 5 ('print(x)') was not run: restart"),
    (lambda p: p.edit(4, execution_count=4), "cell 4 ('x += 1') was run as number 4 after number"),
    (lambda p: p.edit(5, execution_count=3), "cell 5 ('print(x)') was run as number 3 after numb"),
    (lambda p: p.edit(5, execution_count=5), "cell 5 ('print(x)') was run as number 5 after numb"),
    (lambda p: p.edit(5, source="x = 2"), f"{TWO}, cell 5 ('x = 2') has changed since it was run"),
    (lambda p: p.result(RESULT, src="of before"), f"{TWO} is older than the code in src/: restart"),
    (lambda p: p.write(RESULT, '{"metrics": {}}'), f"{TWO} has no (or an old) {RESULT}: copy it"),
    (lambda p: (p.root / TWO).unlink(), "notebooks/ holds only one, three: all three go in"),
    (lambda p: p.write(TWO, "{"), "two.ipynb is not a readable notebook"),
    (lambda p: p.run("two", profile="smoke"), f"{TWO} is a demonstration: run it on real data, or"),
    (lambda p: p.run("two", profile="demo"), f"{TWO} is a demonstration: run it on real data, or"),
    (lambda p: p.run("two", standin=True), f"{TWO} is a demonstration: run it on real data, or"),
]


@pytest.mark.parametrize("spoil, words", REFUSALS)
def test_it_refuses_in_one_line(project, spoil, words):
    spoil(project)
    with pytest.raises(ProjectError, match=f"^[^\n]*{re.escape(words)}[^\n]*$"):
        project.build()
    assert not list(project.root.glob("*HW3*"))


def test_a_demonstration_goes_in_only_if_asked_and_marked(project):
    project.run("two", "reports/standin", "reports/standin", profile="demo", standin=True)
    project.build(allow_standin=True)
    (project.root / "HW3-Ali-1.zip").unlink()  # the real run goes in where there is one
    project.edit(4, execution_count=None)
    files = project.build(allow_standin=True)
    assert (project.root / "HW3-Ali-1-STANDIN.zip").is_file()
    demonstration = (project.root / "reports/standin/two.ipynb").read_bytes()
    assert files[TWO] == demonstration and files["reports/two.html"] == b"page of " + demonstration
    assert "reports/standin/results/two.json" in files and RESULT not in files


def test_a_notebook_as_colab_saves_it(project, monkeypatch):
    monkeypatch.undo()  # the true page is made
    monkeypatch.setattr(page, "theory_images", lambda folder, theory: [])
    notebook = json.loads((project.root / TWO).read_text())
    widgets = {"application/vnd.jupyter.widget-state+json": {"ab": {"model_name": "HBoxModel"}}}
    notebook |= {"nbformat_minor": 0, "metadata": {"colab": {}, "widgets": widgets}}
    commands = ["!git clone ADDRESS hw3\n", "%cd hw3\n", "!pip install -q -r requirements.txt"]
    added = {"cell_type": "code", "source": commands, "execution_count": 9, "outputs": []}
    notebook["cells"].insert(1, added)  # above the first cell of code
    for cell in notebook["cells"]:
        cell.pop("id", None)
        cell["metadata"] = {"outputId": "y", "executionInfo": {"elapsed": 12}}
    mime = {"application/vnd.google.colaboratory.intrinsic+json": {"type": "string"}}
    shown = {"output_type": "display_data", "metadata": {}, "data": mime | {"text/plain": "seen"}}
    notebook["cells"][-1]["outputs"] = [shown]
    project.write(TWO, json.dumps(notebook))
    assert b"seen" in project.build()["reports/two.html"]
    del notebook["cells"][1]  # what was run in a cell that is gone
    for cell in notebook["cells"][1:]:
        cell["execution_count"] += 3
    project.write(TWO, json.dumps(notebook))
    project.build()


def test_words_of_a_library_speak_against_nobody(project):
    warning = "/usr/lib/torch/cuda.py:7: UserWarning: Traceback, Error, STAND-IN, C:\\Users\\a, ~/x"
    project.edit(4, outputs=[new_output("stream", name="stderr", text=warning)])
    project.build()


def test_a_cell_of_commands_may_be_run_at_any_time_or_never(project):
    project.edit(3, source="!nvidia-smi", execution_count=None)
    project.build()
    project.edit(4, execution_count=2)
    project.edit(5, execution_count=3)
    project.build()


def test_the_archive_and_its_manifest(project):
    project.write("reports/models/two.pt", b"weights")
    project.write("reports/models/two_large.pt", bytes(8 * 2**20 + 1))
    project.write("reports/results/two.npz", b"scores")
    project.write("notebooks/picture.png", b"PNG")
    junk = ["src/__pycache__/tool.pyc", "src/.DS_Store", "theory/x.part", "data/cifar/batch"]
    for path in [*junk, "notebooks/.ipynb_checkpoints/one.ipynb", ".venv/x.py", "mine.txt"]:
        project.write(path, "junk")
    project.result("reports/results/bench.json", src="other")
    files = project.build()
    title, collaborators, *lines = files.pop("MANIFEST").decode().splitlines()
    assert (title, collaborators) == ("HW3-Ali-1", "Collaborators: none")
    entries = [line.split(maxsplit=2) for line in lines]
    assert {place: (digest, int(size)) for digest, size, place in entries} == {
        place: (hashlib.sha256(data).hexdigest(), len(data)) for place, data in files.items()
    }
    assert set(files) == {
        *("README.md", "src/tool.py", "theory/1_all.md", "notebooks/picture.png"),
        *("reports/theory.html", "reports/theory/theory-page-1.png", "reports/theory/theory.pdf"),
        *("reports/models/two.pt", "reports/results/bench.json", "reports/results/two.npz"),
        *(f"notebooks/{name}.ipynb" for name in NAMES),
        *(f"reports/{name}.html" for name in NAMES),
        *(f"reports/results/{name}.json" for name in NAMES),
    }
    assert files[TWO] == (project.root / TWO).read_bytes()
    assert files["reports/two.html"] == b"page of " + files[TWO]
    assert project.lines[1].startswith("bench.json was measured with earlier code")


def test_collaborators_and_a_missing_browser(project, monkeypatch):
    def no_browser(folder, theory):
        raise ProjectError("No Chromium is installed: install one.")

    monkeypatch.setattr(page, "theory_images", no_browser)
    manifest = project.build(collaborators=" سارا,\n Reza ")["MANIFEST"].decode()
    assert "\nCollaborators: سارا, Reza\n" in manifest
    assert project.lines[-1].endswith("are missing. No Chromium is installed: install one.")


@pytest.mark.parametrize(
    "name, number, title",
    [
        (" Sara  J. O'Neill_Ruiz ", " B07 ", "HW3-Sara-J.-O'Neill_Ruiz-B07"),
        ("علی\u200cرضا محمّدی", "۴۰۱۲", "HW3-علی\u200cرضا-محمّدی-4012"),
        ("Zoe\u0308 हिन्दी", "1", "HW3-Zo\u00eb-हिन्दी-1"),
    ],
)
def test_names(name, number, title):
    assert submit.archive_name(name, number) == title


@pytest.mark.parametrize("word", [" ", "a/b", "a\\b", "a:b", "..", "*", "a\0b", "a\u202eb"])
def test_names_that_do_not_fit(tmp_path, capsys, word):
    for name, number in ((word, "1"), ("Ali", word)):
        assert submit.main([f"--name={name}", f"--id={number}"], tmp_path) == 1
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "make submission NAME=" in err


def test_equal_content_makes_an_equal_archive_and_replaces_the_older_one(project):
    project.build()
    before = project.root.joinpath("HW3-Ali-1.zip").read_bytes()
    project.build()
    assert project.root.joinpath("HW3-Ali-1.zip").read_bytes() == before
    project.write("README.md", "# Another\n")
    assert project.build()["README.md"] == b"# Another\n"


def test_what_is_not_of_this_tool_is_kept(project):
    project.write("HW3-Ali-1.zip", "packed by hand")
    with pytest.raises(ProjectError, match="is there and not of this tool: move it elsewhere"):
        project.build()
    assert (project.root / "HW3-Ali-1.zip").read_text() == "packed by hand"


def test_a_full_disk_is_told_as_such_and_the_older_archive_stays(project, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    project.build()
    before = (project.root / "HW3-Ali-1.zip").read_bytes()

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(ProjectError, match=r"HW3-Ali-1\.zip cannot be written: No space left"):
        project.build()
    assert [path.read_bytes() for path in project.root.glob("*HW3*")] == [before]


def test_a_terminal_without_the_letters(project, monkeypatch):
    out, arguments = io.TextIOWrapper(io.BytesIO(), "cp1252"), ["--name=سارا", "--id=۱۲"]
    monkeypatch.setattr(sys, "stdout", out)
    assert submit.main(arguments, project.root) == 0
    assert (project.root / "HW3-سارا-12.zip").is_file()
    out.seek(0)
    assert out.read().startswith("Wrote HW3-????-12.zip")


def test_this_repository(monkeypatch):
    monkeypatch.setattr(page, "theory_images", lambda folder, theory: [])  # a minute of Chromium's
    runs = [submit.Run(path, ROOT, False) for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    if problems := [run.problem for run in runs if run.problem]:
        aged = r"older than|changed since|demonstration|or an old|was not run"
        assert all(re.search(aged, problem) for problem in problems), problems
        pytest.skip(problems[0])
    files, _ = submit.collect(runs, ROOT)
    assert {"src/run.py", "reports/theory.html", "theory/SOURCES.md", "Makefile"} <= set(files)
