"""Self-contained HTML of an executed notebook and of the theory: one file each, readable with the network off.

Formulas become MathML (latex2mathml), images data URIs, highlighting inline CSS (Pygments); there is no script. What would
need a network, a script or eyes (an external address, a `<script>`, an image without alt text) is an error that names its
place, and the page's own Content-Security-Policy forbids any request in the browser too.

    python -m tools.html notebook notebooks/NAME.ipynb reports/NAME.html
    python -m tools.html theory reports/theory.html
    python -m tools.html images reports/theory
"""

import argparse
import base64
import hashlib
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

import bs4
import mistune
import nbformat
from latex2mathml.converter import Converter
from mistune.toc import render_toc_ul
from mistune.util import striptags
from nbconvert.filters import strip_ansi
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from src import ROOT, ProjectError

# GitHub's rules: no space inside the dollars; a formula may run over a line's end; $$…$$ may stand alone or in a line.
_TEX = r"(?:[^$\\]|\\[\s\S])+?"
_BLOCK_MATH = rf"^ {{0,3}}\$\$(?P<block_tex>{_TEX})\$\$[ \t]*(?:\n|$)"
_INLINE_MATH = (
    rf"\$\$(?P<display_tex>{_TEX})\$\$|\$`(?P<quoted_tex>[^`]+)`\$"
    rf"|\$(?![\s$])(?P<inline_tex>{_TEX})(?<!\s)\$(?!\d)"
)
_STRAY_MATH = r"\$|\\begin\{"
_TEX_SPELLINGS = (  # what latex2mathml does not know, in words that it does
    (r"\{(aligned|align|split)\}", "{align*}"),
    (r"\\(math[a-z]+)\s+([A-Za-z])", r"\\\1{\2}"),
    (r"(?<=\d)\{,\}(?=\d)", r"\\text{,}"),
    (r"\\arg\s*\\(max|min)", r"\\arg\1"),
    (r"\\operatorname\*?\{arg\s*(?:\\[,; ])?\s*\\?(max|min)\}", r"\\arg\1"),
    (r"\\operatorname\*", r"\\operatorname"),
)
_LIMITS = ("lim", "max", "min", "sup", "inf", "arg\u2009max", "arg\u2009min")
_RICHEST = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")
_ALONE = {"script", "iframe", "object", "embed", "link", "base"}
_REQUESTING = {
    "src",
    "srcset",
    "data",
    "poster",
    "background",
    "action",
    "formaction",
    "href",
    "xlink:href",
}
_LOADING_CSS = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.I)
_SCHEME = re.compile(r"[a-z][a-z+.-]*:|//", re.I)
_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    *(f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")),
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="source-sha256" content="{source}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<style>
{style}</style></head>
<body class="{kind}">
{nav}<main>
{body}</main></body></html>
"""


def mathml(tex: str, display: bool) -> str:
    """Converts one formula to MathML Core, the part of MathML that browsers draw.

    latex2mathml passes over what it does not know, and leaves spacing and alignment to attributes that MathML Core dropped;
    both are mended here.

    Raises:
        ValueError: The formula holds an unknown command, unbalanced braces, or `&` or a line break outside an environment.
    """
    bare = re.sub(r"\\.", "", tex)
    if bare.count("{") != bare.count("}"):
        raise ValueError("unbalanced braces")
    for pattern, replacement in _TEX_SPELLINGS:
        tex = re.sub(pattern, replacement, tex)
    tree = Converter(display="block" if display else "inline").convert_to_element(tex)
    for node in tree.iter():
        text = html.unescape(node.text or "")
        node.text = text = re.sub(r"\\([$%&#_{}])", r"\1", text) if node.tag == "mtext" else text
        if "\\" in text or text == "&" or node.get("linebreak"):
            raise ValueError(f"{text or 'a line break'} is not known here")
        if (
            node.tag in ("mi", "mo") and len(text) > 1 and "".join(text.split()).isalpha()
        ):  # a function's name
            node.tag, node.attrib["lspace"], node.attrib["rspace"] = "mo", "0.167em", "0.167em"
        elif text in ("|", "‖", "⌊", "⌋", "⌈", "⌉") and node.get("stretchy") != "true":
            node.tag, node.attrib = "mo", {"stretchy": "false", "lspace": "0", "rspace": "0"}
        elif text == "∞":
            node.tag = "mi"
    for node in tree.iter():
        for child, following in zip(node, node[1:]):
            if child.get("rspace") and following.text == "(":
                child.set("rspace", "0")
        if node.tag == "mtable":
            padding = (
                ";padding-inline:0"
                if node.attrib.pop("columnspacing", "").startswith("0em")
                else ""
            )
            for cell in node.iter("mtd"):
                if align := cell.attrib.pop(
                    "columnalign", None
                ):  # Chromium aligns a formula by the prefixed name alone
                    cell.set("style", f"text-align:{align};text-align:-webkit-{align}{padding}")
        elif display and node.tag == "msub" and node[0].text in _LIMITS:
            node.tag = "munder"
        elif node.tag == "msup" and node[1].text in (
            "′",
            "″",
            "‴",
        ):  # which math fonts draw raised already
            node.tag, node[1].tag, node[1].attrib = "mrow", "mo", {"lspace": "0", "rspace": "0"}
        elif node.tag in ("mover", "munder") and node[1].text == "―":
            node.set("style", f"border-{'top' if node.tag == 'mover' else 'bottom'}:0.06em solid")
            node.tag = "mrow"
            node.remove(node[1])
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


def _math_plugin(md: mistune.Markdown) -> None:
    """Teaches mistune the formulas of a repository's web page; code spans and blocks keep their dollars."""

    def formula(_, match, state):
        name, tex = next(
            (name, tex) for name, tex in match.groupdict().items() if name.endswith("_tex") and tex
        )
        kind = "block_math" if name in ("block_tex", "display_tex") else "inline_math"
        state.append_token({"type": kind, "raw": tex.strip()})
        return match.end()

    def stray(_, match, state):
        raise ProjectError(
            f"{md.renderer.place}: {match[0]!r} opens no formula in {state.src.strip()[:60]!r}; write "
            r"$…$ without spaces at its ends, environments between $$ and $$, and \$ for a dollar"
        )

    md.block.register("block_math", _BLOCK_MATH, formula, before="list")
    md.block.insert_rule(md.block.block_quote_rules, "block_math", before="list")
    md.block.insert_rule(md.block.list_rules, "block_math", before="list")
    md.inline.register("inline_math", _INLINE_MATH, formula, before="codespan")
    md.inline.register("stray_math", _STRAY_MATH, stray, before="codespan")


def _slug(text: str) -> str:
    """A heading's anchor, as a repository's web page forms it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _code(source: str, language: str) -> str:
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f'<pre class="code"><code>{highlight(source, lexer, HtmlFormatter(nowrap=True)).rstrip()}</code></pre>\n'


def _last_state(text: str) -> str:
    """What a terminal shows at the end: a carriage return overwrites the line, so a progress bar keeps its last state."""
    lines, row, fresh = [""], 0, True
    for piece in filter(None, re.split(r"(\r|\n|\x1b\[A)", text)):
        if piece in ("\r", "\n", "\x1b[A"):
            row, fresh = max(0, row + {"\r": 0, "\n": 1, "\x1b[A": -1}[piece]), True
            lines += [""] * (row == len(lines))
        elif plain := strip_ansi(piece):
            lines[row], fresh = plain if fresh else lines[row] + plain, False
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _merged(outputs: list) -> list:
    """Joins the pieces of a stream: printed text where it follows itself, a progress bar over the whole cell."""
    merged = []
    for output in outputs:
        earlier = merged if output.get("name") == "stderr" else merged[-1:]
        same = [
            one
            for one in earlier
            if one.output_type == output.output_type == "stream" and one.name == output.name
        ]
        if same:
            same[0].text += output.text
        else:
            merged.append(output)
    return merged


class _Page(mistune.HTMLRenderer):
    """Renders Markdown and outputs into one page, and keeps its headings, anchors and links.

    Set before each piece: `place` (named in errors), `folder` (of its images), `prefix` (of its anchors).
    """

    def __init__(self, kind: str, folder: Path, out: Path, level: int = 0):
        super().__init__(escape=False)
        self.kind, self.folder, self.out, self.level, self.shift = (
            kind,
            folder,
            Path(out).resolve(),
            level,
            level,
        )
        self.home = (
            os.path.relpath(ROOT, self.out.parent) if self.out.is_relative_to(ROOT) else ".."
        )
        self.place, self.prefix, self.headings, self.ids, self.links = "", "", [], set(), []
        self.markdown = mistune.create_markdown(
            renderer=self, plugins=["strikethrough", "table", "url", _math_plugin]
        )

    def prose(self, text: str) -> str:
        """Markdown as HTML, checked; a formula in a line stays together with the punctuation at its ends."""
        formula = r'[(\[]*<math [^>]*"inline">.*?</math>[^\s<]*'
        return self.checked(re.sub(formula, r'<span class="tex">\g<0></span>', self.markdown(text)))

    def checked(self, fragment: str) -> str:
        """Refuses what would need a network, a script or eyes."""
        for tag in bs4.BeautifulSoup(fragment, "html.parser").find_all(True):
            sources = [tag[name] for name in _REQUESTING & tag.attrs.keys() if tag.name != "a"]
            css = tag.get("style", "") + (tag.get_text() if tag.name == "style" else "")
            if tag.name == "img" and not tag.get("alt", "").strip():
                raise ProjectError(
                    f"{self.place}: an image without alt text; show figures with src.plotting.show(fig, alt), "
                    "images as ![alt text](file)"
                )
            if (
                tag.name in _ALONE
                or _LOADING_CSS.search(css)
                or not all(s.startswith(("data:", "#")) for s in sources)
            ):
                raise ProjectError(
                    f"{self.place}: {str(tag)[:100]!r} needs a script, a file or a network; embed its content"
                )
            self.ids.add(tag.get("id"))
            if tag.name == "a" and tag.get("href", "").startswith("#"):
                self.links.append((self.place, tag["href"][1:]))
        return fragment

    def heading(self, text, level, **attrs):
        # One h1, and no level left out on the way down, whatever the author wrote: the headings form an outline.
        self.level = level = min(max(level + self.shift, 2 if self.level else 1), self.level + 1)
        slug = self.prefix + (_slug(html.unescape(striptags(text))) or "section")
        taken = {anchor for _, anchor, _ in self.headings}
        anchor = next(
            name
            for n in range(len(taken) + 1)
            if (name := f"{slug}-{n}" if n else slug) not in taken
        )
        self.headings.append((level, anchor, re.sub(r"</?a\b[^>]*>", "", text)))
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'

    def link(self, text, url, title=None):
        if not _SCHEME.match(url):
            path, _, fragment = unquote(url).partition("#")
            name, fragment = PurePosixPath(path), _slug(fragment)
            if not path:
                url = f"#{self.prefix}{fragment}"
            elif name.suffix == ".ipynb":
                url = f"{name.stem}.html" + f"#{fragment}" * bool(fragment)
            elif name.suffix == ".md" and name.name[0].isdigit():  # a part of the theory
                page = "" if self.kind == "theory" else f"{self.home}/reports/theory.html"
                url = f"{page}#{name.stem}" + f"-{fragment}" * bool(fragment)
            else:
                url = posixpath.normpath(f"{self.home}/{self.kind}/{url}")
        return super().link(text, url, title)

    def image(self, text, url, title=None):
        if not _SCHEME.match(url):
            places = (folder / unquote(url) for folder in (self.folder, ROOT / self.kind))
            path = next(filter(Path.is_file, places), None)
            if path is None:
                raise ProjectError(f"{self.place}: the image {url} does not exist")
            url = _data_uri(mimetypes.guess_type(path.name)[0], path.read_bytes())
        caption = f' title="{html.escape(title)}"' if title else ""
        return f'<img src="{html.escape(url)}" alt="{html.escape(html.unescape(striptags(text)))}"{caption}>'

    def block_code(self, code, info=None):
        language = (info or "text").split()[0]
        return self.block_math(code.strip()) if language == "math" else _code(code, language)

    def table(self, text):
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def inline_math(self, text, display=False):
        try:
            return mathml(text, display)
        except Exception as error:  # whatever the converter stumbles over is the formula's fault
            reason = str(error) or type(error).__name__
            raise ProjectError(
                f"{self.place}: the formula {text!r} cannot be converted: {reason}"
            ) from error

    def block_math(self, text):
        return f'<span class="formula">{self.inline_math(text, display=True)}</span>\n'

    def output(self, output) -> str:
        """Renders one output of a code cell, in its richest readable form."""
        if output.output_type == "stream":
            text = html.escape(_last_state(output.text))
            return f'<pre class="{output.name}">{text}</pre>\n' if text else ""
        if output.output_type == "error":
            summary, trace = (
                html.escape(strip_ansi(text))
                for text in (f"{output.ename}: {output.evalue}", "\n".join(output.traceback))
            )
            return f'<div class="error"><p><strong>Error.</strong> {summary}</p>\n<pre>{trace}</pre></div>\n'
        kind = next((mime for mime in _RICHEST if mime in output.data), None)
        data, about = output.data.get(kind, ""), output.metadata.get(kind, {})
        if kind == "text/html":
            return self.checked(f'<div class="scroll">{data}</div>\n')
        if kind == "text/markdown":
            return f'<div class="prose measured">{self.prose(data)}</div>\n'
        if kind in ("text/plain", None):
            return f"<pre>{html.escape(strip_ansi(data))}</pre>\n" if data else ""
        url = _data_uri(kind, data.encode() if kind == "image/svg+xml" else base64.b64decode(data))
        return self.checked(
            f'<p class="figure"><img src="{url}" alt="{html.escape(about.get("alt", ""))}"></p>\n'
        )

    def write(self, title: str, body: str, *sources: Path) -> None:
        for place, target in self.links:
            if target not in self.ids:
                raise ProjectError(f"{place}: a link to #{target}, but no heading has this anchor")
        toc = render_toc_ul([heading for heading in self.headings if heading[0] in (2, 3)])
        nav = f'<nav aria-label="Contents">\n<p>Contents</p>\n{toc}</nav>\n' if toc else ""
        # Names the files this page was made from, so that a page older than its notebook can be told.
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        page = _PAGE.format(
            title=html.escape(title),
            source=digest,
            style=_style(),
            kind=self.kind,
            nav=nav,
            body=body,
        )
        _write(self.out, page.encode())


def _style() -> str:
    """The style sheet: `page.css`, then Pygments' colours for light (also paper) and dark."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    for media, style in (
        ("print, (prefers-color-scheme: light)", "xcode"),
        ("screen and (prefers-color-scheme: dark)", "one-dark"),
    ):
        rules = HtmlFormatter(style=style).get_style_defs(".code").splitlines()
        rules = [re.sub(r"\s*/\*.*?\*/", "", rule) for rule in rules if rule.startswith(".code .")]
        css += f"@media {media} {{\n" + "\n".join(rules) + "\n}\n"
    return css


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise ProjectError(
            f"cannot write {path}: {error.strerror}; free the disk or choose another folder"
        ) from error


def notebook_to_html(path: Path, out: Path) -> None:
    """Writes an executed notebook as one HTML file that opens with the network off; the same notebook, the same bytes.

    Args:
        path: The notebook; images in its Markdown are looked up from its folder.
        out: The file to write; its folder is made where missing.

    Raises:
        ProjectError: The notebook cannot be read or the file not written; or, naming notebook and cell, a formula cannot be
            converted, an image has no alt text or does not exist, an output needs a network, a link leads nowhere.
    """
    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (
        Exception
    ) as error:  # nbformat raises what its JSON, its schema and the file system raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProjectError(f"{path} is not a readable notebook: {reason}") from error
    page, body = _Page("notebooks", path.resolve().parent, out), ""
    for number, cell in enumerate(notebook.cells, 1):
        page.place = f"{path.name}, cell {number}"
        if cell.cell_type == "markdown":
            body += f'<div class="prose">\n{page.prose(cell.source)}</div>\n'
        elif cell.cell_type == "code" and cell.source.strip():
            tag = (
                ' <span class="tag">definitions</span>'
                if "define" in cell.metadata.get("tags", [])
                else ""
            )
            outputs = "".join(map(page.output, _merged(cell.outputs)))
            body += (
                f'<div class="cell">\n<p class="label">In [{cell.execution_count or " "}]{tag}</p>\n'
                f'{_code(cell.source, "ipython3")}<div class="outputs">\n{outputs}</div></div>\n'
            )
    if not page.headings:
        body = f"{page.heading(html.escape(path.stem), 1)}{body}"
    page.write(html.unescape(striptags(page.headings[0][2])), body, path)


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
    page, body = _Page("theory", files[0].resolve().parent, out, level=1), "<h1>Theory</h1>\n"
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


def run_chromium(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a headless Chromium (or Chrome) on local files, without its background traffic; text output captured.

    Raises:
        ProjectError: None is installed, or it fails.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise ProjectError(
            "no Chromium or Chrome is installed: apt-get install chromium (macOS: brew install --cask chromium)"
        )
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars"
    ).split()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser,
            *(f"--{flag}" for flag in flags),
            f"--user-data-dir={profile}",
            *arguments,
        ]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProjectError(f"{browser} failed: {error}") from error


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
        _write(folder / pdf.name, re.sub(rb"\(D:\d{14}", b"(D:20000101000000", pdf.read_bytes()))
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
            _write(folder / image.name, image.read_bytes())
    return [folder / image.name for image in drawn]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.html", description="HTML of notebooks and theory"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, names in (
        ("notebook", notebook_to_html, ("path", "out")),
        ("theory", theory_to_html, ("out",)),
        ("images", theory_images, ("folder",)),
    ):
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        for argument in names:
            command.add_argument(argument, type=Path)
    options = vars(parser.parse_args(arguments))
    del options["command"]
    try:
        options.pop("function")(**options)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
