"""The runner, on small notebooks: what is kept, what is said, and in which kernel they run."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from src import ROOT, ProjectError
from tools import notebooks, run

WAIT = "print('kept')", "import time; time.sleep(99)"
BAR = """
from tqdm import tqdm
import sys, warnings
for _ in tqdm(range(3), desc="toy: epoch 1", leave={leave}): pass
print("a\\nb")
print("Warning: old driver", file=sys.stderr)
"""


@pytest.fixture
def project(tmp_path):
    """A project of its own; gives a function that writes a notebook of code and text (`# ...`)."""

    def write(name, *cells):
        made = []
        for text in cells:
            stale = new_code_cell(text, execution_count=9)
            made.append(new_markdown_cell(text) if text.startswith("#") else stale)
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=made), path)
        return path

    return write


def banner(**values):
    """A cell that says of its run what `src.run.start` says."""
    kind = {"profile": "cpu", "data_source": "data/", "standin": False} | values
    return f"from IPython.display import display\ndisplay(0, metadata={{'hw3': {kind}}})"


def outputs(path):
    return [output for cell in notebooks.read(path).cells for output in cell.get("outputs", [])]


def texts(path):
    return [output.text for output in outputs(path) if output.output_type == "stream"]


def unfinished(path):
    return path.parent.parent / run.UNFINISHED / path.name


def start(folder, **environment):
    """The runner in a process of its own, for the project in `folder`."""
    # A shell's background jobs, these tests perhaps, ignore Ctrl-C and hand that on.
    code = "import pathlib, signal, tools.run; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"exit(tools.run.main([], pathlib.Path({str(folder)!r})))"
    options = {"cwd": ROOT, "env": os.environ | environment, "stdout": -1, "stderr": -1}  # pipes
    return subprocess.Popen([sys.executable, "-c", code], **options)


def test_a_run_is_stored_with_its_page_and_the_theorys(project, tmp_path, capsys):
    path = project("a", "# Title", "## One", banner(), "## Two", "print('été …')")
    assert run.main([], tmp_path) == 0
    assert texts(path) == ["été …\n"] and not unfinished(path).exists()
    assert [cell.get("execution_count") for cell in notebooks.read(path).cells[2::2]] == [1, 2]
    assert "été …" in (tmp_path / "reports" / "a.html").read_text(encoding="utf-8")
    lines = re.sub(r"\d+ s|/\S+/", "", capsys.readouterr().out)
    assert lines == "a, : One\na, : Two\na: wrote a.html\ntheory: wrote theory.html\n"


@pytest.mark.parametrize(
    "kind, folder",
    [
        ({"profile": "gpu"}, None),
        ({"profile": "demo"}, "demo"),
        ({"standin": True}, "standin"),
        ({"profile": "smoke"}, "standin"),
        (None, "standin"),
    ],
)
def test_where_a_run_goes(project, tmp_path, kind, folder):
    path = project("a", "1" if kind is None else banner(**kind))
    before = path.read_bytes()
    assert run.main(["a"], tmp_path) == 0
    reports = tmp_path / "reports" / (folder or "")
    assert (reports / "a.html").is_file() and (path.read_bytes() == before) == bool(folder)
    assert outputs(reports / "a.ipynb" if folder else path)


def test_whatever_fails_is_named_and_the_others_run(project, tmp_path, capsys):
    broken = project("a", "## One", "print('an hour')", "raise ValueError('bad\\nvalue')", "1")
    dead = project("b", "print('kept')", "import os; os._exit(7)")
    fine = project("c", banner())
    before = broken.read_bytes()
    assert run.main(["a", "b", "nosuch", "c"], tmp_path) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"Error: a, cell 3 (One): ValueError: bad value; what ran is in {unfinished(broken)}",
        "Error: b, cell 2 (beginning): the kernel died (status 7); memory may be short; "
        f"what ran is in {unfinished(dead)}",
        f"Error: There is no notebook 'nosuch' in {broken.parent}; it has: a, b, c.",
    ]
    assert broken.read_bytes() == before and texts(unfinished(broken)) == ["an hour\n"]
    assert outputs(unfinished(broken))[-1].output_type == "error"
    assert notebooks.read(unfinished(broken)).cells[-1].execution_count is None
    assert texts(unfinished(dead)) == ["kept\n"] and outputs(fine)
    assert (tmp_path / "reports" / "theory.html").is_file()


def test_a_page_that_cannot_be_made_costs_no_outputs(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "notebook_to_html", lambda *_: 1 / 0)
    path = project("a", banner(), "print(1)")
    assert run.main(["a"], tmp_path) == 1 and texts(path) == ["1\n"]
    assert "Error: a: ZeroDivisionError('division by zero')" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_ran_and_starts_nothing_more(project, tmp_path, number):
    kept, other = (unfinished(project(name, *WAIT)) for name in "ab")
    with start(tmp_path) as process:
        while not kept.is_file() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)  # into the cell that waits
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.startswith(b"a: interrupted; what ran is in")
    assert errors.count(b"\n") == 1 and texts(kept) == ["kept\n"] and not other.exists()


def test_a_log_is_plain_lines_in_any_code_page(project, tmp_path):
    project("a", "## Über …", BAR.format(leave=False), banner())
    project("b", "raise ValueError('naïve …')")
    with start(tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0") as process:
        out, errors = process.communicate(timeout=120)
    assert b"\r" not in out + errors and out.count(b"\n") == 3 and process.returncode == 1
    assert b"a, 1 s: ?ber ?" in re.sub(rb"\d+ s", b"1 s", out) and b"ValueError: na?ve ?" in errors


@pytest.mark.parametrize("leave", [True, False])
def test_progress_bars_are_not_stored_but_warnings_are(project, tmp_path, leave):
    path = project("a", banner(), BAR.format(leave=leave))
    assert run.main(["a"], tmp_path) == 0
    assert sorted(texts(path)) == ["Warning: old driver\n", "a\nb\n"]


def test_an_update_reaches_its_output(project, tmp_path):
    cell = "import sys; from IPython.display import display\n"
    cell += "for s in (sys.stdout, sys.stderr, sys.stdout): print(1, file=s, flush=True)\n"
    path = project("a", banner(), f"{cell}h = display('?', display_id=True)", "h.update('42')")
    assert run.main(["a"], tmp_path) == 0
    assert [o.data["text/plain"] for o in outputs(path) if "data" in o] == ["0", "'42'"]


def test_the_kernel_is_of_this_environment_and_this_project(project, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    broken = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "Gone"}
    spec.write_text(json.dumps(broken | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("HW3_ROOT", "/another/copy")
    code = (
        f"import os, sys; print(sys.executable == {sys.executable!r}, os.environ.get('HW3_ROOT'))"
    )
    path = project("a", banner(), code, "print(os.getcwd(), os.path.expanduser('~/.cache'))")
    assert run.main(["a"], tmp_path) == 0
    folder = str(path.parent).replace(str(Path.home()), "~")
    assert texts(path) == ["True None\n", f"{folder} {Path('~', '.cache')}\n"]


@pytest.mark.parametrize("case", ["slow machine", "no ipykernel"])
def test_a_kernel_that_does_not_start_is_told_by_its_cause(
    project, tmp_path, monkeypatch, capsys, case
):
    project("a", "1")
    if case == "slow machine":
        script = tmp_path / "profile_default" / "startup" / "slow.py"
        script.parent.mkdir(parents=True)
        script.write_text("import time; time.sleep(30)")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
        monkeypatch.setattr(run, "STARTUP", 2)
    else:
        monkeypatch.setitem(sys.modules, "ipykernel.kernelspec", None)
        monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert run.main(["a"], tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: a: the kernel did not start: ")
    assert ("Kernel didn't respond in 2 seconds" in error) == (case == "slow machine")
    assert ("pip install ipykernel" in error) == (case == "no ipykernel")


# --- reading notebooks ----------------------------------------------------------------------------
def test_what_is_not_a_notebook_is_one_line(tmp_path):
    for text in ('{"cells": [', "[]", '{"nbformat": 4}', "\0"):
        (tmp_path / "half.ipynb").write_text(text)
        with pytest.raises(ProjectError, match="half.ipynb is not a readable notebook") as error:
            notebooks.read(tmp_path / "half.ipynb")
        assert "\n" not in str(error.value)


def test_cells_that_are_imported_only_define():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for name in notebooks.names():
        for cell in notebooks.read(name).cells:
            if "define" in cell.metadata.get("tags", []):
                assert all(isinstance(x, allowed) for x in ast.parse(cell.source).body), cell.source
