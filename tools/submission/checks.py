"""What speaks against handing a project in, each problem with its notebook, cell or file.

A check is a function of a run, or of all runs, that yields one line per problem; add it to
`RUN_CHECKS` or to `problems`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mistune
import nbformat

from src import ROOT, ProjectError
from src.provenance import code_fingerprint
from src.results import load_results, reports_folder
from tools import notebooks
from tools.html import digest, theory_text

# The questions of the assignment as the headings in theory/ number them; the parts of the fourth
# belong to Practical 2. Each Practical is quoted by the notebook that answers it.
THEORY = "1.1 2.1 2.2 2.3 2.4 3.1a 3.1b 3.1c 3.2a 3.2b 3.3a 3.3b 3.4a 3.4b 4.1 4.2 4.3 4.4".split()
PRACTICAL = (1, 2, 3)

_PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|FIXME)\b|\bto be filled in\b|\byour (?:answer|code) (?:here|goes)\b"
    r"|\braise NotImplementedError|\blorem ipsum|(?:پاسخ|جواب|کد) خود را",
    re.I,
)
MACHINE_PATH = re.compile(
    r"(?<![\w.-])/(?:home|Users|root|tmp|work|var/folders)/[^\s'\"<>]*"
    r"|\b[A-Za-z]:[\\/]+Users[\\/][^\s'\"<>]*"
)
_NO_TEXT = re.compile(  # in JSON: encoded media, colours of a terminal, white space
    r'"(?:image/(?!svg)|audio/|video/)[^"]*": "[^"]*"|\\u001b\[[0-9;]*[A-Za-z]|\\[nrt]'
)


@dataclass(frozen=True)
class Run:
    """An executed notebook and what its run wrote."""

    name: str
    path: Path  # notebooks/NAME.ipynb, or reports/standin/NAME.ipynb
    notebook: nbformat.NotebookNode

    @property
    def place(self) -> str:
        return relative(self.path)

    @cached_property
    def about(self) -> dict:
        return notebooks.about(self.notebook)

    @property
    def trial(self) -> bool:
        return is_trial(self.about)

    @property
    def reports(self) -> Path:
        """The folder of page and results: the notebook's own, or that of all committed ones."""
        return reports_folder() if self.path.parent == notebooks.FOLDER else self.path.parent

    @property
    def page(self) -> Path:
        return self.reports / f"{self.name}.html"

    @property
    def result(self) -> Path:
        return self.reports / "results" / f"{self.name}.json"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_trial(about: dict) -> bool:
    """Whether a run, or a results file, only shows that everything works: stand-in, smoke, demo."""
    return bool(about.get("standin")) or about.get("profile") in ("smoke", "demo")


def find_runs(allow_standin: bool) -> list[Run]:
    """List the runs to hand in: the notebooks as they are.

    Where the stand-in is allowed and a notebook cannot go as it is, its run on the stand-in goes.

    Raises:
        ProjectError: A notebook cannot be read.
    """
    runs = []
    for name in notebooks.names():
        run = Run(name, notebooks.FOLDER / f"{name}.ipynb", notebooks.read(name))
        other = reports_folder(True) / f"{name}.ipynb"
        if allow_standin and other.is_file() and any(run_problems(run, allow_standin)):
            run = Run(name, other, notebooks.read_file(other))
        runs.append(run)
    return runs


def problems(runs: list[Run], allow_standin: bool) -> list[str]:
    """List all that speaks against these runs, with this project's theory and results."""
    found = [line for run in runs for line in run_problems(run, allow_standin)]
    return found + list(_result_problems(runs, allow_standin)) + list(answer_problems(runs))


def run_problems(run: Run, allow_standin: bool) -> Iterator[str]:
    for check in RUN_CHECKS:
        yield from check(run)
    if run.trial and not allow_standin:
        profile = run.about.get("profile")
        yield (
            f"{run.place}: a run of profile {profile} on {run.about.get('data_source')}; run it "
            "on real data with another profile, or hand it in marked as such: ALLOW_STANDIN=1"
        )


# --- one run


def _cells(run: Run) -> Iterator[tuple[str, dict]]:
    for number, cell in enumerate(run.notebook.cells, 1):
        yield f"{run.place}, cell {number}", cell


def _cell_problems(run: Run) -> Iterator[str]:
    for place, cell in _cells(run):
        if found := _PLACEHOLDER.search(cell.source):
            yield f"{place}: it still holds the placeholder {found[0]!r}"
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"{place}: it failed with {output.ename}: {output.evalue}"
            if found := machine_path(output):
                yield f"{place}: the output names this machine: {found!r}; print relative paths"


def machine_path(value) -> str | None:
    """Find a path of this machine in an output or a result; a picture's bytes do not count."""
    text = _NO_TEXT.sub(" ", json.dumps(value, ensure_ascii=False))
    found = MACHINE_PATH.search(text)
    return found[0] if found else str(ROOT) if str(ROOT) in text else None


def order_problems(run: Run) -> Iterator[str]:
    """Code cells are numbered 1, 2, 3, …: run once each, top to bottom, in a fresh kernel."""
    # An empty cell is not run and does not count.
    code = [(p, c) for p, c in _cells(run) if c.cell_type == "code" and c.source.strip()]
    for count, (place, cell) in enumerate(code, 1):
        if cell.execution_count != count:
            number = cell.execution_count
            how = f"run as number {number}, not {count}" if number else "not run"
            yield f"{place}: it was {how}; restart the kernel and run all cells, or `make html`"
            return


def page_problems(run: Run) -> Iterator[str]:
    """A page names the digest of the notebook that it was made from."""
    again = f"python -m tools.html notebook {run.place} {relative(run.page)}"
    stamp = f'<meta name="source-sha256" content="{digest(run.path)}">'
    if not run.page.is_file():
        yield f"{run.place}: its page {relative(run.page)} is missing; {again}"
    elif stamp not in run.page.read_text(encoding="utf-8", errors="replace"):
        yield f"{run.place}: its page {relative(run.page)} shows another state of it; {again}"


def _code_problems(run: Run) -> Iterator[str]:
    """The fingerprint of the present code is that of the outputs and that of the results."""
    try:
        stored = load_results(run.result)
    except ProjectError as error:
        yield f"{run.place}: {error}"
        return
    source, made = notebooks.FOLDER / f"{run.name}.ipynb", stored.get("fingerprint")
    if any(code_fingerprint(path, folder=ROOT) != made for path in {source, run.path}):
        yield f"{run.place}: its results are older than its code; run the notebook again"
    elif run.about.get("fingerprint") != made:
        yield f"{run.place}: outputs and {relative(run.result)} are of two runs; run it again"


def _notebook_answers(run: Run) -> Iterator[str]:
    blocks, level = [], 0
    for place, cell in _cells(run):
        if cell.cell_type == "markdown":
            blocks += markdown_blocks(cell.source, place, level)
            level = blocks[-1].level if blocks else 0
        elif cell.source.strip():
            blocks.append(Block("text", level, cell.source, place))
    yield from unanswered_lines(blocks)


RUN_CHECKS = (_cell_problems, order_problems, page_problems, _code_problems, _notebook_answers)


# --- all results


def results_of(runs: list[Run]) -> list[Path]:
    """List the results that go with these runs; a stand-in run's replaces that of the real data."""
    results = [*reports_folder().glob("results/*.json"), *(run.result for run in runs)]
    return sorted({path.name: path for path in results if path.is_file()}.values())


def _result_problems(runs: list[Run], allow_standin: bool) -> Iterator[str]:
    """Results are whole, and of real data unless allowed."""
    for path in results_of(runs):
        try:
            stored = load_results(path)
        except ProjectError as error:
            yield f"{relative(path)}: {error}"
            continue
        if is_trial(stored) and not allow_standin:
            kind = f"profile {stored.get('profile')}, {stored.get('data_source')}"
            yield f"{relative(path)}: a result of {kind}"
        if found := machine_path({k: v for k, v in stored.items() if k != "metrics"}):
            yield f"{relative(path)}: it names this machine: {found!r}"


def remarks(runs: list[Run]) -> Iterator[str]:
    """Name benchmarks and trials that were made by earlier code; nothing speaks against those.

    No notebook writes them, no task asks for them, and each names its commit. Any change in `src`
    makes them older, while few of them change what they measured.
    """
    sources = [notebooks.FOLDER / f"{run.name}.ipynb" for run in runs]
    present = {code_fingerprint(*paths, folder=ROOT) for paths in ([], *([s] for s in sources))}
    for path in sorted(set(results_of(runs)) - {run.result for run in runs}):
        if load_results(path).get("fingerprint", "") not in present | {""}:
            yield f"{relative(path)}: measured by earlier code; make it again to be sure"


# --- answers


@dataclass(frozen=True)
class Block:
    """A heading, a quotation (the assignment's words), or anything else."""

    kind: str  # heading, quote or text
    level: int  # of the heading, or of the one it stands under
    text: str
    place: str


def markdown_blocks(text: str, place: str, level: int = 0) -> list[Block]:
    """Take Markdown apart.

    Args:
        text: The Markdown.
        place: Where it stands, for messages.
        level: Of the heading that it stands under.
    """
    blocks = []
    for token in mistune.create_markdown(renderer=None)(text):
        kind = {"heading": "heading", "block_quote": "quote"}.get(token["type"], "text")
        if kind == "heading":
            level = token["attrs"]["level"]
        if re.search(r"\w", words := " ".join("".join(_words(token)).split())):
            blocks.append(Block(kind, level, words, place))
    return blocks


def _words(token: dict) -> Iterator[str]:
    yield token.get("raw", " " if token["type"] == "softbreak" else "")
    for child in token.get("children", ()):
        yield from _words(child)


def unanswered(blocks: Iterable[Block]) -> list[Block]:
    """List the headings and quotations with nothing of the student's below them.

    A heading reaches to the next of its level or above, a quotation to the next quotation.
    """
    waiting, empty = [], []
    for block in blocks:
        if block.kind == "text":
            waiting = []
            continue
        if block.kind == "heading":
            ended = [b for b in waiting if block.level <= b.level]
        else:
            ended = [b for b in waiting if b.kind == "quote"]
        empty += ended
        waiting = [b for b in waiting if b not in ended] + [block]
    return empty + waiting


def unanswered_lines(blocks: Iterable[Block]) -> Iterator[str]:
    for block in unanswered(blocks):
        yield f"{block.place}: nothing answers {block.text[:80]!r}"


def answer_problems(runs: list[Run]) -> Iterator[str]:
    """Every question of the assignment has its answer; no theory file is empty or half done."""
    numbered = set()
    for path in sorted((ROOT / "theory").glob("[0-9]*.md")):
        text = theory_text(path)
        blocks = markdown_blocks(text, path.name)
        if not any(block.kind == "text" for block in blocks):
            yield f"{path.name}: it is empty"
        else:
            yield from unanswered_lines(blocks)
        for number, line in enumerate(text.splitlines(), 1):
            if found := _PLACEHOLDER.search(line):
                yield f"{path.name}, line {number}: it still holds the placeholder {found[0]!r}"
        numbered |= {block.text.split()[0] for block in blocks if block.kind == "heading"}
    for question in THEORY:
        if question not in numbered:
            yield f"theory: question {question} has no answer; its heading starts with this number"
    texts = [cell.source for run in runs for _, cell in _cells(run) if cell.cell_type == "markdown"]
    for number in PRACTICAL:
        if not any(re.search(rf"^>.*\bPractical {number}\b", text, re.M) for text in texts):
            yield f"notebooks: none quotes the task of Practical {number}, so it has no answer"
