"""Run every notebook under hard conditions: `make robustness`; too slow for `make test`.

Other working directories, no network, trainings cut off and started again, and real data that must
stay as they are.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.results import load_results
from tools.notebooks import names
from tools.submission.rerun import TIME

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = {
    f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")
}  # the discard port: nothing answers
RUN = """
import sys
from pathlib import Path
from tools.run import run

run(sys.argv[1], Path(sys.argv[2]))
"""
DIES = """
import os
from pathlib import Path


def replace_and_die(source, target, replace=os.replace, written=[]):  # a notebook takes the names
    replace(source, target)
    if Path(target).parent.name == "checkpoints":
        written.append(target)
    if len(written) == {saves}:
        os._exit(1)  # as a power cut would: nothing is tidied up


os.replace = replace_and_die
"""  # run by IPython when a kernel starts: code in src would make the checkpoint that of other code


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness") / "پوشهٔ من با فاصله" / "HW 3"
    for part in ("src", "tools", "notebooks", "theory", "reports/results", "data"):
        ignored = shutil.ignore_patterns("__pycache__", "standin-*", "checkpoints")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    return folder


def execute(project, name, folder, **environment):
    """Run a notebook in the working directory `folder`; give the exit code and the messages."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HW3_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, str(folder)],
        cwd=project,
        capture_output=True,
        text=True,
        env=inherited | NO_NETWORK | {"HW3_PROFILE": "smoke"} | environment,
    )
    return done.returncode, done.stdout + done.stderr


def numbers(project, name):
    """The stored metrics, without those that a clock gives."""
    stored = load_results(project / "reports" / "standin" / "results" / f"{name}.json")
    return {key: m for key, m in stored["metrics"].items() if not TIME.search(m.unit)}


@pytest.fixture(scope="module")
def first_run(project):
    """Give the numbers of an undisturbed run of a notebook from its own folder."""

    @functools.cache
    def run(name):
        code, messages = execute(project, name, project / "notebooks")
        assert code == 0, messages
        return numbers(project, name)

    return run


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(
    "where", ["the project", "the notebooks", "a folder deep inside", "elsewhere, with HW3_ROOT"]
)
def test_the_same_numbers_from_any_working_directory(project, first_run, tmp_path, name, where):
    folder = {
        "the project": project,
        "the notebooks": project / "notebooks",
        "a folder deep inside": project / "theory" / "figures",
    }
    root, expected = {"HW3_ROOT": str(project)} if where not in folder else {}, first_run(name)
    (project / "reports" / "standin" / "results" / f"{name}.json").unlink(missing_ok=True)
    code, messages = execute(project, name, folder.get(where, tmp_path), **root)
    assert code == 0, messages
    assert numbers(project, name) == expected


@pytest.mark.parametrize("saves", [1, 2])  # change detection saves no more
@pytest.mark.parametrize("name", names())
def test_a_training_that_was_cut_off_ends_with_the_same_numbers(
    project, first_run, tmp_path, name, saves
):
    expected = first_run(name)
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "dies.py").write_text(DIES.format(saves=saves), encoding="utf-8")
    (project / "reports" / "standin" / "results" / f"{name}.json").unlink(missing_ok=True)
    code, messages = execute(project, name, project / "notebooks", IPYTHONDIR=str(tmp_path))
    assert code != 0 and "the kernel died" in messages, messages
    left = list((project / "data" / "checkpoints").glob("*.pt"))
    assert len(left) == 1, (
        "the training that was cut off left its checkpoint, and those that had ended left none"
    )
    code, messages = execute(project, name, project / "notebooks")
    assert code == 0, messages
    assert not left[0].exists(), "the training went on from the checkpoint and removed it"
    assert numbers(project, name) == expected


@pytest.mark.parametrize("name", names())
def test_real_data_is_read_and_left_as_it_was(project, name, real_data):
    def state():
        return {
            path: (path.stat().st_size, path.stat().st_mtime_ns) for path in real_data.rglob("*")
        }

    before = state()
    code, messages = execute(
        project, name, project / "notebooks", HW3_PROFILE="demo", HW3_DATA=str(real_data)
    )
    assert code == 0, messages
    assert state() == before
    stored = load_results(project / "reports" / "demo" / "results" / f"{name}.json")
    assert stored["data_source"] == "HW3_DATA" and stored["profile"] == "demo"
