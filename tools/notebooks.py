"""The definitions made in the notebooks, for use elsewhere: the notebook is the source."""

import ast
import sys
import types

import nbformat

from src import ROOT, ProjectError

FOLDER = ROOT / "notebooks"
_DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def names() -> list[str]:
    """The notebooks' names in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    """Reads a notebook of this project.

    Raises:
        ProjectError: if there is none of that name, or it is no notebook.
    """
    path = FOLDER / f"{name}.ipynb"
    if not path.is_file():
        raise ProjectError(f"There is no notebook {name!r}; there are: {', '.join(names())}.")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds for a file that is no notebook
        raise ProjectError(
            f"{path.name} is not a readable notebook ({type(error).__name__})."
        ) from None


def definitions(name: str) -> types.ModuleType:
    """Gives what a notebook's cells tagged `define` define, without running the rest.

    Args:
        name: the notebook's, without folder and ending.

    Returns:
        A module whose attributes are the notebook's classes, functions and constants.

    Raises:
        ProjectError: if there is no such notebook, or a tagged cell does more than define.
    """
    module = types.ModuleType(f"notebooks.{name}")
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    for i, cell in enumerate(read(name).cells):
        if cell.cell_type == "code" and "define" in cell.metadata.get("tags", []):
            tree = ast.parse(cell.source)
            for node in tree.body:
                if not isinstance(node, _DEFINING):
                    raise ProjectError(
                        f"{name}, cell {i}, line {node.lineno}: a cell tagged `define` may only define."
                    )
            exec(compile(tree, f"<{name}, cell {i}>", "exec"), module.__dict__)
    return module
