"""Every notebook, run top to bottom on the stand-in, the way `make html` does it; and what is committed of the real run."""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from src import ProjectError
from src.plotting import STANDIN_MARK
from src.results import load_results
from tools import notebooks, run
from tools.notebooks import names

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("cross_entropy", "triplet", "joint", "triplet_batch_hard")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def alt_texts(notebook):
    return [
        o.metadata["image/png"]["alt"]
        for o in outputs(notebook)
        if "image/png" in o.get("data", {})
    ]


def check_order(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "cells were not run once each, top to bottom"
    assert not any(output.output_type == "error" for output in outputs(notebook))


def check_numbers(notebook, stored):
    """Holds the numbers that figures, tables and prose show against the results file."""
    metrics, alts = stored["metrics"], alt_texts(notebook)
    text = "\n".join(
        o.data["text/markdown"] for o in outputs(notebook) if "text/markdown" in o.get("data", {})
    )
    for method in METHODS:
        metric = metrics[f"{method}.test_accuracy"]
        errors = round((1 - metric["value"]) * metric["n"])
        low, high = metric["ci95"]
        assert (
            f"| {metric['value']:.2%} | {low:.2%} to {high:.2%} | {errors} of {metric['n']} |"
            in text
        ), method
        assert (
            f"{100 * metric['value']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}, n = {metric['n']})"
            in text
        )
        assert low <= metric["value"] <= high
    confusion = next(alt for alt in alts if "Confusion matrices" in alt)
    counts = re.findall(
        r"(\d+) airplanes called automobile, (\d+) automobiles called airplane", confusion
    )
    assert [sum(map(int, pair)) for pair in counts] == [
        round((1 - metrics[f"{m}.test_accuracy"]["value"]) * metrics[f"{m}.test_accuracy"]["n"])
        for m in METHODS
    ]
    curves = stored["curves"]
    shown = {}
    for alt in (alt for alt in alts if "against epochs" in alt):
        shown |= {
            alt: [float(x) for x in re.findall(r"(\d+\.\d+) in the (?:first epoch|last)", alt)]
        }
    stored_values = [
        [round(row[column], 3) for row in (history["epochs"][0], history["epochs"][-1])]
        for history in curves.values()
        for column in history["epochs"][0]
        if column != "seconds"
    ]
    assert (
        len(shown) == len(curves) - 1
    )  # batch-hard mining is drawn behind the training it goes on from
    continued = next(alt for alt in alts if "continued by batch-hard mining" in alt)
    assert re.findall(
        r"validation: (\S+) after the last epoch of random triplets, (\S+) after batch-hard mining",
        continued,
    ) == [
        tuple(
            f"{curves[name]['epochs'][-1][column]:.3f}"
            for name in ("triplet", "triplet_batch_hard")
        )
        for column in ("val_loss", "val_right_order")
    ]
    for alt, values in shown.items():
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        assert pairs and all(pair in stored_values for pair in pairs), alt
    for history in curves.values():
        losses = [row["val_loss"] for row in history["epochs"]]
        assert history["best_epoch"] == losses.index(min(losses)) + 1


# --- the stand-in run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy of the project in a folder with a space and Persian letters, all notebooks run there."""
    project = tmp_path_factory.mktemp("run") / "یادگیری عمیق"
    for part in ("src", "tools", "notebooks", "theory", "reports/results"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")} | {
        "HW3_PROFILE": "smoke"
    }
    done = subprocess.run(
        [sys.executable, "-m", "tools.run"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return project, done


@pytest.mark.parametrize("name", names())
def test_every_notebook_runs_on_the_standin(smoke, name):
    project, done = smoke
    folder = project / "reports" / "standin"
    executed = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    check_order(executed)
    theory = "".join(path.read_text(encoding="utf-8") for path in (project / "theory").glob("*.md"))
    measured = [
        alt for alt in alt_texts(executed) if f"![{alt}]" not in theory
    ]  # a figure of the theory shows no data
    assert measured and all(STANDIN_MARK in alt for alt in measured)
    assert STANDIN_MARK in (folder / f"{name}.html").read_text(encoding="utf-8")
    stored = load_results(folder / "results" / f"{name}.json")
    assert (
        stored["profile"] == "smoke"
        and stored["data_source"] == "stand-in"
        and stored["standin"] is True
    )
    assert f"{name}: cell" in done.stderr and "epoch 1 of 2" in done.stderr, (
        "the bar shows notebook, cell and epoch"
    )


@pytest.mark.parametrize("name", names())
def test_a_standin_run_touches_neither_notebook_nor_real_results(smoke, name):
    project, _ = smoke
    assert (project / "notebooks" / f"{name}.ipynb").read_bytes() == (
        ROOT / "notebooks" / f"{name}.ipynb"
    ).read_bytes()
    assert not (project / "reports" / f"{name}.html").exists()
    for path in (ROOT / "reports" / "results").iterdir():
        assert (project / "reports" / "results" / path.name).read_bytes() == path.read_bytes()


def test_transfer_learning_shows_the_numbers_it_stored(smoke):
    folder = smoke[0] / "reports" / "standin"
    executed = nbformat.read(folder / "transfer_learning.ipynb", as_version=4)
    check_numbers(executed, load_results(folder / "results" / "transfer_learning.json"))
    assert {path.stem for path in (folder / "models").glob("transfer_learning_*")} == {
        f"transfer_learning_{m}" for m in METHODS
    }


# --- the runner


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose notebooks a test writes itself."""
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)

    def write(name, *cells):
        nb = nbformat.v4.new_notebook()
        for source, *tags in cells:
            nb.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
        nbformat.write(nb, tmp_path / f"{name}.ipynb")

    return write


def test_a_failing_cell_is_named(project, tmp_path, capsys):
    project("broken", ["x = 1"], ["1 / 0"], ["never = True"])
    before = (tmp_path / "broken.ipynb").read_bytes()
    with pytest.raises(
        ProjectError, match="broken, cell 1 failed: ZeroDivisionError: division by zero"
    ):
        run.run("broken", tmp_path)
    assert (tmp_path / "broken.ipynb").read_bytes() == before
    assert "1 / 0" in capsys.readouterr().err


def test_outputs_of_one_notebook_are_no_changes_to_the_next(project, tmp_path):
    for part in ("src", "tools"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in {"a": "", "b": "", "c": "1 / 0\n"}.items():
        project(
            name,
            [
                source
                + "import sys; sys.path.insert(0, '..')\nfrom src.results import commit\nprint(commit())"
            ],
        )
    (tmp_path / "notebooks").mkdir()
    for path in tmp_path.glob("*.ipynb"):
        path.rename(tmp_path / "notebooks" / path.name)

    def git(*words):
        words = ("git", "-c", "user.name=A", "-c", "user.email=a@b.c", *words)
        return subprocess.run(
            words, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    def run_all():
        return subprocess.run(
            [sys.executable, "-m", "tools.run"], cwd=tmp_path, capture_output=True, text=True
        )

    def printed():
        return [
            outputs(nbformat.read(tmp_path / "notebooks" / f"{name}.ipynb", as_version=4))
            for name in "abc"
        ]

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "Toys")
    done = run_all()
    assert done.returncode == 1 and "Error: c, cell 0 failed" in done.stderr
    assert "changes since the last commit" not in done.stdout
    head = git("rev-parse", "HEAD") + "\n"
    a, b, c = printed()
    assert [o.text for o in a] == [o.text for o in b] == [head] and not c, (
        "what ran before the failing one is kept"
    )
    assert "changes since the last commit" in run_all().stdout, "told before the run, not after it"
    assert [o.text for o in printed()[0]] == [head.strip() + "+changes\n"]


def test_progress_bars_are_shown_but_not_stored(project, tmp_path, capsys):
    bar = "from tqdm import tqdm\nfor _ in tqdm(range(3), desc='toy: epoch 1 of 1', leave=False): pass\nprint('done')"
    project("bar", [bar])
    (cell,) = run.run("bar", tmp_path).cells
    assert [output.text for output in cell.outputs] == ["done\n"]
    assert "toy: epoch 1 of 1" in capsys.readouterr().err


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
    with pytest.raises(
        ProjectError, match="toy, cell 0, line .: a cell tagged `define` may only define"
    ):
        notebooks.definitions("toy")


def test_unknown_and_broken_notebooks(project, tmp_path):
    project("toy", ["x = 1"])
    with pytest.raises(ProjectError, match="no notebook 'toi'; there are: toy"):
        notebooks.read("toi")
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    with pytest.raises(ProjectError, match="half.ipynb is not a readable notebook"):
        notebooks.read("half")


@pytest.mark.parametrize("where", ["project", "notebooks", "elsewhere, with HW3_ROOT", "elsewhere"])
def test_the_first_cell_finds_the_project(where, tmp_path):
    code = next(
        cell.source
        for cell in notebooks.read("transfer_learning").cells
        if cell.cell_type == "code"
    )
    folder = {"project": ROOT, "notebooks": ROOT / "notebooks"}.get(where, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")} | (
        {"HW3_ROOT": str(ROOT)} if "HW3_ROOT" in where else {}
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport src; print(src.ROOT)"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if where == "elsewhere":
        assert done.returncode and "set HW3_ROOT to it, or start Jupyter inside it" in done.stderr
    else:
        assert done.stdout.strip() == str(ROOT), done.stderr


# --- what is committed


@pytest.fixture(params=names())
def committed(request):
    path = ROOT / "notebooks" / f"{request.param}.ipynb"
    return (
        path,
        nbformat.read(path, as_version=4),
        load_results(ROOT / "reports" / "results" / f"{request.param}.json"),
    )


def test_committed_notebooks_were_run_on_the_real_data(committed):
    path, notebook, stored = committed
    check_order(notebook)
    assert not run.is_standin(notebook)
    assert (
        stored["profile"] == "cpu"
        and stored["standin"] is False
        and not stored["commit"].endswith("+changes")
    )
    assert path.stat().st_size < 6_000_000


def test_the_readme_tells_how_long_it_took(committed):
    _, _, stored = committed
    assert f"{stored['seconds'] / 60:.1f} minutes on {stored['machine']}" in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


def test_committed_outputs_show_no_machine_path(committed):
    text = json.dumps(
        [
            dict(output)
            for output in outputs(committed[1])
            if "image/png" not in output.get("data", {})
        ]
    )
    assert not re.search(r"/(work|root|tmp|home|Users)/", text)


def source_digest(*paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def test_committed_pages_come_from_the_committed_notebooks(committed):
    path, notebook, _ = committed
    page = (ROOT / "reports" / f"{path.stem}.html").read_text(encoding="utf-8")
    assert f'<meta name="source-sha256" content="{source_digest(path)}">' in page
    assert all(html.escape(alt) in page for alt in alt_texts(notebook))


def test_committed_theory_page_comes_from_the_committed_answers():
    page = (ROOT / "reports" / "theory.html").read_text(encoding="utf-8")
    assert source_digest(*sorted((ROOT / "theory").glob("[0-9]*.md"))) in page


def test_committed_transfer_learning_shows_its_numbers_and_meets_its_bars():
    notebook = nbformat.read(ROOT / "notebooks" / "transfer_learning.ipynb", as_version=4)
    stored = load_results(ROOT / "reports" / "results" / "transfer_learning.json")
    check_numbers(notebook, stored)
    assert stored["seconds"] <= 1800
    for method in METHODS:
        assert stored["metrics"][f"{method}.test_accuracy"]["value"] >= 0.992


def test_committed_change_detection_shows_its_numbers_and_meets_its_bars():
    notebook = nbformat.read(ROOT / "notebooks" / "detect_change.ipynb", as_version=4)
    stored = load_results(ROOT / "reports" / "results" / "detect_change.json")
    metrics = stored["metrics"]
    text = "\n".join(
        o.data["text/markdown"] for o in outputs(notebook) if "text/markdown" in o.get("data", {})
    )
    for prefix in (
        "test",
        "test.network",
        "test.classical",
        "subtle",
        "subtle.network",
        "subtle.classical",
    ):
        value = {
            key: metrics[f"{prefix}.{key}"]["value"]
            for key in ("per_label_accuracy", "exact_match", "false_alarm_rate")
        }
        assert "| " + " | ".join(f"{number:.2%}" for number in value.values()) + " |" in text, (
            prefix
        )
    kept = load_results(ROOT / "reports" / "results" / "detect_change_other_machine.json")
    assert kept["config"] == stored["config"] and kept["seeds"] == stored["seeds"], (
        "shown side by side, they must be comparable"
    )
    for i in range(5):
        here, there = (
            [
                run["metrics"][f"ablation_{i}.{key}"]["value"]
                for key in ("val_estimate_loss", "val_accuracy")
            ]
            for run in (stored, kept)
        )
        assert (
            f"| {here[0]:.4f} | {here[1]:.2%} | " in text
            and f" min | {there[0]:.4f} | {100 * there[1]:.2f} % |" in text
        )
    for prefix in ("test", "subtle"):
        for key in (
            "displacement_error_px",
            "rotation_error_deg",
            "scale_error_pct",
            "network_loss",
        ):
            low, high = metrics[f"{prefix}.{key}"]["ci95"]
            assert low < metrics[f"{prefix}.{key}"]["value"] < high, key
    assert stored["seconds"] <= 2400
    assert metrics["test.exact_match"]["n"] >= 2000 and metrics["subtle.exact_match"]["n"] >= 2000
    assert (
        metrics["test.per_label_accuracy"]["value"] >= 0.992
        and metrics["test.exact_match"]["value"] >= 0.975
    )
    assert metrics["test.false_alarm_rate"]["value"] <= 0.02
    assert metrics["subtle.per_label_accuracy"]["value"] >= 0.9
    for name in ("second_image", "sharpness_among_changed"):
        for change in ("displacement", "rotation"):
            low, high = metrics[f"giveaway.{name}.{change}"]["ci95"]
            assert low <= 0.5 <= high, "nothing but the change itself may tell it"


def test_committed_deformable_convolution_shows_its_numbers():
    notebook = nbformat.read(ROOT / "notebooks" / "deformable_convolution.ipynb", as_version=4)
    stored = load_results(ROOT / "reports" / "results" / "deformable_convolution.json")
    metrics = stored["metrics"]
    text = "\n".join(
        o.data["text/markdown"] for o in outputs(notebook) if "text/markdown" in o.get("data", {})
    )
    variants = notebooks.definitions("deformable_convolution").VARIANTS
    assert len(variants) >= 10 and len(stored["seeds"]) >= 3 and stored["seconds"] <= 1800
    for key, variant in variants.items():
        shown = []
        for name, scale in (("accuracy", 100), ("mask_iou", 100), ("loss", 1)):
            for role in ("train", "test"):
                metric = metrics[f"{key}.{role}_{name}"]
                half = scale * (metric["ci95"][1] - metric["ci95"][0]) / 2
                digits = 1 if scale == 100 else 2
                shown.append(f"{scale * metric['value']:.{digits}f} ± {half:.{digits}f}")
                assert metric["n"] == len(stored["seeds"])
        assert f"| {variant.title} | " + " | ".join(shown) + " |" in text, key
    assert metrics["zero.test_accuracy"]["value"] == pytest.approx(
        metrics["plain.test_accuracy"]["value"], abs=0.03
    )
    for name in (
        "plain.test_accuracy",
        "deformable.test_accuracy",
        "plain.test_mask_iou",
        "deformable.test_mask_iou",
        "rotation_gain",
        "mask_iou_gain",
    ):
        assert metrics[name]["ci95"][0] <= metrics[name]["value"] <= metrics[name]["ci95"][1], name
    assert metrics["deformable.test_mask_iou"]["value"] - metrics["plain.test_mask_iou"][
        "value"
    ] == pytest.approx(metrics["mask_iou_gain"]["value"])
