"""The archive to hand in: every refusal on a small project, names, content, the run elsewhere."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from src import ProjectError, results, settings
from src.provenance import code_fingerprint
from src.results import Metric
from tools import notebooks
from tools.html import digest, theory
from tools.submission import __main__ as command
from tools.submission import archive, checks, rerun

ROOT = Path(__file__).resolve().parent.parent
METRICS = {
    "accuracy": {"value": 0.9, "n": 100, "ci95": [0.82, 0.95], "unit": "fraction"},
    "parameters": {"value": 12.0, "n": 1, "ci95": None, "unit": "parameters"},
    "training": {"value": 3.0, "n": 1, "ci95": None, "unit": "milliseconds"},
}
# Stands in for tools/run.py: writes a result made of what it was told; fails for `broken`.
RUNNER = """
import json, os, sys
from pathlib import Path
name, root = sys.argv[1], Path(__file__).resolve().parent.parent
path = root / "reports" / "results" / f"{name}.json"
assert not path.exists() and "HW3_ROOT" not in os.environ and Path.cwd() == root
if name == "broken":
    sys.exit(1)
values = {"accuracy": 0.91, "parameters": 13.0, "training": 9.0}
metrics = {key: {"value": value, "n": 1, "ci95": None, "unit": ""} for key, value in values.items()}
told = {"profile": os.environ["HW3_PROFILE"], "data_source": os.environ.get("HW3_DATA")}
path.write_text(json.dumps(told | {"seconds": 7, "metrics": metrics}))
"""


def stream(text):
    return new_output("stream", name="stdout", text=text)


class Project:
    """A project fit to be handed in, without git; tests spoil it."""

    def __init__(self, root: Path):
        self.root = root
        self.write("src/tool.py", "x = 1\n")
        self.write("tools/run.py", RUNNER)
        self.write("requirements.txt", "torch\n")
        self.write("README.md", "# Read me\n")
        asked = "".join(f"## {q} Why?\n\n> Why?\n\nSo.\n\n" for q in checks.THEORY)
        self.write("theory/1_all.md", "# Theory\n\n" + asked)
        line = "*To be filled in by the student: names.*"
        self.write(
            "theory/SOURCES.md", f"# Sources\n\n## Collaborators\n\n{line}\n\n## Papers\n\nA.\n"
        )
        for number, name in enumerate(("one", "two", "three"), 1):
            task = f"> **The task (Practical {number}).** Do it."
            cells = [
                new_markdown_cell(f"# {name}\n\n{task}\n\nIt is done."),
                new_code_cell("x = 1", execution_count=1),
                new_code_cell(""),
                new_code_cell("print('ready')", execution_count=2, outputs=[stream("ready")]),
            ]
            self.made(name, new_notebook(cells=cells))

    def write(self, path: str, data: str | bytes) -> Path:
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def read(self, name):
        return nbformat.read(self.root / "notebooks" / f"{name}.ipynb", as_version=4)

    def made(self, name, notebook, standin=False):
        """Writes a notebook, its results and its page, as a run of it would."""
        kind, folder = (
            ("reports/standin", "reports/standin") if standin else ("notebooks", "reports")
        )
        if not standin:
            self.write(f"notebooks/{name}.ipynb", nbformat.writes(notebook))
        source = self.root / "notebooks" / f"{name}.ipynb"
        about = {
            "profile": "smoke" if standin else "cpu",
            "data_source": "stand-in" if standin else "HW3_DATA",
            "standin": standin,
            "fingerprint": code_fingerprint(source, folder=self.root),
        }
        notebook.metadata["hw3"] = about
        self.save(name, notebook, kind, folder)
        self.result(name, folder, **about)

    def result(self, name, folder="reports", **changed):
        content = {"profile": "cpu", "data_source": "HW3_DATA", "standin": False, "seconds": 5.0}
        file = self.root / folder / "results" / f"{name}.json"
        content |= json.loads(file.read_text()) if file.is_file() else {"metrics": METRICS}
        self.write(f"{folder}/results/{name}.json", json.dumps(content | changed))

    def save(self, name, notebook, path="notebooks", page="reports"):
        file = self.write(f"{path}/{name}.ipynb", nbformat.writes(notebook))
        self.write(f"{page}/{name}.html", f'<meta name="source-sha256" content="{digest(file)}">')

    def change(self, name="two", cell=3, page="reports", **fields):
        """Changes a cell of a notebook and makes its page again."""
        notebook = self.read(name)
        notebook.cells[cell].update(fields)
        self.save(name, notebook, page=page)


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "یادگیری عمیق"
    made = Project(root)
    for module in (checks, archive, rerun, results, settings, theory):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(notebooks, "FOLDER", root / "notebooks")

    def theory_images(folder, texts):
        folder.mkdir()
        (folder / "theory.pdf").write_bytes(b"%PDF")
        (folder / "theory-page-1.png").write_bytes(b"\x89PNG")

    monkeypatch.setattr(archive, "theory_images", theory_images)
    return made


def content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as packed:
        return {name.partition("/")[2]: packed.read(name) for name in packed.namelist()}


def refused(project, **options) -> list[str]:
    """What is said against the project, a line each; nothing may be left behind."""
    with pytest.raises(ProjectError) as error:
        archive.build("Ali", "1", **options)
    assert not [path for path in project.root.iterdir() if path.name.startswith("HW3")]
    first, *lines = str(error.value).splitlines()
    return [line.strip() for line in lines] if first == "not ready to be handed in:" else [first]


# --- refusals


def error_output(p):
    p.change(outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])])


def printed(text):
    return lambda p: p.change(outputs=[stream(text)])


def in_theory(old, new):
    def change(p):
        path = p.root / "theory" / "1_all.md"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


def sources(text):
    return lambda p: p.write("theory/SOURCES.md", text)


def metric(value):
    return lambda p: p.result("two", metrics={"a": METRICS["parameters"] | {"value": value}})


def text_of_two(text):
    return lambda p: p.change(cell=0, source=text)


def add(text):
    def change(p):
        notebook = p.read("two")
        notebook.cells.append(new_markdown_cell(text))
        p.save("two", notebook)

    return change


def save_about(p, **about):
    notebook = p.read("two")
    notebook.metadata["hw3"].update(about)
    p.save("two", notebook)


def page_of_before(p):
    p.change(cell=0, page="elsewhere", source="# two\n\n> **Practical 2**\n\nDone.")


TWO, RESULT = r"notebooks/two\.ipynb", r"reports/results/two\.json"
TASK = "> **The task (Practical 2).**"
HERE = "the output names this machine:"
REFUSALS = {
    "error": (error_output, rf"{TWO}, cell 4: it failed with ValueError: no"),
    "not run": (lambda p: p.change(execution_count=None), rf"{TWO}, cell 4: it was not run; .*"),
    "out of order": (
        lambda p: p.change(execution_count=7),
        rf"{TWO}, cell 4: it was run as number 7, not 2; restart .*",
    ),
    "other code": (
        lambda p: p.change(cell=1, source="x = 2"),
        rf"{TWO}: its results are older than its code; run the notebook again",
    ),
    "less code": (
        lambda p: p.change(source=""),
        rf"{TWO}: its results are older than its code; .*",
    ),
    "two runs": (
        lambda p: save_about(p, fingerprint="other"),
        rf"{TWO}: outputs and {RESULT} are of two runs; .*",
    ),
    "stand-in bench": (
        lambda p: p.result("bench", standin=True, data_source="stand-in"),
        r"reports/results/bench\.json: a result of profile cpu, stand-in",
    ),
    "no page": (
        lambda p: (p.root / "reports/two.html").unlink(),
        rf"{TWO}: its page reports/two\.html is missing; python -m .*",
    ),
    "old page": (
        page_of_before,
        rf"{TWO}: its page reports/two\.html shows another state of it; .*",
    ),
    "home": (printed("in \x1b[32m/home/ali/x"), rf"{TWO}, cell 4: {HERE} '/ho" r"me/ali/x'; .*"),
    "mac": (printed("file:///Users/ali/x"), rf"{TWO}, cell 4: {HERE} '/Us" r"ers/ali/x'; .*"),
    "temporary": (printed("(/tmp/ab12)"), rf"{TWO}, cell 4: {HERE} '/t" r"mp/ab12\)'; .*"),
    "windows": (printed("C:\\Users\\ali\\x"), rf"{TWO}, cell 4: {HERE} .*Users.*"),
    "the project": (
        lambda p: p.change(outputs=[stream(f"in {p.root}")]),
        rf"{TWO}, cell 4: {HERE}.*",
    ),
    "in a result": (
        lambda p: p.result("two", config={"x": "/home/ali"}),
        rf"{RESULT}: it names this machine: .*",
    ),
    "in alt text": (
        lambda p: p.change(
            outputs=[
                new_output(
                    "display_data",
                    data={"image/png": "iVBO"},
                    metadata={"image/png": {"alt": "in /root/x"}},
                )
            ]
        ),
        rf"{TWO}, cell 4: {HERE} '/root/x'; .*",
    ),
    "placeholder": (
        text_of_two(f"# two\n\n{TASK}\n\nTODO"),
        rf"{TWO}, cell 1: it still holds the placeholder 'TODO'",
    ),
    "only quoted": (
        text_of_two(f"# two\n\nSo.\n\n{TASK}\n\n> **Question 1.** Why?"),
        rf"{TWO}, cell 1: nothing answers 'The task \(Practical 2\)\.'",
    ),
    "only a heading": (add("## 2\n\nSo.\n\n## 3"), rf"{TWO}, cell 5: nothing answers '3'"),
    "theory placeholder": (
        in_theory("## 2.1 Why?\n\n> Why?\n\nSo.", "## 2.1 Why?\n\n> Why?\n\nپاسخ خود را بنویسید"),
        r"1_all\.md, line \d+: it still holds the placeholder .*",
    ),
    "unanswered": (
        in_theory("## 2.1 Why?\n\n> Why?\n\nSo.", "## 2.1 Why?\n\nSee:\n\n> Why?\n\n..."),
        r"1_all\.md: nothing answers 'Why\?'",
    ),
    "empty theory": (lambda p: p.write("theory/2_two.md", "# Two\n"), r"2_two\.md: it is empty"),
    "practical": (
        text_of_two("# two\n\nSo."),
        r"notebooks: none quotes the task of Practical 2, .*",
    ),
    "question left out": (
        in_theory("## 3.1b Why?", "## Why?"),
        r"theory: question 3\.1b has no answer; .*",
    ),
    "no collaborators": (
        sources("# Sources\n\n## Collaborators\n\n## Papers\n\nA.\n"),
        r'theory/SOURCES\.md has nothing under "Collaborators".*',
    ),
    "no such heading": (
        sources("# Sources\n\nA.\n"),
        r'theory/SOURCES\.md has nothing under "Collaborators".*',
    ),
    "no sources": (
        lambda p: (p.root / "theory/SOURCES.md").unlink(),
        r"theory/SOURCES\.md is missing: .*",
    ),
}


@pytest.mark.parametrize("spoil, line", REFUSALS.values(), ids=REFUSALS)
def test_it_refuses(project, spoil, line):
    spoil(project)
    lines = refused(project)
    assert len(lines) == 1 and re.fullmatch(line, lines[0]), lines


@pytest.mark.parametrize("broken", ["[]", "null", "{}", "", '{"metrics": []}', "nan", "none"])
def test_a_broken_result_is_one_line_and_named_with_its_notebook(project, broken):
    path = project.root / "reports" / "results" / "two.json"
    if broken == "none":
        path.unlink()
    elif broken == "nan":
        metric(float("nan"))(project)
    else:
        path.write_text(broken)
    lines = refused(project)
    assert lines[0].startswith("notebooks/two.ipynb: ") and "two.json" in lines[0], lines
    assert all("two.json" in line for line in lines) and len(lines) <= 2


@pytest.mark.parametrize("said", [5, None, [], "cpu", {"standin": True}])
def test_a_notebook_that_says_something_else_of_its_run_is_one_line(project, said):
    notebook = project.read("two")
    notebook.metadata["hw3"] = said
    project.save("two", notebook)
    (line,) = refused(project)[:1]
    assert line.startswith("notebooks/two.ipynb: ")


def test_a_page_that_is_no_text_is_one_line(project):
    project.write("reports/two.html", b"\xff\xfe\x00")
    (line,) = refused(project)
    assert line.startswith("notebooks/two.ipynb: its page reports/two.html shows another state")


@pytest.mark.parametrize("name", ["1_all.md", "SOURCES.md"])
def test_theory_in_the_encoding_of_an_old_editor(project, name):
    path = project.root / "theory" / name
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    archive.build("Ali", "1").unlink()
    path.write_bytes((text + "\nCaf\u00e9\n").encode("latin-1"))
    (line,) = refused(project)
    assert line.startswith(f"theory/{name} is not UTF-8 ") and line.endswith("save it as such")


@pytest.mark.parametrize("profile, source", [("smoke", "stand-in"), ("demo", "data/")])
def test_a_run_that_only_shows_that_everything_works_is_refused(project, profile, source):
    save_about(project, profile=profile, standin=source == "stand-in", data_source=source)
    (line,) = refused(project)
    assert line.startswith(f"notebooks/two.ipynb: a run of profile {profile} on {source}; run it")
    assert archive.build("Ali", "1", allow_standin=True).name == "HW3-Ali-1-STANDIN.zip"


@pytest.mark.parametrize("file", ["src/tool.py", "src/new.py"])
def test_age_is_told_by_what_the_code_does_and_not_by_git(project, file):
    project.write("README.md", "# Another\n")
    project.write("src/tool.py", '"""A docstring."""\n\nx = 1  # and a comment\r\n')
    archive.build("Ali", "1").unlink()
    project.write(file, "x = 2\n")
    lines = refused(project)
    assert len(lines) == 3 and all("its results are older than its code" in x for x in lines)


@pytest.mark.parametrize("copy", [".ipynb_checkpoints/tool-checkpoint.py", "._tool.py"])
def test_hidden_copies_beside_the_code_do_not_matter(project, copy):
    project.write(f"src/{copy}", b"\x00\x05\x16\x07\xff")
    assert not [name for name in content(archive.build("Ali", "1")) if Path(copy).name in name]


def test_line_endings_do_not_matter(project):
    for path in [*project.root.rglob("*.py"), *project.root.rglob("*.ipynb")]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for path in [*project.root.rglob("*.html"), *project.root.rglob("*.json")]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    archive.build("Ali", "1")


def test_a_benchmark_of_earlier_code_is_kept_and_named(project, capsys):
    archive.build("Ali", "1")
    assert "earlier code" not in capsys.readouterr().out
    project.result("bench", fingerprint="other")
    project.write("reports/results/bench.npz", b"raw scores")
    files = content(archive.build("Ali", "1"))
    assert {"reports/results/bench.json", "reports/results/bench.npz"} <= set(files)
    said = [x for x in capsys.readouterr().out.splitlines() if "measured by earlier code" in x]
    assert said == [
        "reports/results/bench.json: measured by earlier code; make it again to be sure"
    ]


def test_no_path_where_an_address_or_a_word_holds_one(project):
    project.change(outputs=[stream("https://example.org/home/x, kitchens, up/tmp/x")])
    archive.build("Ali", "1")


# --- the stand-in


def test_a_standin_run_goes_in_only_if_asked_and_marked(project):
    project.made("two", project.read("two"), standin=True)
    assert archive.build("Ali", "1", allow_standin=True).name == "HW3-Ali-1.zip", (
        "the real run goes in where there is one"
    )
    (project.root / "HW3-Ali-1.zip").unlink()
    project.change(execution_count=None, outputs=[])
    assert refused(project)[0].startswith("notebooks/two.ipynb, cell 4: it was not run")
    path = archive.build("Ali", "1", allow_standin=True)
    assert path.name == "HW3-Ali-1-STANDIN.zip"
    files = content(path)
    assert b'"smoke"' in files["notebooks/two.ipynb"]
    assert "reports/standin/results/two.json" in files and "reports/results/two.json" not in files
    assert "reports/standin/two.html" in files and "reports/two.html" not in files
    path.unlink()
    project.change(source="print('other')")
    lines = refused(project, allow_standin=True)
    assert lines == [
        "reports/standin/two.ipynb: its results are older than its code; run the notebook again"
    ]


def test_a_standin_result_alone_marks_the_archive_too(project):
    project.result("bench", profile="smoke")
    assert archive.build("Ali", "1", allow_standin=True).name == "HW3-Ali-1-STANDIN.zip"


# --- names


@pytest.mark.parametrize(
    "name, number, stem",
    [
        ("Ali", "401", "HW3-Ali-401"),
        (" Sara  von Berg ", " 007 ", "HW3-Sara-von-Berg-007"),
        ("J. O'Neill-Ruiz", "1", "HW3-J.-O'Neill-Ruiz-1"),
        ("علی\u200cرضا محمّدی", "۴۰۱۲", "HW3-علی\u200cرضا-محمّدی-4012"),
        ("Zoe\u0308", "1", "HW3-Zo\u00eb-1"),
    ],
)
def test_names(name, number, stem):
    assert archive.stem(name, number) == stem


@pytest.mark.parametrize(
    "name, number, words",
    [
        ("", "1", "usage: make submission NAME="),
        ("  ", "1", "usage"),
        ("Ali", "", "usage"),
        ("Ali", " ", "usage"),
        ("a/b", "1", "NAME holds '/'"),
        ("a\\b", "1", "NAME holds"),
        ("a\nb", "1", "NAME holds"),
        ("a\tb", "1", "NAME holds"),
        ("a\x00b", "1", "NAME holds"),
        ("a\u202eb", "1", "NAME holds"),
        ("a:b", "1", "NAME holds"),
        ("*", "1", "NAME holds"),
        (".ali", "1", "NAME begins with a dot"),
        ("..", "1", "NAME begins with a dot"),
        ("12", "1", "has no letter"),
        ("ع" * 100, "1", "too long"),
        ("Ali", "12a", "ID='12a' is not a student number"),
        ("Ali", "-1", "ID="),
        ("Ali", "1.5", "ID="),
        ("Ali", "²", "ID="),
        ("Ali", "1/2", "ID="),
    ],
)
def test_names_that_do_not_fit(project, capsys, name, number, words):
    assert command.main(["build", f"--name={name}", f"--id={number}"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and words in err
    assert not list(project.root.glob("HW3*"))


@pytest.mark.skipif(not shutil.which("make"), reason="no make installed")
def test_make_passes_the_words_on_as_they_are(tmp_path):
    recorder = tmp_path / "bin" / "python"
    recorder.parent.mkdir()
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    (tmp_path / "installed").touch()

    def made(*words):
        environment = os.environ | {"NAME": "desktop", "ZIP": "-9"}
        command = ["make", "--silent", "-C", str(ROOT), f"VENV={tmp_path}", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if not line.startswith("make")]

    begin = ["-m", "tools.submission", "build"]
    assert made("submission") == [*begin, "--name=", "--id=", "--collaborators="]
    assert made(
        "submission", 'NAME=علی "O\'Neill"', "ID=1", "COLLABORATORS=A; B", "ALLOW_STANDIN=1"
    ) == [*begin, '--name=علی "O\'Neill"', "--id=1", "--collaborators=A; B", "--allow-standin"]
    assert made("rerun") == ["-m", "tools.submission", "rerun", "--zip="]
    assert made("rerun", "ZIP=a b.zip")[-1] == "--zip=a b.zip"


# --- the archive


def test_the_archive_holds_everything_in_its_own_folder(project, capsys):
    project.write("reports/models/two.pt", b"weights")
    project.write("reports/models/two_large.pt", bytes(archive.MODEL_LIMIT + 1))
    project.write("reports/models/tried_once.pt", b"weights")
    project.write("data/README.md", "Data")
    project.write("data/cifar/batch", "data")
    for junk in (
        "src/__pycache__/tool.pyc",
        "notebooks/.ipynb_checkpoints/one.ipynb",
        "theory/x.part",
        "src/.DS_Store",
    ):
        project.write(junk, "junk")
    path = archive.build("علی رضا", "12")
    assert "two_large.pt is left out: over 8 MB" in capsys.readouterr().out
    with zipfile.ZipFile(path) as packed:
        assert packed.testzip() is None
        entries = packed.infolist()
    assert path == project.root / "HW3-علی-رضا-12.zip"
    assert all(e.filename.startswith("HW3-علی-رضا-12/") and e.compress_type == 8 for e in entries)
    assert set(content(path)) == {
        "MANIFEST",
        "README.md",
        "data/README.md",
        "requirements.txt",
        "src/tool.py",
        "tools/run.py",
        "theory/1_all.md",
        "theory/SOURCES.md",
        "reports/theory.html",
        "reports/theory/theory.pdf",
        "reports/theory/theory-page-1.png",
        "reports/models/two.pt",
        *(f"notebooks/{n}.ipynb" for n in ("one", "two", "three")),
        *(f"reports/{n}.html" for n in ("one", "two", "three")),
        *(f"reports/results/{n}.json" for n in ("one", "two", "three")),
    }


def test_the_manifest_is_true(project):
    files = content(archive.build("Ali", "1"))
    lines = [line.split(maxsplit=2) for line in files.pop("MANIFEST").decode().splitlines()]
    assert {path: (digest, int(size)) for digest, size, path in lines} == {
        path: (hashlib.sha256(data).hexdigest(), len(data)) for path, data in files.items()
    }


def test_an_interrupted_or_failed_writing_leaves_nothing(project, monkeypatch):
    archive.build("Ali", "1").write_bytes(b"the earlier one")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(ProjectError, match=r"HW3-Ali-1\.zip cannot be written .*No space left"):
        archive.build("Ali", "1")
    assert [path.read_bytes() for path in project.root.glob("HW3*")] == [b"the earlier one"]


def test_without_a_browser_the_page_goes_and_a_line_says_how_to_print_it(
    project, monkeypatch, capsys
):
    def no_browser(folder, texts):
        raise ProjectError("no Chromium or Chrome is installed")

    def no_drawing(folder, texts):
        folder.mkdir()
        (folder / "theory.pdf").write_bytes(b"%PDF")
        raise ProjectError("its page images need pdftoppm")

    monkeypatch.setattr(archive, "theory_images", no_drawing)
    assert "reports/theory/theory.pdf" in content(archive.build("Ali", "1"))
    assert "The theory goes without page images: its page images need" in capsys.readouterr().out
    monkeypatch.setattr(archive, "theory_images", no_browser)
    files = content(archive.build("Ali", "1"))
    assert b"3.1b" in files["reports/theory.html"] and not any(
        name.startswith("reports/theory/") for name in files
    )
    out = capsys.readouterr().out
    assert (
        "no Chromium or Chrome is installed" in out and "print reports/theory.html to a PDF" in out
    )


def test_collaborators(project, capsys):
    def named(collaborators=""):
        return content(archive.build("Ali", "1", collaborators))["theory/SOURCES.md"].decode()

    assert (
        "\n## Collaborators\n\nnone\n" in named()
        and "Collaborators: none." in capsys.readouterr().out
    )
    assert (
        "\n## Collaborators\n\nSara, \\1 Reza\n" in named(" Sara, \\1 Reza ")
        and "none" not in capsys.readouterr().out
    )
    (project.root / "HW3-Ali-1.zip").unlink()
    assert refused(project, collaborators="a\nb") == ["COLLABORATORS takes names in one line"]
    sources("# Sources\n\n## Collaborators\n\nMina\n")(project)
    assert "Mina" in named() and "Collaborators: none" not in capsys.readouterr().out
    (project.root / "HW3-Ali-1.zip").unlink()
    assert refused(project, collaborators="Sara") == [
        "theory/SOURCES.md names collaborators already: leave COLLABORATORS out"
    ]


def test_the_first_page_of_the_theory_names_the_student(project):
    cover = "# Answers\n\n| | |\n|---|---|\n| Student | *filled in by `make submission`* |\n"
    project.write("theory/0_answers.md", cover + "| Student number | *filled in by `make`* |\n")
    files = content(archive.build("سارا Ahmadi", "401", "Mina"))
    assert (
        "| Student | سارا Ahmadi |\n| Student number | 401 |"
        in files["theory/0_answers.md"].decode()
    )
    page = files["reports/theory.html"].decode()
    assert "سارا Ahmadi" in page and "Mina" in page and "filled in by" not in page


# --- the run elsewhere


def run_of(seconds, **values):
    return {
        "seconds": seconds,
        "metrics": {k: v if isinstance(v, Metric) else Metric(v) for k, v in values.items()},
    }


def test_compare():
    accuracy = Metric(0.9, 100, (0.82, 0.95), "fraction")
    seeds, training = Metric(0.96, 3, (0.82, 0.95)), Metric(3.0, 1, None, "milliseconds")
    stored = run_of(
        60, accuracy=accuracy, parameters=12.0, training=training, gone=12.0, seeds=seeds, zero=0.0
    )
    again = run_of(
        30, accuracy=0.8199, parameters=12.0, training=99.0, seeds=0.96, zero=1.0, extra=1.0
    )
    assert rerun.compare(stored, again) == [
        ("accuracy", "0.9", "0.8199", "OUTSIDE 0.82 to 0.95"),
        ("parameters", "12", "12", "equal"),
        ("training", "3", "99", "time, not judged"),
        ("gone", "12", "-", "MISSING"),
        ("seeds", "0.96", "0.96", "within 0.82 to 0.95"),
        ("zero", "0", "1", "DIFFERS"),
        ("whole run", "60", "30", "time, not judged"),
        ("extra", "-", "1", "new"),
    ]
    again = run_of(30, accuracy=0.82, parameters=12.0 - 1e-6)
    verdicts = {name: verdict for name, _, _, verdict in rerun.compare(stored, again)}
    assert verdicts["accuracy"] == "within 0.82 to 0.95"
    assert verdicts["parameters"] == "DIFFERS by 8.3e-06 %"


def test_compare_results_that_tell_no_time():
    for seconds in ({}, {"seconds": None}, {"seconds": "long"}):
        assert rerun.compare({"metrics": {}} | seconds, {"metrics": {}}) == []


def test_rerun(project, monkeypatch, capfd):
    (project.root / "pictures").mkdir()
    for variable, value in (
        ("HW3_PROFILE", "gpu"),
        ("HW3_DATA", "pictures"),
        ("HW3_ROOT", str(ROOT)),
        ("PYTHONPATH", str(ROOT)),
    ):
        monkeypatch.setenv(variable, value)
    archive.build("علی رضا", "12")
    assert command.main(["rerun", f"--python={sys.executable}"]) == 0
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line in ("one", "two", "three")] == [
        "one",
        "three",
        "two",
    ]
    rows = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines() if line.startswith("|")]
    assert ["accuracy", "0.9", "0.91", "within 0.82 to 0.95"] in rows
    assert ["parameters", "12", "13", "DIFFERS by 8.3 %"] in rows
    assert ["whole run", "5", "7", "time, not judged"] in rows
    assert "1 of 2 judged metrics agree.\nAnother profile: gpu, stored cpu; " in out
    assert f"Another data_source: {(project.root / 'pictures').resolve()}, stored HW3_DATA; " in out


def test_rerun_tells_of_a_notebook_that_fails(project, monkeypatch, capfd):
    monkeypatch.setenv("HW3_PROFILE", "gpu")
    project.made("broken", project.read("one"))
    path = archive.build("Ali", "1")
    assert command.main(["rerun", f"--zip={path}", f"--python={sys.executable}"]) == 1
    out, err = capfd.readouterr()
    assert "broken FAILED; its error is above." in out and "Error: failed elsewhere: broken" in err
    assert out.count("judged metrics agree") == 3, "the others are run and compared"
    project.write("tools/run.py", "")
    assert rerun.rerun(archive.build("Ali", "1"), Path(sys.executable)) == [
        "broken",
        "one",
        "three",
        "two",
    ]
    assert "two FAILED; it wrote no result." in capfd.readouterr().out


def test_rerun_makes_an_environment_of_the_requirements(project, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        rerun.venv,
        "create",
        lambda folder, **options: commands.append((folder, options["with_pip"])),
    )
    done = subprocess.CompletedProcess
    monkeypatch.setattr(
        rerun.subprocess, "run", lambda words, **_: commands.append(words) or done(words, 0)
    )
    python = rerun.make_environment(project.root, tmp_path / "fresh")
    assert commands[0] == (tmp_path / "fresh", True) and python.parent.parent == tmp_path / "fresh"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirements = ["-r", project.root / "requirements.txt"]
    assert commands[1:] == [[*install, *requirements, "-c", project.root / "constraints.txt"]]
    without = lambda words, **_: commands.append(words) or done(words, int("-c" in words))  # noqa: E731
    monkeypatch.setattr(rerun.subprocess, "run", without)
    rerun.make_environment(project.root, tmp_path / "fresh")
    assert commands[-1] == [*install, *requirements], "other versions where these are not to be had"
    monkeypatch.setattr(rerun.subprocess, "run", lambda words, **_: done(words, 1))
    with pytest.raises(ProjectError, match="the requirements cannot be installed"):
        rerun.make_environment(project.root, tmp_path / "fresh")


def test_which_archive(project):
    with pytest.raises(ProjectError, match="0 archives .*: make submission first"):
        rerun.find_archive("")
    one = archive.build("Ali", "1")
    assert rerun.find_archive("") == one and rerun.find_archive("other.zip") == Path("other.zip")
    archive.build("Sara", "2")
    with pytest.raises(ProjectError, match=r"2 archives .*, or name one, make rerun ZIP="):
        rerun.find_archive("")


def test_unpacking_a_stream_that_is_damaged(project, tmp_path):
    path = archive.build("Ali", "1")
    with zipfile.ZipFile(path) as packed:
        largest = max(packed.infolist(), key=lambda entry: entry.compress_size)
    content, start = bytearray(path.read_bytes()), largest.header_offset + 30
    start += len(largest.filename.encode())
    content[start : start + 50] = b"\xff" * 50  # no kind of block
    path.write_bytes(content)
    with pytest.raises(ProjectError, match=r"HW3-Ali-1\.zip cannot be unpacked") as error:
        rerun.unpack(path, tmp_path / "unpacked")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../x", "HW3-Ali-1/../../x", "/x", "other/x", "x", "HW3-Ali-1\\x"]
)
def test_unpacking_stays_in_one_folder(project, tmp_path, name):
    path = archive.build("Ali", "1")
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr(name, "x")
    with pytest.raises(ProjectError, match=r"HW3-Ali-1\.zip is not what its MANIFEST says"):
        rerun.unpack(path, tmp_path / "unpacked")
    assert not (tmp_path / "x").exists() and not Path("/x").exists()


def test_unpacking_what_is_damaged(project, tmp_path):
    path = archive.build("Ali", "1")
    renamed = path.rename(tmp_path / "upload (1).zip")
    assert rerun.unpack(renamed, tmp_path / "good") == tmp_path / "good" / "HW3-Ali-1"
    with zipfile.ZipFile(renamed, "a") as packed:
        packed.writestr("HW3-Ali-1/src/more.py", "x")
    with pytest.raises(ProjectError, match="not what its MANIFEST says"):
        rerun.unpack(renamed, tmp_path / "more")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "half.zip").write_bytes(renamed.read_bytes()[:100])
    for name, words in (
        ("empty", "not what its MANIFEST says"),
        ("half", "cannot be unpacked"),
        ("none", "cannot be unpacked"),
    ):
        with pytest.raises(ProjectError, match=words):
            rerun.unpack(tmp_path / f"{name}.zip", tmp_path / "bad")
