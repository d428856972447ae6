"""All theory answers as one page, and as a PDF and page images."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from src import ROOT, ProjectError
from tools.html.browser import run_chromium
from tools.html.page import Page, write_whole


def theory_to_html(out: Path, files: list[Path] | None = None) -> None:
    """Writes all parts of the theory as one HTML page with a table of contents; the same parts, the same bytes.

    Args:
        out: The file to write.
        files: The parts in order; by default `theory/[0-9]*.md`.

    Raises:
        ProjectError: As `notebook_to_html`, naming the part; or there is no part.
    """
    files = (
        sorted((ROOT / "theory").glob("[0-9]*.md"))
        if files is None
        else [Path(file) for file in files]
    )
    if not files:
        raise ProjectError(
            f"no theory to show: {ROOT / 'theory'} holds no file named like 1_name.md"
        )
    page, body = Page("theory", files[0].resolve().parent, out, level=1), "<h1>Theory</h1>\n"
    for file in files:
        page.place, page.folder, page.prefix, page.level = (
            file.name,
            file.resolve().parent,
            f"{file.stem}-",
            1,
        )
        page.ids.add(file.stem)
        body += f'<section id="{file.stem}" class="prose">\n{page.prose(file.read_text(encoding="utf-8"))}</section>\n'
    page.write("Theory", body, *files)


def theory_images(folder: Path) -> list[Path]:
    """Writes the theory as `theory.pdf` and, page by page, as `theory-page-NN.png` (A4 at 150 dpi).

    Raises:
        ProjectError: No Chromium is installed, or no pdftoppm to draw the PDF's pages.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        page, pdf = Path(scratch, "theory.html"), Path(scratch, "theory.pdf")
        theory_to_html(page)
        run_chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
        # The time of printing is all that differs between two runs: other digits of the same length take its place.
        write_whole(
            folder / pdf.name, re.sub(rb"\(D:\d{14}", b"(D:20000101000000", pdf.read_bytes())
        )
        if shutil.which("pdftoppm") is None:
            raise ProjectError(
                f"{folder / pdf.name} is written; its page images need pdftoppm: apt-get install poppler-utils "
                "(macOS: brew install poppler)"
            )
        subprocess.run(
            ["pdftoppm", "-r", "150", "-png", pdf, Path(scratch, "theory-page")], check=True
        )
        for old in folder.glob("theory-page-*.png"):
            old.unlink()
        drawn = sorted(Path(scratch).glob("theory-page-*.png"))
        for image in drawn:
            write_whole(folder / image.name, image.read_bytes())
    return [folder / image.name for image in drawn]
