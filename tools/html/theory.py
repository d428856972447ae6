"""All theory answers as one page, and as a PDF and page images."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from src import ROOT, ProjectError
from tools.html.browser import run_chromium
from tools.html.page import Page


def parts() -> list[Path]:
    """List the files of the theory in order: the first page, the answers, the sources."""
    folder = ROOT / "theory"
    return sorted(folder.glob("[0-9]*.md")) + sorted(folder.glob("SOURCES.md"))


def theory_text(path: Path) -> str:
    """Read a part of the theory.

    Raises:
        ProjectError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProjectError(f"theory/{path.name} is not UTF-8 ({error}): save it as such") from None


def theory_to_html(out: Path, texts: dict[str, str] | None = None) -> None:
    """Write all parts of the theory as one HTML page with a table of contents.

    Args:
        out: The file to write.
        texts: Texts that replace those of the files, by name, such as a filled-in first page.

    Raises:
        ProjectError: As `notebook_to_html`, naming the part; or there is no part.
    """
    files = parts()
    if not files:
        raise ProjectError(
            f"no theory to show: {ROOT / 'theory'} holds no file named like 1_name.md"
        )
    page, body = Page("theory", ROOT / "theory", out, level=1), "<h1>Theory answers</h1>\n"
    for file in files:
        page.place, page.prefix, page.level = file.name, f"{file.stem}-", 1
        page.ids.add(file.stem)
        text = page.prose((texts or {}).get(file.name) or theory_text(file))
        body += f'<section id="{file.stem}" class="prose">\n{text}</section>\n'
        if page.remarks:
            raise ProjectError(f"{page.place}: {page.remarks[0]}")
    page.write("Theory", body, *files)


def theory_images(folder: Path, texts: dict[str, str] | None = None) -> list[Path]:
    """Write the theory as `theory.pdf` and, page by page, as `theory-page-NN.png` (A4, 150 dpi).

    Args:
        folder: Where to write.
        texts: As in `theory_to_html`.

    Raises:
        ProjectError: No Chromium is installed, or no pdftoppm to draw the PDF's pages.
    """
    folder = Path(folder).resolve()
    pdf = folder / "theory.pdf"
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "theory.html")
        theory_to_html(page, texts=texts)
        folder.mkdir(parents=True, exist_ok=True)
        run_chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    if shutil.which("pdftoppm") is None:
        raise ProjectError(
            f"{pdf.name} is written; its page images need pdftoppm: apt-get install poppler-utils "
            "(macOS: brew install poppler)"
        )
    for old in folder.glob("theory-page-*.png"):
        old.unlink()
    subprocess.run(["pdftoppm", "-r", "150", "-png", pdf, folder / "theory-page"], check=True)
    return sorted(folder.glob("theory-page-*.png"))
