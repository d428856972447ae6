"""What every page has: Markdown, formulas, anchors and links, and the checks that it stands alone."""

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
from tools.html.mathml import mathml

# GitHub's rules: no space inside the dollars; a formula may run over a line's end; $$…$$ may stand alone or in a line.
_TEX = r"(?:[^$\\]|\\[\s\S])+?"
_BLOCK_MATH = rf"^ {{0,3}}\$\$(?P<block_tex>{_TEX})\$\$[ \t]*(?:\n|$)"
_INLINE_MATH = (
    rf"\$\$(?P<display_tex>{_TEX})\$\$|\$`(?P<quoted_tex>[^`]+)`\$"
    rf"|\$(?![\s$])(?P<inline_tex>{_TEX})(?<!\s)\$(?!\d)"
)
_STRAY_MATH = r"\$|\\begin\{"
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


def data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def code_block(source: str, language: str) -> str:
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f'<pre class="code"><code>{highlight(source, lexer, HtmlFormatter(nowrap=True)).rstrip()}</code></pre>\n'


class Page(mistune.HTMLRenderer):
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
            url = data_uri(mimetypes.guess_type(path.name)[0], path.read_bytes())
        caption = f' title="{html.escape(title)}"' if title else ""
        return f'<img src="{html.escape(url)}" alt="{html.escape(html.unescape(striptags(text)))}"{caption}>'

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
        write_whole(self.out, page.encode())


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


def write_whole(path: Path, data: bytes) -> None:
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
