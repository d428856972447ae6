"""The notebooks of this project: their names, their cells, and what they define."""

import ast
import sys
import types
from pathlib import Path

import nbformat

from src import ROOT, ProjectError
from src.files import write_whole

FOLDER = ROOT / "notebooks"
_DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def names() -> list[str]:
    """List the notebooks' names in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    """Read a notebook of this project.

    Raises:
        ProjectError: there is none of that name, or it is not a notebook.
    """
    path = FOLDER / f"{name}.ipynb"
    if not path.is_file():
        raise ProjectError(f"There is no notebook {name!r}; there are: {', '.join(names())}.")
    return read_file(path)


def read_file(path: Path) -> nbformat.NotebookNode:
    """Read any notebook file.

    Raises:
        ProjectError: It is missing or not a notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        return notebook
    except Exception as error:  # what nbformat's JSON, its schema and the file system raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProjectError(f"{path.name} is not a readable notebook: {reason}") from None


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all; text that UTF-8 cannot hold becomes question marks."""
    text = nbformat.writes(notebook)
    write_whole(path, (text.rstrip() + "\n").encode("utf-8", "replace"))


def is_folded(cell) -> bool:
    """Whether a cell's code is plumbing that a reader sees on demand only."""
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return hidden or "hide-input" in cell.metadata.get("tags", [])


def about(notebook: nbformat.NotebookNode) -> dict:
    """Give what a run says of itself: profile, data_source, standin, fingerprint; or nothing.

    `session.start` attaches it to an output, so that it changes with the outputs in whatever
    program the notebook is run; `tools.run` copies it into the notebook's own metadata.
    """
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found |= _said(output.get("metadata", {}))
    return found or _said(notebook.metadata)


def _said(metadata: dict) -> dict:
    """What metadata tell of a run; nothing where another program uses the name."""
    said = metadata.get("hw3")
    return dict(said) if isinstance(said, dict) else {}


def definitions(name: str) -> types.ModuleType:
    """Give what a notebook's cells tagged `define` define, without running the rest.

    Args:
        name: the notebook's, without folder and ending.

    Returns:
        A module whose attributes are the notebook's classes, functions and constants.

    Raises:
        ProjectError: there is no such notebook, or a tagged cell does more than define.
    """
    module = types.ModuleType(f"notebooks.{name}")
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    for number, cell in enumerate(read(name).cells, 1):
        if cell.cell_type == "code" and "define" in cell.metadata.get("tags", []):
            tree = ast.parse(cell.source)
            for node in tree.body:
                if not isinstance(node, _DEFINING):
                    place = f"{name}, cell {number}, line {node.lineno}"
                    raise ProjectError(f"{place}: a cell tagged `define` may only define.")
            exec(compile(tree, f"<{name}, cell {number}>", "exec"), module.__dict__)
    return module
