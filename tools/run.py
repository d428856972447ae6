"""`python -m tools.run [NAME ...]`: runs notebooks top to bottom and writes their HTML (`make html`)."""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from src import ROOT, ProjectError
from src.plotting import STANDIN_MARK
from src.results import commit, reports_folder
from tools.html import notebook_to_html, theory_to_html
from tools.notebooks import FOLDER, names, read


class _Client(NotebookClient):
    """Runs a notebook; bars inside it (the epochs) are shown in the runner's own bar and not stored."""

    bar: tqdm

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream" and content["name"] == "stderr" and "\r" in content["text"]:
            states = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", content["text"]).split("\r")
            self.bar.set_postfix_str(
                next((state.strip() for state in reversed(states) if state.strip()), "")[:80]
            )
            return None
        return super().process_message(msg, cell, cell_index)


def run(name: str, folder: Path = FOLDER) -> nbformat.NotebookNode:
    """Runs a notebook top to bottom in a fresh kernel and gives it back with its outputs.

    Args:
        name: the notebook's, without folder and ending.
        folder: the kernel's working directory.

    Raises:
        ProjectError: if a cell fails, naming the cell and the error; the traceback is printed.
    """
    notebook = read(name)
    for cell in notebook.cells:  # a cell that is not reached must not keep an earlier run's output
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = _Client(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    total = sum(cell.cell_type == "code" for cell in notebook.cells)
    form = "{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}{postfix}"
    with tqdm(total=total, desc=name, bar_format=form, mininterval=1) as client.bar:

        def executed(cell, cell_index, **_):
            client.bar.set_postfix_str("", refresh=False)
            client.bar.update(cell.cell_type == "code")

        client.on_cell_executed = executed
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError) as error:
            print(f"\n{error}", file=sys.stderr)
            failed = [
                i
                for i, cell in enumerate(notebook.cells)
                if any(output.output_type == "error" for output in cell.get("outputs", []))
            ]
            where = f"cell {failed[0]}" if failed else "the kernel"
            what = (
                f"{error.ename}: {error.evalue}"
                if isinstance(error, CellExecutionError)
                else "it died (out of memory?)"
            )
            raise ProjectError(
                f"{name}, {where} failed: {what} Nothing of it was written."
            ) from None
    return notebook


def is_standin(notebook: nbformat.NotebookNode) -> bool:
    """Whether the outputs come from a run on the stand-in data."""
    return any(
        STANDIN_MARK in str(output) for cell in notebook.cells for output in cell.get("outputs", [])
    )


def _write(notebook: nbformat.NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    nbformat.write(notebook, temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _store(name: str, notebook: nbformat.NotebookNode) -> None:
    """Writes an executed notebook and its page; a run on real data goes into the notebook itself, the stand-in's elsewhere."""
    standin = is_standin(notebook)
    target = reports_folder(True) / f"{name}.ipynb" if standin else FOLDER / f"{name}.ipynb"
    page = reports_folder(standin) / f"{name}.html"
    _write(notebook, target)
    notebook_to_html(target, page)
    print(f"{name}: wrote {page.relative_to(ROOT)}, outputs are in {target.relative_to(ROOT)}")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.run", description="Runs notebooks and writes their HTML."
    )
    parser.add_argument("name", nargs="*", help="the notebooks to run (default: all)")
    chosen = parser.parse_args(arguments).name or names()
    if commit().endswith("+changes"):
        print(
            "There are changes since the last commit, and results of real data will say so. What `make submission` is to "
            "accept has to be committed first, then run.",
            flush=True,
        )
    executed = {}
    try:
        try:
            for name in chosen:
                executed[name] = run(name)
        finally:  # only now: outputs of one notebook are uncommitted changes to the results of the next
            for name, notebook in executed.items():
                _store(name, notebook)
        theory_to_html(ROOT / "reports" / "theory.html")
        print("theory: wrote reports/theory.html")
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if any((reports_folder(True) / f"{name}.html").exists() for name in chosen):
        print(f"Pages in reports/standin/ carry the mark: {STANDIN_MARK}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
