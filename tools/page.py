"""Pages of notebooks and of the theory: one HTML file each, without scripts, read without network.

`python -m tools.page NOTEBOOK.ipynb PAGE.html` writes the page of an executed notebook,
`... reports/theory.html` that of the theory, `... FOLDER` the theory as PDF and pictures.
"""

import base64
import html
import mimetypes
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
from xml.etree import ElementTree

from bs4 import BeautifulSoup
from latex2mathml.converter import convert_to_element
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_markdown_cell, new_notebook

from src import ROOT, ProjectError
from src.files import write_whole
from tools import notebooks

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
BROWSERS += ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
HEADLESS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-pdf-header-footer".split()
_ACTIVE = ["script", "iframe", "frame", "object", "embed", "link", "base", "meta", "form"]
_IN_ONE_LINE = r'<span class="tex">\g<0></span>'
_TYPOGRAPHY = {  # what is replaced in prose, by what
    r'[(\[]*<math [^>]*"inline">.*?</math>[^\s<]*': _IN_ONE_LINE,  # a formula and its punctuation
    r"\b[A-Z]-[A-Z]\w+(?![^<]*>)": _IN_ONE_LINE,  # a name such as U-Net
    r"(?<=\d) ([×→]) (?=\d)": "\u00a0\\1\u00a0",  # a size
}
_SPELLINGS = {  # what latex2mathml does not know, in words that it does
    r"(?<=\d)\{,\}(?=\d)": r"\\text{,}",
    r"\\(math[a-z]+)\s+([A-Za-z])": r"\\\1{\2}",
    r"\{(aligned|align|split|gather|gathered)\}": "{align*}",
}


def notebook_to_html(notebook, page):
    """Write the page of an executed notebook; what it leaves out is named in its place.

    Pictures are looked up from the notebook's folder, then from `notebooks/`. A ProjectError if the
    notebook cannot be read, or the page not be written.
    """
    folders = [Path(notebook).parent, notebooks.FOLDER]
    _write(notebooks.read(Path(notebook)), "notebooks", folders, Path(page))


def theory_to_html(page, folder=ROOT / "theory"):
    """Write the page of the theory: its numbered parts in order, then the sources."""
    cells = [new_markdown_cell("# Theory answers")]
    for file in [*sorted(folder.glob("[0-9]*.md")), *folder.glob("SOURCES.md")]:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
        cells.append(new_markdown_cell(text, metadata={"part": file.stem}))
    _write(new_notebook(cells=cells), "theory", [folder], Path(page))


def theory_images(folder, theory=ROOT / "theory"):
    """Write the theory as `theory.pdf` and its pages as `theory-page-NN.png` (A4, 150 dpi).

    A ProjectError if Chromium is not installed, or pdftoppm, which draws the PDF's pages.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pdf = folder / "theory.pdf"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        page = Path(scratch, "theory.html")
        theory_to_html(page, theory)
        options = [*HEADLESS, f"--user-data-dir={scratch}", f"--print-to-pdf={pdf}"]
        run_program(BROWSERS, *options, page.as_uri())
    for old in folder.glob("theory-page-*.png"):
        old.unlink()
    run_program(["pdftoppm"], "-r", "150", "-png", pdf, folder / "theory-page")
    return sorted(folder.glob("theory-page-*.png"))


def run_program(names, *arguments):
    """Run the first of some programs that is installed; a ProjectError where none runs well."""
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        raise ProjectError(f"{names[0]} is not installed; it is needed to draw pages.")
    try:
        command = [program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ProjectError(f"{program} failed: {error}") from error


class _Renderer(IPythonRenderer):
    """Markdown as Jupyter reads it; formulas become MathML."""

    def inline_math(self, body):
        return mathml(body, "inline")

    def block_math(self, body):
        return f'<span class="formula">{mathml(body, "block")}</span>\n'

    def latex_environment(self, name, body):
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def table(self, text):
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def image(self, text, url, title=None):
        for mime, data in self.attachments.get(url.removeprefix("attachment:"), {}).items():
            url = f"data:{mime};base64,{data}"
        return super(IPythonRenderer, self).image(text, url, title)  # one that is missing is told


def closed(fragment):
    """Close the tags that a piece of HTML leaves open."""
    return str(BeautifulSoup(fragment, "html.parser"))


def _replaced(text, replacements):
    for pattern, replacement in replacements.items():
        text = re.sub(pattern, replacement, text)
    return text


def prose(text, attachments=None):
    """Render Markdown; formulas with their punctuation, and sizes, stay in one line."""
    renderer = _Renderer(escape=False, exclude_anchor_links=True, attachments=attachments or {})
    page = MarkdownWithMath(renderer).render(text)
    return closed(_replaced(page, _TYPOGRAPHY))


def mathml(tex, display):
    """Convert a formula to MathML Core; what cannot be converted is shown as it is written."""
    try:
        tree = convert_to_element(_replaced(tex.strip(), _SPELLINGS), display=display)
    except Exception:  # whatever the converter stumbles over
        return f"<code>{html.escape(tex)}</code>"
    for node in tree.iter():  # browsers space some symbols otherwise than latex2mathml expects
        node.text = text = html.unescape(node.text or "")
        if node.tag in ("mi", "mo") and len(text) > 1 and text.isalpha():  # such as log
            node.tag, node.attrib = "mo", {"lspace": "0.167em", "rspace": "0.167em"}
        elif text in list("|‖⌊⌋⌈⌉") and node.get("stretchy") != "true":
            node.tag, node.attrib = "mo", {"stretchy": "false", "lspace": "0", "rspace": "0"}
        elif node.tag == "msup" and node[1].text == "&#x02032;":  # fonts draw the prime raised
            node.tag = "mrow"
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


def _write(notebook, kind, folders, page):
    exporter = HTMLExporter(
        template_file=str(Path(__file__).with_name("page.html.j2")),
        preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"],
        filters={"prose": prose, "closed": closed},
    )
    soup = BeautifulSoup(exporter.from_notebook_node(notebook, {"kind": kind})[0], "html.parser")
    _stand_alone(soup, folders)
    _outline(soup)
    home = "../.." if page.resolve().parent.name in ("standin", "demo") else ".."
    for link in soup.main.select("a[href]"):
        link["href"] = _target(link, f"{home}/{kind}")
    write_whole(page, str(soup).encode("utf-8", "replace"))


def _stand_alone(soup, folders):
    """Embed pictures, sound and films; leave out what runs or loads; set captions."""
    for tag in soup.main(_ACTIVE):
        tag.replace_with(f"[left out: {tag.name}, for which a page must run or load something]")
    for tag in soup.main.select("[src]:not([src^='data:'])"):
        files = (os.path.join(folder, unquote(tag["src"])) for folder in folders)
        if file := next(filter(os.path.isfile, files), None):
            data = base64.b64encode(Path(file).read_bytes()).decode()
            tag["src"] = f"data:{mimetypes.guess_type(file)[0]};base64,{data}"
        else:
            tag.replace_with(f"[missing: {tag['src']}, {tag.get('alt')}]")
    for image in soup.main("img"):
        block, caption = image.parent, image.parent.find_next_sibling()
        if caption and re.match(r"\s*Figure \w+\.", caption.text) and not block.text.strip():
            block.name, caption.name = "figure", "figcaption"
            block.append(caption)


def _slug(text):
    """A heading's anchor as GitHub forms it; Jupyter's form (`#4.-The-loss`) gives the same."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def _outline(soup):
    """Give every heading its anchor; name the page; list two levels in its contents."""
    for heading in soup.main(["h1", "h2", "h3", "h4", "h5"]):
        anchor = _slug(heading.text)
        if heading.find_parent("section", id=True):  # a part of the theory
            heading.name = f"h{int(heading.name[1]) + 1}"
        while soup.find(id=anchor):
            anchor += "-1"
        heading["id"] = anchor
    soup.title.string = (soup.main.h1 or soup.title).text
    for heading in soup.main(["h2", "h3"]):
        item = f'<li class="{heading.name}"><a href="#{heading["id"]}">'
        item += f"{heading.decode_contents()}</a></li>"
        soup.nav.ul.append(BeautifulSoup(item, "html.parser"))


def _target(link, folder):
    """Point a link to the page that shows a notebook, or to a part of the theory."""
    path, _, fragment = unquote(link["href"]).partition("#")
    name, in_theory = PurePosixPath(path).stem, link.find_parent("section", id=True)
    if ":" in path:
        return link["href"]
    if not path or (in_theory and re.fullmatch(r"(\d.*|SOURCES)\.md", path)):
        return f"#{_slug(fragment) or name}"
    if path.endswith(".ipynb"):
        return f"{name}.html#{_slug(fragment)}"
    return posixpath.normpath(f"{folder}/{link['href']}")


def main(arguments):
    """Write what is asked for."""
    notebooks.print_anything()
    paths = [Path(argument) for argument in arguments] or [Path("reports", "theory.html")]
    write = theory_to_html if paths[0].suffix == ".html" else theory_images
    try:
        (notebook_to_html if len(paths) == 2 else write)(*paths)
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
