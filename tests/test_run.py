"""Every notebook run on the stand-in, as `make html` does it; what is kept when one fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from src import ProjectError, results, settings
from src.plotting import STANDIN_MARK
from src.results import load_results
from tools import notebooks, run
from tools.submission import checks

ROOT = Path(__file__).resolve().parent.parent


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def copy_project(folder, *parts):
    for part in parts:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    return folder


def command(folder, *words, **environment):
    """The runner's command line, for a process of its own in a copy of the project."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    return dict(
        args=[sys.executable, "-m", "tools.run", *words],
        cwd=folder,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


# --- the stand-in run, made once for all


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy of the project, all notebooks run; its path holds a space and Persian letters."""
    folder = tmp_path_factory.mktemp("run") / "یادگیری عمیق"
    copy_project(folder, "src", "tools", "notebooks", "theory", "reports/results")
    # A setting with a blank, as a Windows prompt leaves it, must not reach the real results.
    done = subprocess.run(**command(folder, HW3_PROFILE="smoke "))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


@pytest.mark.parametrize("name", notebooks.names())
def test_every_notebook_runs_on_the_standin(smoke, name):
    project, done = smoke
    folder = project / "reports" / "standin"
    executed = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    place = ROOT / "reports" / "standin" / f"{name}.ipynb"
    assert list(checks.order_problems(checks.Run(name, place, executed))) == []
    assert not [output for output in outputs(executed) if output.output_type == "error"]
    stored = load_results(folder / "results" / f"{name}.json")
    kind = {"profile": "smoke", "data_source": "stand-in", "standin": True}
    kind["fingerprint"] = stored["fingerprint"]
    assert {key: stored[key] for key in kind} == kind
    assert executed.metadata["hw3"] == notebooks.about(executed) == kind
    page = (folder / f"{name}.html").read_text(encoding="utf-8")
    assert STANDIN_MARK in page and 'class="omitted"' not in page
    assert "filled in at the end of this run" not in page, "the answers stand at the top"
    alts = [
        o.metadata["image/png"]["alt"]
        for o in outputs(executed)
        if "image/png" in o.get("data", {})
    ]
    theory = "".join(path.read_text(encoding="utf-8") for path in (project / "theory").glob("*.md"))
    measured = [alt for alt in alts if f"![{alt}]" not in theory]
    assert measured and all(STANDIN_MARK in alt for alt in measured)
    assert f"{name}: cell" in done.stderr and "epoch 1 of 2" in done.stderr, (
        "the bar shows notebook, cell and epoch"
    )


@pytest.mark.parametrize("name", notebooks.names())
def test_a_standin_run_touches_neither_notebook_nor_real_results(smoke, name):
    project, _ = smoke
    path = Path("notebooks", f"{name}.ipynb")
    assert (project / path).read_bytes() == (ROOT / path).read_bytes()
    assert not (project / "reports" / f"{name}.html").exists()
    for path in (ROOT / "reports" / "results").iterdir():
        assert (project / "reports" / "results" / path.name).read_bytes() == path.read_bytes()


# --- the runner, on notebooks that a test writes


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project; gives a function that writes a notebook of (source, *tags) cells."""
    for module in (run, results, settings):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    monkeypatch.setattr(run, "theory_to_html", lambda out: None)
    notebooks.FOLDER.mkdir()

    def write(name, *cells):
        nb = nbformat.v4.new_notebook()
        for source, *tags in cells:
            nb.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
        nbformat.write(nb, notebooks.FOLDER / f"{name}.ipynb")

    return write


def about(**values):
    """A cell that says of its run what `session.start` says."""
    kind = {"profile": "cpu", "data_source": "data/", "standin": False, "fingerprint": "1"} | values
    return [f"from IPython.display import display\ndisplay('x', metadata={{'hw3': {kind}}})"]


def test_a_failing_cell_is_named_and_what_ran_before_it_is_kept(project, tmp_path, capsys):
    project("broken", ["print('an hour')"], ["1 / 0"], ["never = True"])
    before = (notebooks.FOLDER / "broken.ipynb").read_bytes()
    message = "broken, cell 2 failed: ZeroDivisionError: division by zero. What ran before is in "
    with pytest.raises(ProjectError, match=message + "reports/unfinished/broken.ipynb"):
        run.run("broken")
    assert (notebooks.FOLDER / "broken.ipynb").read_bytes() == before
    kept = nbformat.read(tmp_path / "reports" / "unfinished" / "broken.ipynb", as_version=4)
    assert [o.output_type for o in outputs(kept)] == ["stream", "error"]
    assert "1 / 0" in capsys.readouterr().err


def test_what_has_run_is_kept_whatever_fails_later(project, tmp_path, capsys):
    project("a", about(), ["import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"])
    project("b", ["1 / 0"])
    project("c", about(), ["print('after the failure')"])
    assert run.main([]) == 1
    out, err = capsys.readouterr()
    assert "a.ipynb, cell 2: a picture without alt text" in out
    assert "Error: b, cell 1 failed" in err and err.rstrip().endswith("All else is written.")
    for name in "ac":
        assert outputs(notebooks.read(name))
        assert (tmp_path / "reports" / f"{name}.html").is_file()
    assert not (tmp_path / "reports" / "b.html").exists()


def test_a_page_that_cannot_be_made_costs_no_outputs(project, tmp_path, capsys):
    project("a", about(), ["print(1)"])
    notebook = notebooks.read("a")
    notebook.cells.append(nbformat.v4.new_markdown_cell("![](figure.png)"))
    nbformat.write(notebook, notebooks.FOLDER / "a.ipynb")
    assert run.main(["a"]) == 1
    assert "Error: a.ipynb, cell 3: the image figure.png does not exist" in capsys.readouterr().err
    assert len(outputs(notebooks.read("a"))) == 2


def test_whatever_a_page_stumbles_over_the_other_notebooks_run(project, monkeypatch, capsys):
    def stumble(path, page, real=run.notebook_to_html):
        return 1 / 0 if path.stem == "a" else real(path, page)

    monkeypatch.setattr(run, "notebook_to_html", stumble)
    for name in "ab":
        project(name, about(), ["print(1)"])
    assert run.main([]) == 1
    error = "Error: a: its page cannot be made (ZeroDivisionError: division by zero)."
    assert error in capsys.readouterr().err
    assert all(len(outputs(notebooks.read(name))) == 2 for name in "ab")


@pytest.mark.parametrize(
    "kind, notebook, page",
    [
        ({}, "notebooks", "reports"),
        ({"profile": "gpu_full"}, "notebooks", "reports"),
        ({"profile": "demo"}, "reports/demo", "reports/demo"),
        ({"profile": "demo", "standin": True}, "reports/standin", "reports/standin"),
        ({"profile": "smoke"}, "reports/standin", "reports/standin"),
    ],
)
def test_where_a_run_goes(project, tmp_path, kind, notebook, page):
    project("a", about(**kind))
    before = (notebooks.FOLDER / "a.ipynb").read_bytes()
    assert run.main(["a"]) == 0
    written = nbformat.read(tmp_path / notebook / "a.ipynb", as_version=4)
    assert written.metadata["hw3"]["profile"] == kind.get("profile", "cpu")
    assert (tmp_path / page / "a.html").is_file()
    assert ((notebooks.FOLDER / "a.ipynb").read_bytes() == before) == (notebook != "notebooks")
    assert not (tmp_path / "reports" / "unfinished").exists()


def test_a_smoke_run_of_a_notebook_that_says_nothing_leaves_it_alone(project, monkeypatch):
    monkeypatch.setenv("HW3_PROFILE", "smoke ")
    project("a", ["print(1)"])
    assert run.main(["a"]) == 0 and not outputs(notebooks.read("a"))


def test_a_killed_run_keeps_what_ran(tmp_path):
    copy_project(tmp_path, "src", "tools")
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(x) for x in ("print('kept')", "import time; time.sleep(99)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "a.ipynb")
    kept = tmp_path / "reports" / "unfinished" / "a.ipynb"
    with subprocess.Popen(**command(tmp_path)) as process:
        try:
            for _ in range(600):
                if kept.is_file() or process.poll() is not None:
                    break
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
    assert [o.text for o in outputs(nbformat.read(kept, as_version=4))] == ["kept\n"]


def test_an_interrupted_run_keeps_what_ran_and_starts_nothing_more(tmp_path):
    copy_project(tmp_path, "src", "tools")
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(x) for x in ("print('kept')", "import time; time.sleep(99)")]
    for name in "ab":
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    kept = tmp_path / "reports" / "unfinished" / "a.ipynb"
    with subprocess.Popen(**command(tmp_path)) as process:
        for _ in range(600):
            if kept.is_file() or process.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(1)  # into the cell that waits
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "a: interrupted; what ran is in" in errors, errors
    assert outputs(nbformat.read(kept, as_version=4))[0].text == "kept\n"
    assert [path.name for path in kept.parent.iterdir()] == ["a.ipynb"], "b is not run"


def test_a_copy_that_cannot_be_written_does_not_end_the_run(project, tmp_path):
    (tmp_path / "reports").write_text("in the way, as a full disk is")
    project("a", about(), ["print('an hour')"])
    assert outputs(run.run("a"))[-1].text == "an hour\n"
    assert run.main(["a"]) == 1, "there is no page"
    assert outputs(notebooks.read("a"))[-1].text == "an hour\n"


@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["nosuch"], {}, "Error: There is no notebook 'nosuch'; there are: a."),
        ([], {"HW3_PROFILE": "smok"}, "Error: HW3_PROFILE='smok' is not one of"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_runs(
    project, monkeypatch, capsys, words, environment, message
):
    project("a", ["print(1)"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_a_kernelspec_that_leads_elsewhere_does_not_matter(project, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    broken = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "Gone"}
    (spec / "kernel.json").write_text(json.dumps(broken | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    project("a", ["import sys; print(sys.executable)"])
    notebook = notebooks.read("a")
    notebook.metadata["kernelspec"] = {"name": "removed-environment", "display_name": "Gone"}
    nbformat.write(notebook, notebooks.FOLDER / "a.ipynb")
    assert [o.text.strip() for o in outputs(run.run("a"))] == [sys.executable]


def test_a_kernel_starts_in_the_folder_that_is_asked_for(project, tmp_path):
    """`make robustness` runs every notebook from several folders."""
    project("a", ["from pathlib import Path; print(Path.cwd().name)"])
    (tmp_path / "elsewhere").mkdir()
    for folder, name in ((None, "notebooks"), (tmp_path / "elsewhere", "elsewhere")):
        assert [o.text.strip() for o in outputs(run.run("a", folder))] == [name]


def test_an_environment_without_a_kernel_is_one_line(project, monkeypatch):
    project("a", ["1"])
    monkeypatch.setattr(
        run, "get_kernel_dict", lambda _: {"argv": [sys.executable, "-c", "exit(3)"]}
    )
    with pytest.raises(ProjectError, match="a, no kernel .* pip install ipykernel"):
        run.run("a")


def test_an_output_that_is_updated_shows_its_last_state(project):
    project(
        "a",
        ["from IPython.display import Markdown, display"],
        ["h = display(Markdown('?'), display_id=True)"],
        ["h.update(Markdown('42'), metadata={'voice': 'measured'})"],
    )
    (output,) = outputs(run.run("a"))
    assert output.data["text/markdown"] == "42" and output.metadata == {"voice": "measured"}


def test_progress_bars_are_shown_but_not_stored(project, capsys):
    bar = (
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(3), desc='toy: epoch 1 of 1', leave=False): pass\nprint('done')"
    )
    project("bar", [bar])
    (cell,) = run.run("bar").cells
    assert [output.text for output in cell.outputs] == ["done\n"]
    assert "toy: epoch 1 of 1" in capsys.readouterr().err


def test_the_users_folder_is_not_named(project):
    project("a", about(), ["from pathlib import Path; print(Path.home() / '.cache' / 'x')"])
    assert run.main(["a"]) == 0
    assert outputs(notebooks.read("a"))[-1].text.strip() == str(Path("~", ".cache", "x"))


def test_text_that_utf8_cannot_hold_is_written_all_the_same(project, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("a \ud800")])
    notebooks.write(notebook, tmp_path / "a.ipynb")
    assert nbformat.read(tmp_path / "a.ipynb", as_version=4).cells[0].source == "a ?"


# --- reading notebooks


def test_definitions_are_the_tagged_cells_only(project):
    project(
        "toy",
        ["import math", "define"],
        ["def area(r):\n    return math.pi * r * r", "define"],
        ["raise SystemExit"],
    )
    module = notebooks.definitions("toy")
    assert module.area(1) == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    "source", ["print('hello')", "for i in range(3):\n    x = i", "x = 1\nx += 1"]
)
def test_a_tagged_cell_may_only_define(project, source):
    project("toy", [source, "define"])
    with pytest.raises(ProjectError, match="toy, cell 1, line .: a cell tagged `define` may only"):
        notebooks.definitions("toy")


@pytest.mark.parametrize("text", ['{"cells": [', "[]", "null", "{}", '{"nbformat": 4}', "\0"])
def test_what_is_not_a_notebook_is_one_line(project, text):
    project("toy", ["x = 1"])
    (notebooks.FOLDER / "half.ipynb").write_text(text)
    with pytest.raises(ProjectError, match="half.ipynb is not a readable notebook") as error:
        notebooks.read("half")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "where",
    [
        *("project", "notebooks", "elsewhere"),
        *("elsewhere, with HW3_ROOT", "elsewhere, with HW3_ROOT and blanks"),
    ],
)
def test_the_first_cell_finds_the_project(where, tmp_path):
    code = next(
        cell.source
        for cell in notebooks.read("transfer_learning").cells
        if cell.cell_type == "code"
    )
    folder = {"project": ROOT, "notebooks": ROOT / "notebooks"}.get(where, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")} | (
        {"HW3_ROOT": f' "{ROOT}" ' if "blanks" in where else str(ROOT)}
        if "HW3_ROOT" in where
        else {}
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport src; print(src.ROOT)"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if where == "elsewhere":
        assert done.returncode and "set HW3_ROOT to it" in done.stderr
    else:
        assert done.stdout.strip() == str(ROOT), done.stderr
