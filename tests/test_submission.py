"""The archive to hand in: every refusal on a small project, names, bytes, the run elsewhere; and what is committed."""

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

from src import ProjectError, results
from src.plotting import STANDIN_MARK
from tools import notebooks, submission

ROOT = Path(__file__).resolve().parent.parent
SHOUT = "print('ready')"
METRICS = {
    "accuracy": {"value": 0.9, "n": 100, "ci95": [0.82, 0.95], "unit": "fraction"},
    "parameters": {"value": 12.0, "n": 1, "ci95": None, "unit": "parameters"},
    "training": {"value": 3.0, "n": 1, "ci95": None, "unit": "milliseconds"},
}
# Stands in for tools/run.py: writes a result made of what it was told, and fails for the notebook `broken`.
RUNNER = """
import json, os, sys
from pathlib import Path
name, root = sys.argv[1], Path(__file__).resolve().parent.parent
path = root / "reports" / "results" / f"{name}.json"
assert not path.exists() and "HW3_ROOT" not in os.environ and Path.cwd() == root
if name == "broken":
    sys.exit(1)
metrics = {"accuracy": {"value": 0.91}, "parameters": {"value": 13.0}, "training": {"value": 9.0}}
content = {"profile": os.environ["HW3_PROFILE"], "data_source": os.environ["HW3_DATA"], "seconds": 7, "metrics": metrics}
path.write_text(json.dumps(content))
"""


def stream(text):
    return new_output("stream", name="stdout", text=text)


class Project:
    """A project fit to be handed in, in git; tests spoil it."""

    def __init__(self, root: Path):
        self.root = root
        self.write("src/tool.py", "x = 1\n")
        self.write("src/accounting.py", "x = 1\n")
        self.write("tools/run.py", RUNNER)
        self.write("requirements.txt", "torch\n")
        self.write("README.md", "# Read me\n")
        self.write(
            "theory/1_all.md",
            "# Theory\n\n"
            + "".join(f"## {q} Why?\n\n> Why?\n\nSo.\n\n" for q in submission.THEORY),
        )
        line = "*To be filled in by the student: names.*"
        self.write(
            "theory/SOURCES.md", f"# Sources\n\n## Collaborators\n\n{line}\n\n## Papers\n\nA.\n"
        )
        for number, name in enumerate(("one", "two", "three"), 1):
            cells = [
                new_markdown_cell(
                    f"# {name}\n\n> **The task (Practical {number}).** Do it.\n\nIt is done."
                ),
                new_code_cell("x = 1", execution_count=1),
                new_code_cell(""),
                new_code_cell(SHOUT, execution_count=2, outputs=[stream("ready")]),
            ]
            self.save(name, new_notebook(cells=cells))
        self.git("init", "--quiet")
        self.git("add", ".")
        self.commit()
        for name in ("one", "two", "three"):
            self.result(name)

    def write(self, path: str, data: str | bytes) -> Path:
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def git(self, *words):
        done = subprocess.run(
            [
                "git",
                "-c",
                "user.name=x",
                "-c",
                "user.email=x@y",
                "-c",
                "commit.gpgsign=false",
                *words,
            ],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def commit(self):
        self.git("commit", "--quiet", "--all", "--allow-empty", "--message", "state")

    def result(self, name, folder="reports", **changed):
        content = {
            "profile": "cpu",
            "data_source": "HW3_DATA",
            "standin": False,
            "commit": self.git("rev-parse", "HEAD"),
            "seconds": 5.0,
            "metrics": METRICS,
        } | changed
        self.write(f"{folder}/results/{name}.json", json.dumps(content))

    def save(self, name, notebook, path="notebooks", page="reports"):
        file = self.write(f"{path}/{name}.ipynb", nbformat.writes(notebook))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.write(f"{page}/{name}.html", f'<meta name="source-sha256" content="{digest}">')

    def change(self, name="two", cell=3, path="notebooks", page="reports", **fields):
        """Changes a cell of a notebook and makes its page again."""
        notebook = nbformat.read(self.root / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.cells[cell].update(fields)
        self.save(name, notebook, path, page)

    def add(self, text, name="two"):
        """Adds a Markdown cell to a notebook and makes its page again."""
        notebook = nbformat.read(self.root / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.cells.append(new_markdown_cell(text))
        self.save(name, notebook)


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "یادگیری عمیق"
    made = Project(root)
    monkeypatch.setattr(submission, "ROOT", root)
    monkeypatch.setattr(results, "ROOT", root)
    monkeypatch.setattr(notebooks, "FOLDER", root / "notebooks")
    monkeypatch.setattr(submission.getpass, "getuser", lambda: "nadia")
    monkeypatch.setattr(submission.platform, "node", lambda: "kitchen.example.org")

    def theory_images(folder):
        folder.mkdir()
        (folder / "theory.pdf").write_bytes(b"%PDF")
        (folder / "theory-page-1.png").write_bytes(b"\x89PNG")

    monkeypatch.setattr(submission, "theory_images", theory_images)
    return made


def content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def refused(project, **options) -> list[str]:
    """What is said against the project, a line each; nothing may be left behind."""
    with pytest.raises(ProjectError) as error:
        submission.build("Ali", "1", **options)
    assert not [path for path in project.root.iterdir() if path.name.startswith("HW3")]
    first, *lines = str(error.value).splitlines()
    return [line.strip() for line in lines] if first == "not ready to be handed in:" else [first]


# --- refusals


def error_output(p):
    p.change(outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])])


def printed(text):
    return lambda p: p.change(outputs=[stream(text)])


def theory(old, new):
    def change(p):
        path = p.root / "theory" / "1_all.md"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


def sources(text):
    return lambda p: p.write("theory/SOURCES.md", text)


TWO = r"notebooks/two\.ipynb"
REFUSALS = {
    "error": (error_output, rf"{TWO}, cell 4: it failed with ValueError: no"),
    "not run": (
        lambda p: p.change(execution_count=None),
        rf"{TWO}, cell 4: it was not run; restart .*",
    ),
    "out of order": (
        lambda p: p.change(execution_count=7),
        rf"{TWO}, cell 4: it was run as number 7, not 2; restart .*",
    ),
    "smoke result": (
        lambda p: p.result("two", profile="smoke"),
        r"reports/results/two\.json: a result of the smoke profile .*",
    ),
    "stand-in result": (
        lambda p: p.result("two", standin=True),
        r"reports/results/two\.json: a result of .* the stand-in .*",
    ),
    "stand-in bench": (
        lambda p: p.result("bench", standin=True),
        r"reports/results/bench\.json: a result of .* the stand-in .*",
    ),
    "no result": (
        lambda p: (p.root / "reports/results/two.json").unlink(),
        rf"{TWO}: its result .*two\.json is missing; .*",
    ),
    "no page": (
        lambda p: (p.root / "reports/two.html").unlink(),
        rf"{TWO}: its page reports/two\.html is missing; python -m .*",
    ),
    "old page": (
        lambda p: p.change(
            page="elsewhere", cell=0, source="# two\n\n> **The task (Practical 2).**\n\nDone."
        ),
        rf"{TWO}: its page reports/two\.html was made from another state of it; python -m tools\.html .*",
    ),
    "dirty commit": (
        lambda p: p.result("two", commit=p.git("rev-parse", "HEAD") + "+changes"),
        r"reports/results/two\.json: its commit '\w+\+changes' is not .*",
    ),
    "unknown commit": (
        lambda p: p.result("two", commit="unknown"),
        r"reports/results/two\.json: its commit 'unknown' is not .*",
    ),
    "lost commit": (
        lambda p: p.result("two", commit="a" * 40),
        r"reports/results/two\.json: its commit 'a+' is not .*",
    ),
    "bench's commit": (
        lambda p: p.result("bench", commit="unknown"),
        r"reports/results/bench\.json: its commit 'unknown' .*",
    ),
    "other code": (
        lambda p: p.change(cell=1, source="x = 2"),
        rf"{TWO}, cell 2: the code is not the same at its .* \w{{7}}; .*",
    ),
    "less code": (
        lambda p: p.change(source=""),
        rf"{TWO}, cell 4: the code is not the same at its result's commit \w{{7}}; .*",
    ),
    "home": (
        printed("in \x1b[32m/home/ali/x"),
        rf"{TWO}, cell 4: the output names this machine: '/ho" r"me/ali/x'; .*",
    ),
    "mac": (
        printed("file:///Users/ali/x"),
        rf"{TWO}, cell 4: the output names this machine: '/Us" r"ers/ali/x'; .*",
    ),
    "temporary": (
        printed("(/tmp/ab12)"),
        rf"{TWO}, cell 4: the output names this machine: '/t" r"mp/ab12\)'; .*",
    ),
    "windows": (
        printed("C:\\Users\\ali\\x"),
        rf"{TWO}, cell 4: the output names this machine: .*Users.*",
    ),
    "the project": (
        lambda p: p.change(outputs=[stream(f"in {p.root}")]),
        rf"{TWO}, cell 4: the output names this machine: .*",
    ),
    "login": (
        printed("made by nadia."),
        rf"{TWO}, cell 4: the output names this machine: 'nadia'; .*",
    ),
    "host": (
        printed("on kitchen"),
        rf"{TWO}, cell 4: the output names this machine: 'kitchen'; .*",
    ),
    "in a result": (
        lambda p: p.result("two", config={"x": "/home/ali"}),
        r"reports/results/two\.json: the output names .*",
    ),
    "in alt text": (
        lambda p: p.change(
            outputs=[
                new_output(
                    "display_data",
                    data={"image/png": "iVBO"},
                    metadata={"image/png": {"alt": "by nadia"}},
                )
            ]
        ),
        rf"{TWO}, cell 4: the output names this machine: 'nadia'; .*",
    ),
    "placeholder": (
        lambda p: p.change(cell=0, source="# two\n\n> **The task (Practical 2).**\n\nTODO"),
        rf"{TWO}, cell 1: it still holds the placeholder 'TODO'",
    ),
    "only quoted": (
        lambda p: p.change(
            cell=0, source="# two\n\nSo.\n\n> **The task (Practical 2).**\n\n> **Question 1.** Why?"
        ),
        rf"{TWO}, cell 1: nothing answers '\*\*The task \(Practical 2\)\.\*\*'",
    ),
    "only a heading": (
        lambda p: p.add("## 2\n\nSo.\n\n## 3"),
        rf"{TWO}, cell 5: nothing answers '3'",
    ),
    "theory placeholder": (
        theory("## 2.1 Why?\n\n> Why?\n\nSo.", "## 2.1 Why?\n\n> Why?\n\nپاسخ خود را بنویسید"),
        r"1_all\.md, line \d+: it still holds the placeholder .*",
    ),
    "unanswered": (
        theory("## 2.1 Why?\n\n> Why?\n\nSo.", "## 2.1 Why?\n\nSee:\n\n> Why?\n\n..."),
        r"1_all\.md: nothing answers 'Why\?'",
    ),
    "empty theory": (lambda p: p.write("theory/2_two.md", "# Two\n"), r"2_two\.md: it is empty"),
    "practical": (
        lambda p: p.change(cell=0, source="# two\n\nSo."),
        r"notebooks: none quotes the task of Practical 2, .*",
    ),
    "question left out": (
        theory("## 3.1b Why?", "## Why?"),
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


def test_it_refuses_results_of_another_src(project):
    """Uncommitted and committed changes, new files; but not what no number depends on."""
    project.write("README.md", "# Another\n")
    project.write("tests/test_x.py", "")
    project.change(
        cell=0, source="# two\n\n> **The task (Practical 2).** Do it.\n\nIt is done well."
    )
    project.commit()
    submission.build("Ali", "1").unlink()
    project.write("src/tool.py", "x = 2\n")
    project.commit()
    project.write("src/new.py", "")
    project.write("src/accounting.py", "x = 2\n")
    project.write("requirements.txt", "numpy\n")
    lines = refused(project)
    changed = r"requirements\.txt, src/new\.py, src/tool\.py, theory/accounting\.py"
    assert len(lines) == 3 and re.fullmatch(
        rf"reports/results/one\.json: changed since its commit \w{{7}}: {changed}; "
        "run what made it again",
        lines[0],
    )


def test_an_earlier_run_that_is_kept_has_the_code_of_its_own_commit(project):
    """It is named after its notebook; a result that is not, such as a benchmark's, has to be of the present code."""
    project.result("two_before")
    project.result("benchmark")
    project.write("src/tool.py", "x = 2\n")
    project.commit()
    for name in ("one", "two", "three"):
        project.result(name)
    lines = refused(project)
    assert len(lines) == 1 and re.match(
        r"reports/results/benchmark\.json: changed since its commit", lines[0]
    )
    project.result("benchmark")
    path = submission.build("Ali", "1")
    assert "reports/results/two_before.json" in content(path)
    path.unlink()
    project.result("two_before", commit="a" * 40)
    assert re.match(
        r"reports/results/two_before\.json: its commit 'a+' is not ", refused(project)[0]
    )


def test_it_refuses_a_notebook_that_its_commit_does_not_know(project):
    project.git("rm", "--quiet", "--cached", "notebooks/two.ipynb")
    project.commit()
    project.result("two")
    assert [re.sub(r"\w{7} ", "", line) for line in refused(project)] == [
        "notebooks/two.ipynb: at its result's commit there was no such notebook; run it again"
    ]


def test_a_login_that_is_a_word_of_the_notebook_tells_nothing(project, monkeypatch):
    monkeypatch.setattr(submission.getpass, "getuser", lambda: "ready")
    submission.build("Ali", "1")

    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr(submission.getpass, "getuser", nameless)
    assert submission._machine_names() == {"kitchen.example.org", "kitchen"}


def test_no_path_where_an_address_or_a_word_holds_one(project):
    project.change(outputs=[stream("https://example.org/home/x, kitchens, up/tmp/x")])
    submission.build("Ali", "1")


# --- the stand-in


def test_a_standin_run_goes_only_if_asked_and_marked(project):
    marked = [stream(f"{STANDIN_MARK}: ready")]
    project.result("two", folder="reports/standin", standin=True)
    project.change(outputs=marked, page="reports/standin")
    cell, result = refused(project)
    assert (
        cell.startswith("notebooks/two.ipynb, cell 4: its output is of the stand-in data; ")
        and "ALLOW_STANDIN=1" in cell
    )
    assert result.startswith(
        "reports/standin/results/two.json: a result of the smoke profile or the stand-in data"
    )
    path = submission.build("Ali", "1", allow_standin=True)
    assert path.name == "HW3-Ali-1-STANDIN.zip"
    files = content(path)
    assert "reports/standin/results/two.json" in files and "reports/results/two.json" not in files
    assert "reports/standin/two.html" in files and "reports/two.html" not in files


def test_a_standin_run_of_make_html_takes_the_place_of_a_notebook_that_cannot_go(project):
    project.result("two", folder="reports/standin", standin=True)
    project.change(outputs=[stream(STANDIN_MARK)], path="reports/standin", page="reports/standin")
    assert submission.build("Ali", "1", allow_standin=True).name == "HW3-Ali-1.zip", (
        "the real run goes where there is one"
    )
    (project.root / "HW3-Ali-1.zip").unlink()
    project.change(execution_count=None, outputs=[])
    files = content(submission.build("Ali", "1", allow_standin=True))
    assert STANDIN_MARK.encode() in files["notebooks/two.ipynb"]
    (project.root / "HW3-Ali-1-STANDIN.zip").unlink()
    project.change(source="print('other')", outputs=[], execution_count=None)
    assert [re.sub(r" \w{7};", ";", line) for line in refused(project, allow_standin=True)] == [
        "reports/standin/two.ipynb, cell 4: the code is not the same in notebooks/; run the notebook again"
    ]


def test_a_standin_result_alone_marks_the_archive_too(project):
    project.result("bench", profile="smoke")
    assert submission.build("Ali", "1", allow_standin=True).name == "HW3-Ali-1-STANDIN.zip"


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
    assert submission.archive_stem(name, number) == stem


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
        ("Ali", "12a", "ID='12a' is no student number"),
        ("Ali", "-1", "ID="),
        ("Ali", "1.5", "ID="),
        ("Ali", "²", "ID="),
        ("Ali", "1/2", "ID="),
    ],
)
def test_names_that_do_not_fit(project, capsys, name, number, words):
    assert submission.main(["build", f"--name={name}", f"--id={number}"]) == 1
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
    project.write("reports/models/two_large.pt", bytes(submission.MODEL_LIMIT + 1))
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
    path = submission.build("علی رضا", "12")
    assert "two_large.pt is left out: larger than 8 MB" in capsys.readouterr().out
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
    assert path == project.root / "HW3-علی-رضا-12.zip"
    assert all(
        e.filename.startswith("HW3-علی-رضا-12/") and e.flag_bits & 0x800 and e.compress_type == 8
        for e in entries
    )
    assert {e.external_attr >> 16 for e in entries} == {0o100644} and len(
        {e.date_time for e in entries}
    ) == 1
    assert set(content(path)) == {
        "MANIFEST",
        "README.md",
        "data/README.md",
        "requirements.txt",
        "src/tool.py",
        "tools/run.py",
        "theory/1_all.md",
        "src/accounting.py",
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
    files = content(submission.build("Ali", "1"))
    lines = [line.split(maxsplit=2) for line in files.pop("MANIFEST").decode().splitlines()]
    assert {path: (digest, int(size)) for digest, size, path in lines} == {
        path: (hashlib.sha256(data).hexdigest(), len(data)) for path, data in files.items()
    }


def test_the_same_files_give_the_same_bytes(project):
    first = submission.build("Ali", "1").read_bytes()
    for path in project.root.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            path.chmod(0o755)
            os.utime(path, (10**9, 10**9))
    assert submission.build("Ali", "1").read_bytes() == first


def test_the_pdf_tells_nothing_of_its_making():
    def pdf(first, folder):
        return b"<</ID (node%08d)>> <</Headers [(node%08d)]>> /URI (file://%s/theory/A.md)\nend" % (
            first,
            first + 7,
            folder,
        )

    assert submission.neutral_pdf(pdf(394, b"/tmp")) == (
        b"<</ID (node00000000)>> <</Headers [(node00000001)]>> /URI (../../theory/A.md)      \nend"
    )
    assert submission.neutral_pdf(pdf(402, b"/x/y")) == submission.neutral_pdf(pdf(394, b"/tmp"))
    assert len(submission.neutral_pdf(pdf(1, b""))) == len(pdf(1, b"")), (
        "even the shortest folder leaves room"
    )


def test_an_interrupted_or_failed_writing_leaves_nothing(project, monkeypatch):
    submission.build("Ali", "1").write_bytes(b"the earlier one")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(ProjectError, match=r"cannot write HW3-Ali-1\.zip: No space left on device"):
        submission.build("Ali", "1")
    assert [path.read_bytes() for path in project.root.glob("HW3*")] == [b"the earlier one"]


def test_without_a_browser_the_page_goes_and_a_line_says_how_to_print_it(
    project, monkeypatch, capsys
):
    def no_browser(folder):
        raise ProjectError("no Chromium or Chrome is installed")

    def no_drawing(folder):
        folder.mkdir()
        (folder / "theory.pdf").write_bytes(b"%PDF")
        raise ProjectError("its page images need pdftoppm")

    monkeypatch.setattr(submission, "theory_images", no_drawing)
    assert "reports/theory/theory.pdf" in content(submission.build("Ali", "1"))
    assert "The theory goes as PDF, without page images" in capsys.readouterr().out
    monkeypatch.setattr(submission, "theory_images", no_browser)
    files = content(submission.build("Ali", "1"))
    assert b"3.1b" in files["reports/theory.html"] and not any(
        name.startswith("reports/theory/") for name in files
    )
    out = capsys.readouterr().out
    assert (
        "no Chromium or Chrome is installed" in out
        and "open reports/theory.html in a browser, print it to a PDF file" in out
    )


def test_collaborators(project, capsys):
    def named(collaborators=""):
        return content(submission.build("Ali", "1", collaborators))["theory/SOURCES.md"].decode()

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
        "theory/SOURCES.md has its collaborators filled in already: leave COLLABORATORS out"
    ]


# --- the run elsewhere


def test_compare():
    more = {"gone": METRICS["parameters"], "seeds": METRICS["accuracy"] | {"value": 0.96}}
    stored = {
        "seconds": 60.0,
        "metrics": {name: dict(metric) for name, metric in (METRICS | more).items()},
    }
    again = {
        "seconds": 30.0,
        "metrics": {
            "accuracy": {"value": 0.8199},
            "parameters": {"value": 12.0},
            "training": {"value": 99.0},
            "seeds": {"value": 0.96},
            "extra": {"value": 1.0},
        },
    }
    assert submission.compare(stored, again) == [
        ("accuracy", "0.9", "0.8199", "OUTSIDE 0.82 to 0.95"),
        ("parameters", "12", "12", "equal"),
        ("training", "3", "99", "time, not judged"),
        ("gone", "12", "-", "MISSING"),
        ("seeds", "0.96", "0.96", "within 0.82 to 0.95"),
        ("whole run", "60", "30", "time, not judged"),
        ("extra", "-", "1", "new"),
    ]
    stored["metrics"]["parameters"]["value"] += 1e-6
    stored["metrics"]["gone"]["value"], again["metrics"]["gone"] = 0.0, {"value": 1.0}
    again["metrics"]["accuracy"]["value"] = 0.82
    verdicts = {name: verdict for name, _, _, verdict in submission.compare(stored, again)}
    assert (verdicts["accuracy"], verdicts["gone"]) == ("within 0.82 to 0.95", "DIFFERS")
    assert verdicts["parameters"] == "DIFFERS by 8.3e-06 %"


def test_rerun(project, monkeypatch, capfd):
    (project.root / "pictures").mkdir()
    for variable, value in (
        ("HW3_PROFILE", "gpu"),
        ("HW3_DATA", "pictures"),
        ("HW3_ROOT", str(ROOT)),
        ("PYTHONPATH", str(ROOT)),
    ):
        monkeypatch.setenv(variable, value)
    submission.build("علی رضا", "12")
    assert submission.main(["rerun", f"--python={sys.executable}"]) == 0
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line in ("one", "two", "three")] == [
        "one",
        "three",
        "two",
    ]
    assert re.search(r"^accuracy +0\.9 +0\.91 +within 0\.82 to 0\.95$", out, re.M)
    assert re.search(r"^parameters +12 +13 +DIFFERS by 8\.3 %$", out, re.M)
    assert re.search(r"^whole run +5 +7 +time, not judged$", out, re.M)
    assert "1 of 2 judged metrics agree.\nAnother profile: gpu, stored cpu; " in out
    assert f"Another data_source: {(project.root / 'pictures').resolve()}, stored HW3_DATA; " in out


def test_rerun_tells_of_a_notebook_that_fails(project, monkeypatch, capfd):
    monkeypatch.setenv("HW3_PROFILE", "gpu")
    monkeypatch.setenv("HW3_DATA", "nowhere")
    notebook = nbformat.read(project.root / "notebooks" / "one.ipynb", as_version=4)
    project.save("broken", notebook)
    project.git("add", ".")
    project.commit()
    project.result("broken")
    path = submission.build("Ali", "1")
    assert submission.main(["rerun", f"--zip={path}", f"--python={sys.executable}"]) == 1
    out, err = capfd.readouterr()
    assert "broken FAILED; its error is above." in out and "Error: failed elsewhere: broken" in err
    assert out.count("judged metrics agree") == 3, "the others are run and compared"
    project.write("tools/run.py", "")
    assert submission.rerun(submission.build("Ali", "1"), Path(sys.executable)) == [
        "broken",
        "one",
        "three",
        "two",
    ]
    assert "two FAILED; it wrote no result." in capfd.readouterr().out


def test_rerun_makes_an_environment_of_the_requirements(project, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        submission.venv,
        "create",
        lambda folder, **options: commands.append((folder, options["with_pip"])),
    )
    done = subprocess.CompletedProcess
    monkeypatch.setattr(
        submission.subprocess, "run", lambda words, **_: commands.append(words) or done(words, 0)
    )
    python = submission.make_environment(project.root, tmp_path / "fresh")
    assert commands[0] == (tmp_path / "fresh", True) and python.parent.parent == tmp_path / "fresh"
    assert commands[1][:4] == [python, "-m", "pip", "install"] and commands[1][-2:] == [
        "-r",
        project.root / "requirements.txt",
    ]
    monkeypatch.setattr(submission.subprocess, "run", lambda words, **_: done(words, 1))
    with pytest.raises(ProjectError, match="the requirements cannot be installed"):
        submission.make_environment(project.root, tmp_path / "fresh")


def test_which_archive(project):
    with pytest.raises(ProjectError, match="no archive .* make submission first"):
        submission.find_archive("")
    one = submission.build("Ali", "1")
    assert submission.find_archive("") == one and submission.find_archive("other.zip") == Path(
        "other.zip"
    )
    submission.build("Sara", "2")
    with pytest.raises(ProjectError, match=r"2 archives .*: name one, make rerun ZIP="):
        submission.find_archive("")


@pytest.mark.parametrize(
    "name", ["../x", "HW3-Ali-1/../../x", "/x", "other/x", "x", "HW3-Ali-1\\x"]
)
def test_unpacking_stays_in_one_folder(project, tmp_path, name):
    path = submission.build("Ali", "1")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ProjectError, match=r"HW3-Ali-1\.zip holds .*, outside of one folder"):
        submission.unpack(path, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() and not (tmp_path / "x").exists()


def test_unpacking_what_is_damaged(project, tmp_path):
    path = submission.build("Ali", "1")
    renamed = path.rename(tmp_path / "upload (1).zip")
    assert submission.unpack(renamed, tmp_path / "good") == tmp_path / "good" / "HW3-Ali-1"
    with zipfile.ZipFile(renamed, "a") as archive:
        archive.writestr("HW3-Ali-1/src/more.py", "x")
    with pytest.raises(ProjectError, match="not what its MANIFEST says"):
        submission.unpack(renamed, tmp_path / "more")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "half.zip").write_bytes(renamed.read_bytes()[:100])
    for name, words in (
        ("empty", "not what its MANIFEST says"),
        ("half", "cannot be unpacked"),
        ("none", "cannot be unpacked"),
    ):
        with pytest.raises(ProjectError, match=words):
            submission.unpack(tmp_path / f"{name}.zip", tmp_path / "bad")


# --- what is committed


def test_what_is_committed_can_be_handed_in(tmp_path, monkeypatch):
    """A notebook without any output is not judged: code is committed before its outputs, which tests/test_run.py asks for."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git history here: where the results come from cannot be told")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    monkeypatch.setattr(submission, "ROOT", clone)
    monkeypatch.setattr(results, "ROOT", clone)
    monkeypatch.setattr(notebooks, "FOLDER", clone / "notebooks")
    found = submission.find_runs(False)
    runs = [run for run in found if any(cell.get("outputs") for cell in run.notebook.cells)]
    left_out = ("notebooks: none quotes",) if runs != found or len(runs) < 3 else ()
    assert runs and submission.sources_page("")
    assert [
        line for line in submission.problems(runs, False) if not line.startswith(left_out)
    ] == []
