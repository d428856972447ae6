"""The archive: what goes in, under which name."""

import hashlib
import re
import tempfile
import unicodedata
import zipfile
from pathlib import Path

from src import ROOT, ProjectError
from src.files import replacing
from src.results import load_results
from tools.html import theory_images, theory_text, theory_to_html
from tools.submission import checks
from tools.submission.checks import Run, relative

USAGE = (
    'usage: make submission NAME="Your Name" ID=StudentNumber [COLLABORATORS="names"] '
    "[ALLOW_STANDIN=1]"
)
FOLDERS = ("notebooks", "src", "tests", "theory", "tools")
FILES = (
    *("LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "data/README.md", "pyproject.toml"),
    *("requirements.txt", "constraints.txt"),
)
MODEL_LIMIT = 8 * 2**20  # bytes; larger models are left out and named
_STUDENTS_LINE = re.compile(r"^\*To be filled in by the student\b[^\n]*$", re.M)
_COVER_LINE = re.compile(r"^\| (Student|Student number) \| \*filled in by [^|]*\|$", re.M)


def build(name: str, number: str, collaborators: str = "", allow_standin: bool = False) -> Path:
    """Write the archive to hand in into the project's folder.

    Args:
        name: The student's.
        number: The student number.
        collaborators: Names for `theory/SOURCES.md`, where that does not tell them.
        allow_standin: Whether runs on the stand-in may go in; the archive's name then says so.

    Raises:
        ProjectError: The name or number does not fit, or a list of every problem.
    """
    stem(name, number)
    sources, runs = sources_page(collaborators), checks.find_runs(allow_standin)
    if found := checks.problems(runs, allow_standin):
        raise ProjectError("not ready to be handed in:\n" + "".join(f"  {x}\n" for x in found))
    for remark in checks.remarks(runs):
        print(remark)
    kinds = [run.about for run in runs] + [load_results(path) for path in checks.results_of(runs)]
    path = ROOT / f"{stem(name, number, any(map(checks.is_trial, kinds)))}.zip"
    files = collect(runs, {"SOURCES.md": sources} | first_page(name, number))
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as zip:
        for file, data in sorted(files.items()):
            zip.writestr(f"{path.stem}/{file}", data)
    size = path.stat().st_size / 2**20
    names = ", ".join(run.name for run in runs)
    print(f"Wrote {path.name}: {names}; {size:.1f} MB. `make rerun` tries it out.")
    return path


def stem(name: str, number: str, marked: bool = False) -> str:
    """Form `HW3-Name-StudentNumber`, the name of the archive and of the folder in it.

    Args:
        name: The student's; any script, spaces become hyphens.
        number: The student number; digits of any script.
        marked: Whether something in it is of the stand-in.

    Raises:
        ProjectError: One of the two is missing or does not fit.
    """
    name = re.sub(" +", "-", unicodedata.normalize("NFC", name).strip(" "))
    number = number.strip(" ")
    if not name or not number:
        raise ProjectError(USAGE)
    for character in name:
        # Letters, their marks, digits, and the non-joiner of Persian names; all else may mean
        # something to a file system.
        if unicodedata.category(character)[0] not in "LMN" and character not in "-.'’\u200c":
            raise ProjectError(
                f"NAME holds {character!r}: it takes letters, digits, spaces, hyphens, dots and "
                "apostrophes"
            )
    if name.startswith(".") or not any(map(str.isalpha, name)) or len(name.encode()) > 180:
        raise ProjectError("NAME begins with a dot, has no letter or is too long for a file name")
    if not number.isdecimal():
        raise ProjectError(f"ID={number!r} is not a student number: it takes digits only")
    digits = "".join(str(unicodedata.decimal(digit)) for digit in number)
    return f"HW3-{name}-{digits}" + "-STANDIN" * marked


def sources_page(collaborators: str) -> str:
    """Give `theory/SOURCES.md` with the student's line filled in; "none" where nobody is named.

    Raises:
        ProjectError: The file or its word on collaborators is missing, or they are named twice.
    """
    path = ROOT / "theory" / "SOURCES.md"
    if not path.is_file():
        raise ProjectError("theory/SOURCES.md is missing: it lists sources and collaborators")
    text, collaborators = theory_text(path), collaborators.strip()
    if not collaborators.isprintable():
        raise ProjectError("COLLABORATORS takes names in one line")
    filled, open_lines = _STUDENTS_LINE.subn(lambda _: collaborators or "none", text)
    if collaborators and not open_lines:
        raise ProjectError("theory/SOURCES.md names collaborators already: leave COLLABORATORS out")
    if open_lines and not collaborators:
        print('Collaborators: none. If there were any: make submission COLLABORATORS="…".')
    blocks = checks.markdown_blocks(filled, path.name)
    heading = next((b for b in blocks if (b.kind, b.text) == ("heading", "Collaborators")), None)
    if heading is None or heading in checks.unanswered(blocks):
        raise ProjectError(
            'theory/SOURCES.md has nothing under "Collaborators": name them, or write none'
        )
    return filled


def first_page(name: str, number: str) -> dict[str, str]:
    """Give the theory's first page with the student's name and number, by the file's name."""
    path = ROOT / "theory" / "0_answers.md"
    if not path.is_file():
        return {}
    values, text = {"Student": name, "Student number": number}, theory_text(path)
    return {path.name: _COVER_LINE.sub(lambda m: f"| {m[1]} | {values[m[1]].strip()} |", text)}


def collect(runs: list[Run], texts: dict[str, str]) -> dict[str, bytes]:
    """Gather all that is handed in, by its path in the project, and the `MANIFEST` of it.

    Args:
        runs: The notebooks' runs.
        texts: Files of the theory that are filled in, by name.
    """
    paths = [path for folder in FOLDERS for path in _files(ROOT / folder)]
    paths += [ROOT / file for file in FILES if (ROOT / file).is_file()]
    for result in checks.results_of(runs):
        paths += [result, *result.parent.glob(f"{result.stem}.npz")]
    for run in runs:
        paths.append(run.page)
        for model in sorted((run.page.parent / "models").glob(f"{run.name}*.pt")):
            if model.stat().st_size <= MODEL_LIMIT:
                paths.append(model)
            else:
                limit = MODEL_LIMIT // 2**20
                print(f"{relative(model)} is left out: over {limit} MB; its notebook makes it.")
    files = {relative(path): path.read_bytes() for path in paths}
    files |= {f"notebooks/{run.name}.ipynb": run.path.read_bytes() for run in runs}
    files |= {f"theory/{file}": text.encode() for file, text in texts.items()}
    with tempfile.TemporaryDirectory() as scratch:
        files |= _theory(Path(scratch), texts)
    return files | {"MANIFEST": manifest(files)}


def _files(folder: Path) -> list[Path]:
    """List the files below a folder, without what is hidden, half-written or compiled."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in (".part", ".pyc")
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    ]


def _theory(scratch: Path, texts: dict[str, str]) -> dict[str, bytes]:
    """Make the theory's page, and its PDF and page images where a browser is installed."""
    theory_to_html(scratch / "theory.html", texts)
    files, images = {"reports/theory.html": (scratch / "theory.html").read_bytes()}, scratch / "im"
    try:
        theory_images(images, texts)
    except ProjectError as error:
        print(f"The theory goes without page images: {error}.")
        if not (images / "theory.pdf").is_file():
            print("The rules ask for a clear one: print reports/theory.html to a PDF, add that.")
    return files | {f"reports/theory/{p.name}": p.read_bytes() for p in images.glob("theory*")}


def manifest(files: dict[str, bytes]) -> bytes:
    """List files with their SHA-256 and size in bytes."""
    lines = (
        f"{hashlib.sha256(data).hexdigest()} {len(data):>9} {path}\n"
        for path, data in sorted(files.items())
    )
    return "".join(lines).encode()
