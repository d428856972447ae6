"""What every page has: Markdown, an outline, links, and the check that it stands alone."""

import base64
import hashlib
import html
import mimetypes
import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import bs4
import mistune
from mistune.toc import render_toc_ul
from mistune.util import striptags
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from src import ROOT, ProjectError
from src.files import write_whole
from tools.html.mathml import math_plugin, mathml

UNDESCRIBED = "a picture without description"  # where a picture has no alt text
_ALONE = {"script", "iframe", "frame", "object", "embed", "link", "base", "meta", "form"}
_REQUESTING = {"src", "srcset", "data", "poster", "background", "href", "xlink:href"}
_LOADING_CSS = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.I)
_SCHEME = re.compile(r"[a-z][a-z+.-]*:|//", re.I)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_IN_ONE_LINE = r'<span class="tex">\g<0></span>'
_TYPOGRAPHY = {  # what is replaced in a page, by what
    r'[(\[]*<math [^>]*"inline">.*?</math>[^\s<]*': _IN_ONE_LINE,  # a formula, its punctuation
    r"\b[A-Z]-[A-Z]\w+(?![^<]*>)": _IN_ONE_LINE,  # a name such as U-Net
    r"(?<=\d) ([×→]) (?=\d)": "\u00a0\\1\u00a0",  # a size
    r"<p>(<img [^>]*>)</p>\s*<p><em>(Figure .+?)</em></p>": (  # an image, its caption below
        r"<figure>\1<figcaption><p>\2</p></figcaption></figure>"
    ),
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="source-sha256" content="{source}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; font-src data:; media-src data:;
 style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<style>
{style}</style></head>
<body class="{kind}">
{nav}<main>
{body}</main></body></html>
"""


def digest(*sources: Path) -> str:
    """Name the state of the files that a page is made from; line endings do not count."""
    whole = b"".join(source.read_bytes().replace(b"\r\n", b"\n") for source in sources)
    return hashlib.sha256(whole).hexdigest()


def slug(text: str) -> str:
    """Form a heading's anchor as GitHub does; Jupyter's form (`#4.-The-loss`) gives the same."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def code_block(source: str, language: str) -> str:
    """Highlight source code; an unknown language is plain text."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    code = highlight(source, lexer, HtmlFormatter(nowrap=True)).rstrip()
    return f'<pre class="code"><code>{code}</code></pre>\n'


class Page(mistune.HTMLRenderer):
    """Render Markdown and HTML into one page, and keep its headings, anchors and links.

    Set before each piece: `place` (named in errors), `folder` and `attachments` (of its images),
    `prefix` (of its anchors).
    """

    def __init__(self, kind: str, folder: Path, out: Path, level: int = 0):
        super().__init__(escape=False, allow_harmful_protocols=("attachment:",))
        self.kind, self.folder, self.out = kind, folder, Path(out).resolve()
        self.level = self.shift = level
        inside = self.out.is_relative_to(ROOT)
        self.home = Path(os.path.relpath(ROOT, self.out.parent)).as_posix() if inside else ".."
        self.place, self.prefix, self.attachments = "", "", {}
        self.headings, self.ids, self.links = [], set(), []
        self.remarks = []  # what is shown, but not as it should be
        plugins = ["strikethrough", "table", "url", math_plugin]
        self.markdown = mistune.create_markdown(renderer=self, plugins=plugins)

    def prose(self, text: str) -> str:
        """Render Markdown; formulas with their punctuation, and sizes, stay in one line."""
        page = self.markdown(_UNPRINTABLE.sub("", text))
        for pattern, replacement in _TYPOGRAPHY.items():
            page = re.sub(pattern, replacement, page)
        return self.checked(page)

    def checked(self, fragment: str) -> str:
        """Embed the files that HTML names, point its links to pages, and close its tags.

        Raises:
            ProjectError: It would need a script, a missing file, a network or eyes.
        """
        soup = bs4.BeautifulSoup(fragment, "html.parser")
        for tag in soup.find_all(True):
            css = tag.get("style", "") + (tag.get_text() if tag.name == "style" else "")
            for name in _REQUESTING & tag.attrs.keys():
                if tag.name == "a":
                    tag[name] = self._target(tag[name])
                elif name in ("src", "poster"):
                    tag[name] = self._embedded(tag[name])
            sources = [tag[name] for name in _REQUESTING & tag.attrs.keys() if tag.name != "a"]
            loads = not all(source.startswith(("data:", "#")) for source in sources)
            if tag.name in _ALONE or loads or _LOADING_CSS.search(css):
                raise ProjectError(
                    f"{self.place}: {str(tag)[:100]!r} needs a script, a file or a network; "
                    "embed its content"
                )
            if tag.name == "img" and "alt" not in tag.attrs:  # as people write HTML
                tag["alt"] = UNDESCRIBED
                self.remarks.append('a picture without alt text; write <img alt="what it shows">')
            elif tag.name == "img" and not tag["alt"].strip():
                raise ProjectError(
                    f"{self.place}: an image without alt text; show figures with run.show, images "
                    "as ![alt text](file)"
                )
            self.ids.add(tag.get("id"))
        return str(soup)

    def _embedded(self, url: str) -> str:
        """Turn an attachment or a local file into a data URI."""
        if url.startswith("attachment:"):
            forms = self.attachments.get(unquote(url.removeprefix("attachment:")), {})
            if not forms:
                raise ProjectError(f"{self.place}: the cell has no attachment {url[11:]!r}")
            mime, data = next(iter(forms.items()))
            return f"data:{mime};base64,{''.join(data.split())}"
        if _SCHEME.match(url):
            return url
        places = (folder / unquote(url) for folder in (self.folder, ROOT / self.kind))
        path = next(filter(Path.is_file, places), None)
        if path is None:
            raise ProjectError(f"{self.place}: the image {url} does not exist")
        mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return data_uri(mime, path.read_bytes())

    def _target(self, url: str) -> str:
        """Point a link to the page that shows a notebook or a part of the theory."""
        if _SCHEME.match(url):
            return url
        path, _, fragment = unquote(url).partition("#")
        name, fragment = PurePosixPath(path), slug(fragment)
        if not path:
            self.links.append((self.place, f"{self.prefix}{fragment}"))
            return f"#{self.prefix}{fragment}"
        if name.suffix == ".ipynb":
            return f"{name.stem}.html" + f"#{fragment}" * bool(fragment)
        if re.fullmatch(r"(\d.*|SOURCES)\.md", name.name):  # a part of the theory
            anchor = name.stem + f"-{fragment}" * bool(fragment)
            if self.kind == "theory":
                self.links.append((self.place, anchor))
                return f"#{anchor}"
            return f"{self.home}/reports/theory.html#{anchor}"
        return posixpath.normpath(f"{self.home}/{self.kind}/{url}")

    def heading(self, text, level, **attrs):
        # One h1, and no level left out on the way down: the headings form an outline.
        self.level = min(max(level + self.shift, 2 if self.level else 1), self.level + 1)
        name = self.prefix + (slug(html.unescape(striptags(text))) or "section")
        taken, anchor, n = {anchor for _, anchor, _ in self.headings}, name, 0
        while anchor in taken:
            n += 1
            anchor = f"{name}-{n}"
        self.headings.append((self.level, anchor, re.sub(r"</?a\b[^>]*>", "", text)))
        return f'<h{self.level} id="{anchor}">{text}</h{self.level}>\n'

    def block_code(self, code, info=None):
        language = (info or "text").split()[0]
        return self.block_math(code.strip()) if language == "math" else code_block(code, language)

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

    def write(self, title: str, body: str, *sources: Path) -> None:
        """Write the page, with the digest of its sources, by which an outdated page can be told."""
        for place, target in self.links:
            if target not in self.ids:
                raise ProjectError(f"{place}: a link to #{target}, but no heading has this anchor")
        toc = render_toc_ul([heading for heading in self.headings if heading[0] in (2, 3)])
        nav = f'<nav aria-label="Contents">\n<p>Contents</p>\n{toc}</nav>\n' if toc else ""
        parts = {"title": html.escape(title), "source": digest(*sources), "style": _style()}
        page = _PAGE.format(**parts, kind=self.kind, nav=nav, body=body)
        write_whole(self.out, _UNPRINTABLE.sub("", page).encode())


def _style() -> str:
    """Read `page.css`, add the formulas' font and Pygments' colours for light (paper) and dark."""
    folder = Path(__file__).parent
    font = data_uri("font/woff2", (folder / "font" / "math.woff2").read_bytes())
    css = f'@font-face {{ font-family: "Coursework Math"; src: url({font}); }}\n'
    css += (folder / "page.css").read_text(encoding="utf-8")
    for media, style in (
        ("print, (prefers-color-scheme: light)", "xcode"),
        ("screen and (prefers-color-scheme: dark)", "one-dark"),
    ):
        rules = HtmlFormatter(style=style).get_style_defs(".code").splitlines()
        rules = [re.sub(r"\s*/\*.*?\*/", "", rule) for rule in rules if rule.startswith(".code .")]
        css += f"@media {media} {{\n" + "\n".join(rules) + "\n}\n"
    return css
