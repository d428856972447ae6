"""The notebooks of this project: their names, their cells, and what they define."""

import sys
import types
from pathlib import Path

import nbformat

from src import ROOT, ProjectError

FOLDER = ROOT / "notebooks"


def print_anything():
    """Let a character that the code page lacks print as `?`, and every line appear at once."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # it may have been replaced by one that has no code page
            stream.reconfigure(errors="replace", line_buffering=True)


def names(folder=FOLDER):
    """List the notebooks' names in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.ipynb"))


def read(notebook):
    """Read a notebook of this project by its name, or any by its path; or a ProjectError."""
    path = notebook if isinstance(notebook, Path) else FOLDER / f"{notebook}.ipynb"
    if not path.is_file():
        others = ", ".join(names(path.parent)) or "none"
        raise ProjectError(
            f"There is no notebook {path.stem!r} in {path.parent}; it has: {others}."
        )
    try:
        content = nbformat.read(path, as_version=4)
        nbformat.validate(content, relax_add_props=True)  # editors add fields of later versions
    except Exception as error:  # of the JSON, of nbformat's schema, or of the file system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProjectError(f"{path} is not a readable notebook: {reason}") from error
    return content


def about(notebook):
    """What a run says of itself: profile, data_source, standin; empty where it says nothing.

    `src.run.start` attaches it to an output, so that it changes with the outputs in whatever
    program the notebook is run.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = [output.get("metadata", {}).get("hw3") for output in outputs]
    return next((dict(one) for one in said if isinstance(one, dict)), {})


def definitions(name):
    """Give what a notebook's cells tagged `define` define, without running the rest.

    That is a module whose attributes are the notebook's classes, functions and constants; or a
    ProjectError if there is no notebook of this name.
    """
    module = types.ModuleType(f"notebooks.{name}")
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    for number, cell in enumerate(read(name).cells, 1):
        if cell.cell_type == "code" and "define" in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"<{name}, cell {number}>", "exec"), module.__dict__)
    return module
