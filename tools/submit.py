"""Pack what is handed in, or say what speaks against it (`make submission`).

python -m tools.submit --name=NAME --id=ID [--collaborators=NAMES] [--allow-standin]
"""

import argparse
import hashlib
import re
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

from src import ROOT, ProjectError
from src.files import replacing
from src.run import cell_digest, load_results, src_digest
from tools import notebooks, page

USAGE = 'make submission NAME="Your Name" ID=StudentNumber, of letters, digits, spaces, hyphens'
CODE = "notebooks/* src/**/* tests/**/* theory/**/* tools/**/* data/README.md *.md *.toml"
CODE += " LICENSE Makefile requirements.txt constraints.txt"
UNWANTED = re.compile(r"(^|/)(\.|__pycache__/)|\.(part|ipynb)$")
LIMIT = 8 * 2**20  # bytes of a model; larger ones are made again by their notebooks
FOLDERS = {"smoke": "standin", "demo": "demo"}  # of reports/, for profiles that only demonstrate
AGAIN = "restart the kernel, run all cells and save (or: make html)"
MARK = b"made by tools.submit"  # the end of every archive of this tool


def archive_name(name, number):
    """Form `HW3-Name-StudentNumber`, in any script; a ProjectError where one of them is no name."""
    name = "-".join(unicodedata.normalize("NFC", name).split())
    number = "".join(str(unicodedata.decimal(digit, digit)) for digit in number.strip())
    plain = re.sub("[-_.'’\u200c\u200d]", "", name)  # the last two join letters
    fits = plain and all(unicodedata.category(letter)[0] in "LMN" for letter in plain)  # M: marks
    if not (fits and number.isalnum()):
        raise ProjectError(f"NAME={name!r} ID={number!r} cannot name an archive: {USAGE}")
    return f"HW3-{name}-{number}"


class Run:
    """A notebook as it was saved, where its run wrote results, and what speaks against it."""

    def __init__(self, path, root, allow_standin):
        self.path, self.root, self.notebook = path, root, notebooks.read(path)
        about = notebooks.about(self.notebook)
        kind = "standin" if about.get("standin") else FOLDERS.get(about.get("profile"), "")
        self.reports, self.is_demonstration = root / "reports" / kind, bool(kind)
        self.result = self.reports / "results" / f"{path.stem}.json"
        self.problem = next(self._problems(allow_standin), None)

    def _problems(self, allow_standin):
        name, result = (path.relative_to(self.root).as_posix() for path in (self.path, self.result))
        code = (load_results(self.result) or {}).get("code")
        last, between = None, 0  # cells of comments and commands may be run at any time
        for number, cell in enumerate(self.notebook.cells, 1):
            if cell.cell_type != "code":
                continue
            place = f"{name}, cell {number} ({cell.source.strip()[:30]!r})"
            digest, count = cell_digest(cell.source), cell.execution_count
            if errors := [output.ename for output in cell.outputs if "ename" in output]:
                yield f"{place} ended with {errors[0]}: mend it, then {AGAIN}."
            if digest is None:
                between += 1
            elif count is None:
                yield f"{place} was not run: {AGAIN}."
            elif last is not None and not 1 <= count - last <= 1 + between:
                yield f"{place} was run as number {count} after number {last}: {AGAIN}."
            elif code and digest not in code["cells"]:
                yield f"{place} has changed since it was run (or follows run.save): {AGAIN}."
            else:
                last, between = count, 0
        if self.is_demonstration and not allow_standin:
            yield f"{name} is a demonstration: run it on real data, or mark it, ALLOW_STANDIN=1."
        if not code:
            yield f"{name} has no (or an old) {result}: copy it from where it ran, or {AGAIN}."
        elif code["src"] != src_digest(self.root):
            yield f"{name} is older than the code in src/: {AGAIN}."


def collect(runs, root):
    """Gather all that is handed in, {path: content}, and remarks for the student."""
    files, remarks, src = {}, [], src_digest(root)
    results = {path.name: path for path in root.glob("reports/results/*.json")}
    results |= {run.result.name: run.result for run in runs}
    models = [path for run in runs for path in run.reports.glob(f"models/{run.path.stem}*.pt")]
    paths = [path for path in models if path.stat().st_size <= LIMIT]
    paths += [path for pattern in CODE.split() for path in root.glob(pattern)]
    for path in results.values():
        paths += [path, path.with_suffix(".npz")]
        if (load_results(path) or {}).get("code", {}).get("src", src) != src:
            remarks.append(f"{path.name} was measured with earlier code: measure again to be sure.")
    for path in filter(Path.is_file, paths):
        place = path.relative_to(root).as_posix()
        if not UNWANTED.search(place):
            files[place] = path.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        reports = Path(scratch, "reports")
        for run in runs:
            files[f"notebooks/{run.path.name}"] = run.path.read_bytes()
            page.notebook_to_html(run.path, reports / f"{run.path.stem}.html")
        page.theory_to_html(reports / "theory.html", root / "theory")
        try:
            page.theory_images(reports / "theory", root / "theory")
        except ProjectError as error:
            remarks.append(f"The homework wants images of the theory, which are missing. {error}")
        for path in filter(Path.is_file, reports.rglob("*")):
            content = re.sub(rb"\(D:\d{14}", b"(D:19800101000000", path.read_bytes())  # of the PDF
            files[path.relative_to(scratch).as_posix()] = content
    return files, remarks


def build(name, number, collaborators="", allow_standin=False, root=ROOT):
    """Write the archive into the project's folder, and give remarks for the student.

    A ProjectError tells what speaks against it, a line a notebook, or that it cannot be written.
    """
    title, names = archive_name(name, number), notebooks.names(root / "notebooks")
    if len(names) < 3:
        raise ProjectError(f"notebooks/ holds only {', '.join(names) or 'none'}: all three go in.")
    runs = []
    for notebook in names:  # a demonstration goes only where the notebook itself is not fit
        paths = [root / f"notebooks/{notebook}.ipynb", *root.glob(f"reports/*/{notebook}.ipynb")]
        tried = [Run(path, root, allow_standin) for path in paths[: None if allow_standin else 1]]
        runs.append(min(tried, key=lambda run: run.problem is not None))
    if problems := [run.problem for run in runs if run.problem]:
        raise ProjectError("\n".join(problems))
    title += "-STANDIN" * any(run.is_demonstration for run in runs)
    path = root / f"{title}.zip"
    if path.exists() and not path.read_bytes().endswith(MARK):
        raise ProjectError(f"{path.name} is there and not of this tool: move it elsewhere.")
    files, remarks = collect(runs, root)
    lines = [f"{title}\nCollaborators: {' '.join(collaborators.split()) or 'none'}\n"]
    for place, content in sorted(files.items()):
        lines.append(f"{hashlib.sha256(content).hexdigest()} {len(content):>9} {place}\n")
    files["MANIFEST"] = "".join(lines).encode()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = MARK
        for place, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{title}/{place}")  # dated 1980: equal content, equal archive
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return [f"Wrote {path.name}, {path.stat().st_size / 2**20:.1f} MB.", *remarks]


def main(arguments=None, root=ROOT):
    """Run `python -m tools.submit` and give its exit status."""
    notebooks.print_anything()
    parser = argparse.ArgumentParser(prog="python -m tools.submit")
    for option in ("--name", "--id", "--collaborators"):
        parser.add_argument(option, default="")
    parser.add_argument("--allow-standin", action="store_true")
    chosen = parser.parse_args(arguments)
    try:
        lines = build(chosen.name, chosen.id, chosen.collaborators, chosen.allow_standin, root)
    except (ProjectError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
