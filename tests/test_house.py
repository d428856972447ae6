"""Rules that all code keeps, so that a new member of a known kind of fault fails here."""

import ast
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src import ROOT, stats
from src.run import cell_digest

FILES = [path for folder in ("src", "tools", "theory") for path in (ROOT / folder).glob("*.py")]
TREES = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(FILES)]
each_file = pytest.mark.parametrize(
    "path, tree", TREES, ids=[path.relative_to(ROOT).as_posix() for path, _ in TREES]
)
NO_CAUSE = {"KeyboardInterrupt", "DeadKernelError"}  # such errors carry no reason of their own
WHOLE = re.compile(r"replacing\(|BytesIO\(|TemporaryDirectory\(|/proc/")  # a file, or none at all


def called(node):
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


@each_file
def test_what_speaks_of_an_error_tells_its_cause(path, tree):
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        body = [node for statement in handler.body for node in ast.walk(statement)]
        names = {node.id for node in body if isinstance(node, ast.Name)}
        raises = any(isinstance(node, ast.Raise) and node.exc for node in body)
        if (raises or "print" in names) and ast.unparse(handler.type) not in NO_CAUSE:
            assert handler.name in names, f"line {handler.lineno} tells one cause for all"


@each_file
def test_text_has_one_encoding_and_files_are_written_whole(path, tree):
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        source = ast.unparse(function)
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name, text = called(call), ast.unparse(call)
            if name in ("read_text", "write_text") or text.startswith("open("):
                binary = re.search(r"'[rw]b'", text)
                assert "encoding=" in text or binary or "/proc/" in source, text
            writes = name in ("write_text", "write_bytes", "savez_compressed", "savefig", "ZipFile")
            if writes and path.name != "files.py":
                assert WHOLE.search(source), f"{text} may leave half a file"


@each_file
def test_programs_print_in_any_code_page(path, tree):
    source = ast.unparse(tree)
    is_program = "__main__" in source and "print(" in source
    assert not is_program or "print_anything()" in source


def test_a_library_of_one_notebook_stops_no_other():
    """As pycocotools, built for another NumPy, or a missing package of weights would."""
    modules = [f"src.{path.stem}" for path in (ROOT / "src").glob("*.py") if path.stem[0] != "_"]
    code = "import sys\nsys.modules |= {'pycocotools': None, 'efficientnet_lite_pytorch': None}\n"
    code += f"import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_commands_of_the_readme_may_stand_in_any_notebook():
    readme = Path(ROOT, "README.md").read_text(encoding="utf-8")
    cells = [block for block in re.findall(r"```\w*\n(.*?)```", readme, re.S) if block[0] in "!%"]
    assert cells and all(cell_digest(cell) is None for cell in cells)


ARGUMENTS = {  # of every public function of `stats` that measures: nothing, and no number
    "mean": ([[]], [[math.nan, 1.0]]),
    "rate": ([[]], [[math.nan, 1.0]]),
    "bootstrap": ([[]], [[math.nan, 1.0]]),
    "difference": ([[], []], [[math.nan], [1.0]]),
    "group_difference": ([[1, 1], [0, 0], [1, 1], [0, 1]], [[math.nan], [1], [1], [0]]),
}


def test_nothing_and_nan_have_an_answer():
    others = {"mcnemar", "holm", "verdict", "linear_probe"}  # give no estimate
    public = {key for key, function in vars(stats).items() if inspect.isfunction(function)}
    public = {key for key in public if key[0] != "_" and vars(stats)[key].__module__ == "src.stats"}
    assert public == ARGUMENTS.keys() | others
    for name, cases in ARGUMENTS.items():
        assert {str(getattr(stats, name)(*case)) for case in cases} == {"–"}, name
    assert stats.mcnemar([], []) == 1.0 and stats.holm({}) == {}
