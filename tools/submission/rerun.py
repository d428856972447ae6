"""The run elsewhere: unpack an archive, make a fresh environment, run, compare every number."""

import math
import os
import re
import subprocess
import tempfile
import venv
import zipfile
import zlib
from pathlib import Path

from src import ROOT, ProjectError, results, settings
from tools.submission.archive import manifest

TIME = re.compile(r"second|minute|hour")


def find_archive(given: str) -> Path:
    """Find the archive that was named, or the one in the project's folder."""
    found = [Path(given)] if given else sorted(ROOT.glob("HW3-*.zip"))
    if len(found) != 1:
        raise ProjectError(
            f"{len(found)} archives HW3-*.zip in the project's folder: make submission first, or "
            "name one, make rerun ZIP=…"
        )
    return found[0]


def unpack(path: Path, folder: Path) -> Path:
    """Unpack an archive and check that it is one folder and what its manifest says.

    Args:
        path: The archive.
        folder: An empty folder.

    Returns:
        The project's folder in it.

    Raises:
        ProjectError: The file cannot be read, or differs from its manifest.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # never outside of it, whatever the names
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ProjectError(f"{path.name} cannot be unpacked: {error}") from error
    tops, files = list(folder.glob("*")), {}
    for file in folder.rglob("*"):
        if file.is_file():
            files[file.relative_to(folder).as_posix().partition("/")[2]] = file.read_bytes()
    if len(tops) != 1 or files.pop("MANIFEST", None) != manifest(files):
        raise ProjectError(f"{path.name} is not what its MANIFEST says")
    return tops[0]


def make_environment(project: Path, folder: Path) -> Path:
    """Make a fresh environment with a project's requirements and give its interpreter.

    It takes the versions of the committed results, as `constraints.txt` names them for one version
    of Python.
    """
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-r", project / "requirements.txt"]
    if subprocess.run([*install, "-c", project / "constraints.txt"]).returncode:
        print("The versions of constraints.txt are not to be had here; taking others.", flush=True)
        if subprocess.run(install).returncode:
            raise ProjectError("the requirements cannot be installed; see pip's output above")
    return python


def _variables() -> dict[str, str]:
    """Copy the environment's variables, without those that lead back to this project."""
    left_out = ("HW3_ROOT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {key: value for key, value in os.environ.items() if key not in left_out}
    if folder := settings.read().data:
        variables["HW3_DATA"] = str(folder)
    return variables


def _result(project: Path, name: str) -> Path:
    """Find a notebook's results file, of real data or else of the stand-in."""
    folders = [project / "reports" / kind / "results" for kind in ("", "standin", "demo")]
    places = [folder / f"{name}.json" for folder in folders]
    return next(filter(Path.is_file, places), places[0])


def compare(stored: dict, again: dict) -> list[tuple[str, str, str, str]]:
    """Set two results of one notebook side by side.

    Args:
        stored: As `load_results` gives them, as handed in.
        again: As the run elsewhere wrote them.

    Returns:
        Rows (metric, stored, rerun, verdict). The verdict is whether the new value lies within the
        stored 95 % interval, or, where there is none, is equal, else by how much of the stored
        value it differs; times are not judged.
    """
    first, second = (dict(run["metrics"]) for run in (stored, again))
    for run, metrics in ((stored, first), (again, second)):
        if isinstance(run.get("seconds"), (int, float)):
            metrics["whole run"] = results.single(run["seconds"], "seconds")
    rows = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        equal = a and b and math.isclose(a.value, b.value, rel_tol=1e-9)
        if a is None or b is None:
            verdict = "MISSING" if b is None else "new"
        elif TIME.search(a.unit):
            verdict = "time, not judged"
        elif a.ci95:
            low, high = a.ci95
            inside = "within" if equal or low <= b.value <= high else "OUTSIDE"
            verdict = f"{inside} {low:.6g} to {high:.6g}"
        else:
            gap = f" by {100 * abs(b.value / a.value - 1):.2g} %" if a.value else ""
            verdict = "equal" if equal else f"DIFFERS{gap}"
        values = ("-" if metric is None else f"{metric.value:.6g}" for metric in (a, b))
        rows.append((name, *values, verdict))
    return rows


def print_comparison(name: str, stored: dict, again: dict) -> None:
    """Print the table of one notebook, and how much of it agrees."""
    rows = compare(stored, again)
    print(f"\n{name}\n{results.table(('metric', 'stored', 'rerun', 'verdict'), rows)}")
    judged = [row[3] for row in rows if row[3] != "time, not judged"]
    agree = sum(verdict.startswith(("within", "equal")) for verdict in judged)
    print(f"{agree} of {len(judged)} judged metrics agree.")
    for key in ("profile", "data_source", "machine"):
        here, there = again.get(key), stored.get(key)
        if here != there:
            print(f"Another {key}: {here}, stored {there}; the numbers need not agree.")


def rerun(path: Path, python: Path | None = None) -> list[str]:
    """Run an archive's notebooks elsewhere and print every metric beside the stored one.

    Args:
        path: The archive.
        python: An interpreter with the requirements; by default a fresh environment is made.

    Returns:
        The names of the notebooks that failed.

    Raises:
        ProjectError: The archive or its requirements are not usable.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="HW3 rerun ") as scratch:
        project = unpack(path, Path(scratch))
        python = python.absolute() if python else make_environment(project, Path(scratch, "env"))
        for name in sorted(notebook.stem for notebook in (project / "notebooks").glob("*.ipynb")):
            file = _result(project, name)
            stored = results.load_results(file)
            file.unlink()  # what is there afterwards was made by this run
            command = [python, "-m", "tools.run", name]
            code = subprocess.run(command, cwd=project, env=_variables()).returncode
            file = _result(project, name)
            if code or not file.is_file():
                failed.append(name)
                reason = "its error is above." if code else "it wrote no result."
                print(f"\n{name} FAILED; {reason}", flush=True)
            else:
                print_comparison(name, stored, results.load_results(file))
    return failed
