"""The archive to hand in, and the proof that it runs elsewhere (`make submission`, `make rerun`).

    python -m tools.submission build --name=NAME --id=ID [--collaborators=NAMES] [--allow-standin]
    python -m tools.submission rerun [--zip=FILE] [--python=INTERPRETER]

`build` packs what is handed in, or says everything that speaks against it; the same files give the same bytes. `rerun` does
what a grader does: an empty folder, a fresh environment, every notebook from top to bottom, and every number beside the stored.
"""

import argparse
import getpass
import hashlib
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import unicodedata
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import nbformat

from src import ROOT, ProjectError
from src.plotting import STANDIN_MARK
from src.results import load_results, reports_folder
from tools import notebooks
from tools.html import theory_images, theory_to_html

USAGE = 'usage: make submission NAME="Your Name" ID=StudentNumber [COLLABORATORS="names"] [ALLOW_STANDIN=1]'
FOLDERS = ("notebooks", "src", "tests", "theory", "tools")
FILES = ("LICENSE", "Makefile", "README.md", "data/README.md", "pyproject.toml", "requirements.txt")
MODEL_LIMIT = 8 * 2**20  # bytes; larger models are left out and named

# The questions as the headings in theory/ number them; the parts of the fourth belong to Practical 2.
THEORY = "1.1 2.1 2.2 2.3 2.4 3.1a 3.1b 3.1c 3.2a 3.2b 3.3a 3.3b 3.4a 3.4b 4.1 4.2 4.3 4.4".split()
PRACTICAL = (1, 2, 3)  # each is quoted by the notebook that answers it

_PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|FIXME)\b|\bto be filled in\b|\byour (?:answer|code) (?:here|goes)\b"
    r"|\braise NotImplementedError|\blorem ipsum|(?:پاسخ|جواب|کد) خود را",
    re.I,
)
_STUDENTS_LINE = re.compile(r"^\*To be filled in by the student\b[^\n]*$", re.M)
_MACHINE_PATH = re.compile(
    r"(?<![\w.-])/(?:home|Users|root|tmp|var/folders)/[^\s'\"<>]*|\b[A-Za-z]:[\\/]+Users[\\/][^\s'\"<>]*"
)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TIME = re.compile(r"second|minute|hour")


# --- what speaks against a submission


@dataclass(frozen=True)
class Run:
    """An executed notebook and what its run wrote."""

    name: str
    path: Path  # notebooks/NAME.ipynb, or reports/standin/NAME.ipynb for a run of `make html` on the stand-in
    notebook: nbformat.NotebookNode

    @property
    def place(self) -> str:
        return _relative(self.path)

    @property
    def standin(self) -> bool:
        return any(
            STANDIN_MARK in text
            for cell in self.notebook.cells
            for text in _texts(cell.get("outputs", []))
        )

    @property
    def page(self) -> Path:
        return reports_folder(self.standin) / f"{self.name}.html"

    @property
    def result(self) -> Path:
        return reports_folder(self.standin) / "results" / f"{self.name}.json"

    def problems(self, allow_standin: bool) -> Iterator[str]:
        """What speaks against handing this run in, each with the notebook and the cell or file."""
        for number, cell in enumerate(self.notebook.cells, 1):
            for problem in _cell_problems(cell, allow_standin):
                yield f"{self.place}, cell {number}: {problem}"
        yield from _order_problems(self)
        yield from _page_problems(self)
        yield from _code_problems(self)
        yield from map(_unanswered_line, unanswered(_notebook_blocks(self)))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _texts(value) -> Iterator[str]:
    """All text in a notebook's outputs; of pictures the alt text, but not the encoded bytes."""
    if isinstance(value, str):
        yield _ANSI.sub("", value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not (isinstance(entry, str) and key.startswith("image/") and key != "image/svg+xml"):
                yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _code_cells(notebook) -> list[tuple[int, dict]]:
    """The code cells with their numbers; an empty one is not run and does not count."""
    return [
        (number, cell)
        for number, cell in enumerate(notebook.cells, 1)
        if cell.cell_type == "code" and cell.source.strip()
    ]


def _cell_problems(cell, allow_standin: bool) -> Iterator[str]:
    if found := _PLACEHOLDER.search(cell.source):
        yield f"it still holds the placeholder {found[0]!r}"
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            yield f"it failed with {output.ename}: {output.evalue}"
        if not allow_standin and any(STANDIN_MARK in text for text in _texts(output)):
            yield "its output is of the stand-in data; run on real data, or hand it in marked as such: ALLOW_STANDIN=1"


def _order_problems(run: Run) -> Iterator[str]:
    """Code cells have to be numbered 1, 2, 3, …: run once each, from top to bottom, in a fresh kernel."""
    for place, (number, cell) in enumerate(_code_cells(run.notebook), 1):
        if cell.execution_count != place:
            how = (
                f"run as number {cell.execution_count}, not {place}"
                if cell.execution_count
                else "not run"
            )
            yield f"{run.place}, cell {number}: it was {how}; restart the kernel and run all cells, or `make html`"
            return


def _page_problems(run: Run) -> Iterator[str]:
    """A page names the SHA-256 of the notebook that it was made from."""
    digest = hashlib.sha256(run.path.read_bytes()).hexdigest()
    again = f"python -m tools.html notebook {_relative(run.path)} {_relative(run.page)}"
    if not run.page.is_file():
        yield f"{run.place}: its page {_relative(run.page)} is missing; {again}"
    elif f'<meta name="source-sha256" content="{digest}">' not in run.page.read_text(
        encoding="utf-8"
    ):
        yield f"{run.place}: its page {_relative(run.page)} was made from another state of it; {again}"


def _first_difference(notebook, other) -> int | None:
    """The number of the first cell whose code is not the same in another notebook."""
    end = len(notebook.cells), {"source": ""}
    for (number, cell), (_, before) in itertools.zip_longest(
        _code_cells(notebook), _code_cells(other), fillvalue=end
    ):
        if cell["source"] != before["source"]:
            return number
    return None


def _git(*words: str) -> str:
    try:
        command = ["git", "-c", "core.fileMode=false", *words]  # permissions change no number
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise ProjectError(f"git {words[0]} failed") from None


def _changed_since(commit: str) -> list[str]:
    """The files of the shared code, and requirements.txt, that are not as they were at a commit; uncommitted changes count."""
    changed = _git(
        "diff",
        "--name-only",
        "--relative",
        "-z",
        commit,
        "--",
        "src",
        "src/accounting.py",
        "requirements.txt",
    )
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", "src/*.py")
    return sorted(set(filter(None, (changed + new).split("\0"))))


def _code_problems(run: Run) -> Iterator[str]:
    """A run's numbers have to be this code's: the notebook's code cells and the shared code as at its commit."""
    if not run.result.is_file():
        yield f"{run.place}: its result {_relative(run.result)} is missing; run the notebook"
        return
    if problems := list(_provenance_problems(run.result)):
        yield from problems
        return
    commit = load_results(run.result)["commit"]
    try:
        then = nbformat.reads(_git("show", f"{commit}:./notebooks/{run.name}.ipynb"), as_version=4)
    except ProjectError:
        yield f"{run.place}: at its result's commit {commit[:7]} there was no such notebook; run it again"
        return
    for state, other in (
        (f"at its result's commit {commit[:7]}", then),
        ("in notebooks/", notebooks.read(run.name)),
    ):
        if number := _first_difference(run.notebook, other):
            yield f"{run.place}, cell {number}: the code is not the same {state}; run the notebook again"


def _provenance_problems(result: Path, earlier: bool = False) -> Iterator[str]:
    """A result's commit has to be known, and the shared code as it was at it, but for an `earlier` run kept for comparison."""
    place, commit = _relative(result), str(load_results(result).get("commit"))
    try:
        _git("cat-file", "-e", f"{commit}^{{commit}}")
        changed = _changed_since(commit)
    except ProjectError:
        yield f"{place}: its commit {commit!r} is not in the git history here; commit the code, then run what made it again"
        return
    if changed and not earlier:
        yield f"{place}: changed since its commit {commit[:7]}: {', '.join(changed)}; run what made it again"


def _is_standin_result(path: Path) -> bool:
    stored = load_results(path)
    return bool(stored.get("standin")) or stored.get("profile") == "smoke"


def _result_problems(runs: list[Run], allow_standin: bool) -> Iterator[str]:
    """Of all results: none of the stand-in unless allowed; of those that no notebook wrote, where they come from.

    `reports/results/NAME_what.json` is an earlier run of the notebook NAME.
    """
    own = {run.result for run in runs}
    for path in _results(runs):
        if not allow_standin and _is_standin_result(path):
            yield f"{_relative(path)}: a result of the smoke profile or the stand-in data; make it again on real data"
        if path not in own:
            yield from _provenance_problems(
                path, earlier=any(path.stem.startswith(f"{run.name}_") for run in runs)
            )


def _machine_names() -> set[str]:
    host = platform.node()
    try:
        return {getpass.getuser(), host, host.partition(".")[0]} - {""}
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return {host, host.partition(".")[0]} - {""}


def _machine_problems(runs: list[Run]) -> Iterator[str]:
    """Outputs and results must not tell on whose machine they were made.

    A login or host name that is also a word of the notebooks' own cells (a user called `test`) tells nothing.
    """
    sources = "\n".join(cell.source for run in runs for cell in run.notebook.cells)
    names = [
        name
        for name in sorted(_machine_names())
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sources)
    ]
    words = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in [str(ROOT), *names])
    machine = re.compile("|".join([_MACHINE_PATH.pattern, *words]))
    pieces = [
        (f"{run.place}, cell {number}", text)
        for run in runs
        for number, cell in enumerate(run.notebook.cells, 1)
        for text in _texts(cell.get("outputs", []))
    ]
    pieces += [(_relative(path), path.read_text(encoding="utf-8")) for path in _results(runs)]
    for place, text in pieces:
        if found := machine.search(text):
            yield f"{place}: the output names this machine: {found[0]!r}; print paths relative to the project"


# --- answers


@dataclass(frozen=True)
class Block:
    """A heading, the begin of a quotation (the assignment's words), or a line of anything else."""

    kind: str  # heading, quote or text
    level: int  # of the heading, or of the one it stands under
    text: str
    place: str


def markdown_blocks(text: str, place: str, level: int = 0) -> list[Block]:
    """Takes Markdown apart.

    Args:
        text: the Markdown.
        place: where it stands, for messages.
        level: of the heading that it stands under.
    """
    blocks, fenced, kind = [], False, ""
    for line in text.splitlines():
        before, fence = kind, line.lstrip().startswith("```")
        heading = None if fenced else re.match(r"(#{1,6})\s+(.+)", line)
        kind = (
            "heading"
            if heading
            else "quote"
            if line.startswith(">") and not fenced
            else "text"
            if re.search(r"\w", line)
            else ""
        )
        fenced ^= fence
        if heading:
            level = len(heading[1])
        if kind and not kind == before == "quote":
            blocks.append(Block(kind, level, line.lstrip("#> ").strip(), place))
    return blocks


def _notebook_blocks(run: Run) -> list[Block]:
    blocks, level = [], 0
    for number, cell in enumerate(run.notebook.cells, 1):
        place = f"{run.place}, cell {number}"
        if cell.cell_type == "markdown":
            blocks += markdown_blocks(cell.source, place, level)
            level = blocks[-1].level if blocks else 0
        elif cell.source.strip():
            blocks.append(Block("text", level, cell.source, place))
    return blocks


def unanswered(blocks: list[Block]) -> list[Block]:
    """The headings and quotations with nothing of the student's below them.

    A heading reaches to the next of its level or above, a quotation to the next quotation at the latest.
    """
    waiting, empty = [], []
    for block in blocks:
        if block.kind == "text":
            waiting = []
            continue
        ended = [
            b
            for b in waiting
            if (block.kind == "heading" and block.level <= b.level)
            or block.kind == b.kind == "quote"
        ]
        empty += ended
        waiting = [b for b in waiting if b not in ended] + [block]
    return empty + waiting


def _unanswered_line(block: Block) -> str:
    return f"{block.place}: nothing answers {block.text[:80]!r}"


def _answer_problems(runs: list[Run]) -> Iterator[str]:
    """Every question of the assignment has to have its answer, and no theory file may be empty or half done."""
    numbered = set()
    for path in sorted((ROOT / "theory").glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        blocks = markdown_blocks(text, path.name)
        if not any(block.kind == "text" for block in blocks):
            yield f"{path.name}: it is empty"
        else:
            yield from map(_unanswered_line, unanswered(blocks))
        for number, line in enumerate(text.splitlines(), 1):
            if found := _PLACEHOLDER.search(line):
                yield f"{path.name}, line {number}: it still holds the placeholder {found[0]!r}"
        numbered |= {block.text.split()[0] for block in blocks if block.kind == "heading"}
    for question in THEORY:
        if question not in numbered:
            yield f"theory: question {question} has no answer; its heading starts with this number"
    quoted = "\n".join(
        cell.source for run in runs for cell in run.notebook.cells if cell.cell_type == "markdown"
    )
    for number in PRACTICAL:
        if not re.search(rf"^>.*\bPractical {number}\b", quoted, re.M):
            yield f"notebooks: none quotes the task of Practical {number}, so it has no answer"


def sources_page(collaborators: str) -> str:
    """`theory/SOURCES.md` with the student's line filled in; "none" where nobody is named.

    Raises:
        ProjectError: there is no such file or no word on collaborators, or they are named in both places.
    """
    path = ROOT / "theory" / "SOURCES.md"
    if not path.is_file():
        raise ProjectError(
            "theory/SOURCES.md is missing: it lists the sources and the collaborators"
        )
    text, collaborators = path.read_text(encoding="utf-8"), collaborators.strip()
    if not collaborators.isprintable():
        raise ProjectError("COLLABORATORS takes names in one line")
    filled, open_lines = _STUDENTS_LINE.subn(lambda _: collaborators or "none", text)
    if collaborators and not open_lines:
        raise ProjectError(
            "theory/SOURCES.md has its collaborators filled in already: leave COLLABORATORS out"
        )
    if open_lines and not collaborators:
        print(
            'Collaborators: none. Were there any, name them: make submission COLLABORATORS="…", or in theory/SOURCES.md.'
        )
    blocks = markdown_blocks(filled, path.name)
    headings = [
        block for block in blocks if block.kind == "heading" and block.text == "Collaborators"
    ]
    if not headings or headings[0] in unanswered(blocks):
        raise ProjectError(
            'theory/SOURCES.md has nothing under "Collaborators": name them, or write none'
        )
    return filled


def find_runs(allow_standin: bool) -> list[Run]:
    """The runs to hand in: the notebooks as they are.

    Where the stand-in is allowed and a notebook cannot go as it is, its run of `make html` on the stand-in goes instead.
    """
    runs = []
    for name in notebooks.names():
        run = Run(name, notebooks.FOLDER / f"{name}.ipynb", notebooks.read(name))
        other = reports_folder(True) / f"{name}.ipynb"
        if allow_standin and other.is_file() and any(run.problems(allow_standin)):
            run = Run(name, other, nbformat.read(other, as_version=4))
        runs.append(run)
    return runs


def problems(runs: list[Run], allow_standin: bool) -> list[str]:
    """All that speaks against handing these runs in, with this project's theory and results."""
    return [
        *itertools.chain.from_iterable(run.problems(allow_standin) for run in runs),
        *_result_problems(runs, allow_standin),
        *_machine_problems(runs),
        *_answer_problems(runs),
    ]


# --- the archive


def archive_stem(name: str, number: str, marked: bool = False) -> str:
    """`HW3-Name-StudentNumber`, the archive's name and that of the folder in it.

    Args:
        name: the student's; any script, spaces become hyphens.
        number: the student number; digits of any script.
        marked: whether something in it is of the stand-in.

    Raises:
        ProjectError: one of the two is missing or does not fit.
    """
    name, number = (
        re.sub(" +", "-", unicodedata.normalize("NFC", name).strip(" ")),
        number.strip(" "),
    )
    if not name or not number:
        raise ProjectError(USAGE)
    for character in name:
        # Letters, their marks, digits, and the non-joiner of Persian names; all else may mean something to a file system.
        if unicodedata.category(character)[0] not in "LMN" and character not in "-.'’\u200c":
            raise ProjectError(
                f"NAME holds {character!r}: it takes letters, digits, spaces, hyphens, dots and apostrophes"
            )
    if name.startswith(".") or not any(map(str.isalpha, name)) or len(name.encode()) > 180:
        raise ProjectError("NAME begins with a dot, has no letter or is too long for a file name")
    if not number.isdecimal():
        raise ProjectError(f"ID={number!r} is no student number: it takes digits only")
    return (
        f"HW3-{name}-{''.join(str(unicodedata.decimal(digit)) for digit in number)}"
        + "-STANDIN" * marked
    )


def _files(folder: Path) -> list[Path]:
    """The files below a folder, without what is hidden, half-written or compiled."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in (".part", ".pyc")
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    ]


def _results(runs: list[Run]) -> list[Path]:
    """The results that go with these runs; a stand-in run's takes the place of that of the real data."""
    replaced = {reports_folder(False) / "results" / run.result.name for run in runs if run.standin}
    own = {run.result for run in runs if run.result.is_file()}
    return sorted(set(reports_folder(False).glob("results/*.json")) - replaced | own)


def _models(runs: list[Run]) -> list[Path]:
    return [
        path
        for run in runs
        for path in sorted((run.page.parent / "models").glob(f"{run.name}*.pt"))
    ]


def neutral_pdf(data: bytes) -> bytes:
    """Takes out of Chromium's PDF what differs from run to run; every byte stays at its place, as the PDF's index demands.

    The numbers of the page's nodes become their ranks. Links to files, which name the temporary folder of the page that was
    printed, become relative to `reports/theory/`.
    """
    nodes = sorted(set(re.findall(rb"\(node(\d{8})\)", data)))
    ranks = {node: b"(node%08d)" % rank for rank, node in enumerate(nodes)}
    data = re.sub(rb"\(node(\d{8})\)", lambda match: ranks[match[1]], data)
    return re.sub(
        rb"\(file:[^)]*?/(theory/[^)]*)\)",
        lambda match: (b"(../../%s)" % match[1]).ljust(len(match[0])),
        data,
    )


def _theory(scratch: Path) -> dict[str, bytes]:
    """The theory as a page, and as PDF and page images where a browser is installed."""
    theory_to_html(scratch / "theory.html", sorted((ROOT / "theory").glob("[0-9]*.md")))
    files = {"reports/theory.html": (scratch / "theory.html").read_bytes()}
    try:
        theory_images(scratch / "images")
    except ProjectError as error:
        if (scratch / "images" / "theory.pdf").is_file():
            print(
                "The theory goes as PDF, without page images: these need pdftoppm (apt-get install poppler-utils)."
            )
        else:
            print(
                f"No image of the theory: {error}.\nThe rules ask for a clear one: open reports/theory.html in a browser, "
                "print it to a PDF file and hand that in as well."
            )
    files |= {
        f"reports/theory/{path.name}": path.read_bytes()
        for path in (scratch / "images").glob("theory*")
    }
    return {
        name: neutral_pdf(data) if name.endswith(".pdf") else data for name, data in files.items()
    }


def collect(runs: list[Run], sources: str) -> dict[str, bytes]:
    """Everything that is handed in, by its path in the project, and the `MANIFEST` of it."""
    paths = [path for folder in FOLDERS for path in _files(ROOT / folder)]
    paths += (
        [ROOT / file for file in FILES if (ROOT / file).is_file()]
        + _results(runs)
        + [run.page for run in runs]
    )
    for model in _models(runs):
        if model.stat().st_size <= MODEL_LIMIT:
            paths.append(model)
        else:
            print(
                f"{_relative(model)} is left out: larger than {MODEL_LIMIT // 2**20} MB; its notebook makes it again."
            )
    files = {_relative(path): path.read_bytes() for path in paths}
    files |= {f"notebooks/{run.name}.ipynb": run.path.read_bytes() for run in runs}
    files["theory/SOURCES.md"] = sources.encode()
    with tempfile.TemporaryDirectory() as scratch:
        files |= _theory(Path(scratch))
    return files | {"MANIFEST": manifest(files)}


def manifest(files: dict[str, bytes]) -> bytes:
    """The list of files with their SHA-256 and size in bytes."""
    lines = (
        f"{hashlib.sha256(data).hexdigest()} {len(data):>9} {path}\n"
        for path, data in sorted(files.items())
    )
    return "".join(lines).encode()


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """Writes a zip file whole or not at all, all files in one folder of its name; the same files, the same bytes."""
    part = path.with_name(f"{path.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            for name, data in sorted(files.items()):
                entry = zipfile.ZipInfo(f"{path.stem}/{name}", date_time=(2000, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr = 3, 0o100644 << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=9)
        os.replace(part, path)
    except OSError as error:
        raise ProjectError(f"cannot write {path.name}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def build(name: str, number: str, collaborators: str = "", allow_standin: bool = False) -> Path:
    """Writes the archive to hand in into the project's folder.

    Args:
        name: the student's.
        number: the student number.
        collaborators: names for `theory/SOURCES.md`, where that does not tell them.
        allow_standin: whether runs on the stand-in data may go in; the archive's name then says so.

    Raises:
        ProjectError: a name or number that does not fit, or everything that is not fit to be handed in.
    """
    archive_stem(name, number)
    sources, runs = sources_page(collaborators), find_runs(allow_standin)
    if found := problems(runs, allow_standin):
        raise ProjectError(
            "not ready to be handed in:\n" + "\n".join(f"  {line}" for line in found)
        )
    marked = any(run.standin for run in runs) or any(map(_is_standin_result, _results(runs)))
    path = ROOT / f"{archive_stem(name, number, marked)}.zip"
    write_archive(path, collect(runs, sources))
    size = path.stat().st_size / 2**20
    print(
        f"Wrote {path.name}: {', '.join(run.name for run in runs)}; {size:.1f} MB. `make rerun` tries it out."
    )
    return path


# --- the run elsewhere


def find_archive(given: str) -> Path:
    """The archive that was named, or the one in the project's folder."""
    found = [Path(given)] if given else sorted(ROOT.glob("HW3-*.zip"))
    if len(found) != 1:
        raise ProjectError(
            f"{len(found)} archives HW3-*.zip in the project's folder: name one, make rerun ZIP=…"
            if found
            else "there is no archive HW3-*.zip in the project's folder: make submission first"
        )
    return found[0]


def unpack(path: Path, folder: Path) -> Path:
    """Unpacks an archive after checking that it stays in its own folder and is what its manifest says.

    Args:
        path: the archive.
        folder: an empty folder.

    Returns:
        The project's folder in it.

    Raises:
        ProjectError: the file cannot be read, leaves its folder, or differs from its manifest.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            top = PurePosixPath(next(iter(files), "")).parts[:1]
            for name in files:
                parts = PurePosixPath(name).parts
                if parts[:1] != top or len(parts) < 2 or {"/", ".."} & set(parts) or "\\" in name:
                    raise ProjectError(f"{path.name} holds {name!r}, outside of one folder")
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ProjectError(f"{path.name} cannot be unpacked: {error}") from error
    inside = {name.partition("/")[2]: data for name, data in files.items()}
    if inside.pop("MANIFEST", None) != manifest(inside):
        raise ProjectError(f"{path.name} is not what its MANIFEST says")
    return folder.joinpath(*top)


def make_environment(project: Path, folder: Path) -> Path:
    """Makes a fresh virtual environment from a project's requirements and gives its interpreter."""
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        project / "requirements.txt",
    ]
    if subprocess.run(command).returncode:
        raise ProjectError("the requirements cannot be installed; pip's words are above")
    return python


def _variables() -> dict[str, str]:
    """The environment's variables, without those that lead back to this project; `HW3_DATA` holds from any folder."""
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HW3_ROOT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    if data := variables.get("HW3_DATA"):
        folders = (Path(data).expanduser(), ROOT / data)
        variables["HW3_DATA"] = next(
            (str(folder.resolve()) for folder in folders if folder.is_dir()), data
        )
    return variables


def _stored_result(project: Path, name: str) -> Path:
    places = (
        project / "reports" / folder / "results" / f"{name}.json" for folder in ("", "standin")
    )
    return next(filter(Path.is_file, places), project / "reports" / "results" / f"{name}.json")


def compare(stored: dict, again: dict) -> list[tuple[str, str, str, str]]:
    """Sets two results of one notebook side by side.

    Args:
        stored: the results file's content, as handed in.
        again: as the run elsewhere wrote it.

    Returns:
        Rows (metric, stored, rerun, verdict). The verdict is whether the new value lies within the stored 95 % interval, or,
        where there is none, is equal, else by how much of the stored value it differs; times are not judged.
    """
    whole_run = {"whole run": {"value": stored["seconds"], "ci95": None, "unit": "seconds"}}
    first, second = (
        stored["metrics"] | whole_run,
        again["metrics"] | {"whole run": {"value": again["seconds"]}},
    )
    rows = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        equal = a and b and math.isclose(a["value"], b["value"], rel_tol=1e-9)
        if a is None or b is None:
            verdict = "MISSING" if b is None else "new"
        elif _TIME.search(a["unit"]):
            verdict = "time, not judged"
        elif a["ci95"]:
            low, high = a["ci95"]
            verdict = f"{'within' if equal or low <= b['value'] <= high else 'OUTSIDE'} {low:.6g} to {high:.6g}"
        else:
            gap = f" by {100 * abs(b['value'] / a['value'] - 1):.2g} %" if a["value"] else ""
            verdict = "equal" if equal else f"DIFFERS{gap}"
        rows.append(
            (
                name,
                *("-" if metric is None else f"{metric['value']:.6g}" for metric in (a, b)),
                verdict,
            )
        )
    return rows


def print_comparison(name: str, stored: dict, again: dict) -> None:
    """Prints the table of one notebook, and how much of it agrees."""
    rows = compare(stored, again)
    widths = [
        max(map(len, column)) for column in zip(("metric", "stored", "rerun", "verdict"), *rows)
    ]
    print(f"\n{name}")
    for row in (("metric", "stored", "rerun", "verdict"), *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    judged = [row[3] for row in rows if row[3] != "time, not judged"]
    print(
        f"{sum(verdict.startswith(('within', 'equal')) for verdict in judged)} of {len(judged)} judged metrics agree."
    )
    for key in ("profile", "data_source", "machine"):
        if stored.get(key) != again.get(key):
            print(
                f"Another {key}: {again.get(key)}, stored {stored.get(key)}; the numbers need not agree."
            )


def rerun(path: Path, python: Path | None = None) -> list[str]:
    """Runs an archive's notebooks elsewhere and prints every metric beside the stored one.

    Args:
        path: the archive.
        python: an interpreter with the requirements; by default a fresh environment is made.

    Returns:
        The names of the notebooks that failed.

    Raises:
        ProjectError: the archive or its requirements are not usable.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="HW3 rerun ") as scratch:
        project = unpack(path, Path(scratch))
        python = (
            python.absolute() if python else make_environment(project, Path(scratch, "environment"))
        )
        for name in sorted(notebook.stem for notebook in (project / "notebooks").glob("*.ipynb")):
            result = _stored_result(project, name)
            stored = load_results(result)
            result.unlink()  # what is there afterwards was made by this run
            code = subprocess.run(
                [python, "-m", "tools.run", name], cwd=project, env=_variables()
            ).returncode
            result = _stored_result(project, name)
            if code or not result.is_file():
                failed.append(name)
                print(
                    f"\n{name} FAILED; "
                    + ("its error is above." if code else "it wrote no result."),
                    flush=True,
                )
            else:
                print_comparison(name, stored, load_results(result))
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission", description="The archive to hand in, and its rerun."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="write HW3-Name-StudentNumber.zip")
    building.add_argument("--name", default="", help="the student's name")
    building.add_argument("--id", default="", help="the student number")
    building.add_argument(
        "--collaborators", default="", help="with whom it was discussed (default: none)"
    )
    building.add_argument(
        "--allow-standin",
        action="store_true",
        help="also runs on the stand-in data, marked in the file name",
    )
    running = commands.add_parser(
        "rerun", help="run an archive's notebooks in a fresh environment and compare the numbers"
    )
    running.add_argument(
        "--zip", default="", help="the archive (default: the one in the project's folder)"
    )
    running.add_argument(
        "--python",
        type=Path,
        help="an interpreter with the requirements, in place of a fresh environment",
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "build":
            build(chosen.name, chosen.id, chosen.collaborators, chosen.allow_standin)
        elif failed := rerun(find_archive(chosen.zip), chosen.python):
            raise ProjectError(f"failed elsewhere: {', '.join(failed)}")
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
