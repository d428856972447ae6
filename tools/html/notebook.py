"""An executed notebook as one page: its text, its code, and what its cells showed."""

import base64
import html
import re
from pathlib import Path

from mistune.util import striptags

from src import ProjectError
from tools import notebooks
from tools.html.page import UNDESCRIBED, Page, code_block, data_uri

_RICHEST = (
    *("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "image/gif"),
    *("image/webp", "text/latex", "text/plain"),
)
_CONTROL = re.compile(  # links and titles of a terminal, its colours, single characters
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\|$)|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f]"
)
_OBJECT = re.compile(r"<[^<>\n]*>\Z")  # what Python prints of an object that has a richer form


def notebook_to_html(path: Path, out: Path) -> list[str]:
    """Write an executed notebook as one HTML file that opens with the network off.

    Args:
        path: The notebook; images in its Markdown are looked up from its folder.
        out: The file to write; its folder is made where missing.

    Returns:
        One line, naming notebook and cell, for every output that the page could not show as it is:
        without alt text, in need of a script or a network. The page says so in its place.

    Raises:
        ProjectError: The notebook cannot be read or the file not written; or, naming notebook and
            cell, its text holds a formula that cannot be converted, an image without alt text
            (`![](file)`) or file, a link that leads nowhere.
    """
    path = Path(path)
    notebook = notebooks.read_file(path)
    page, body, left_out = Page("notebooks", path.resolve().parent, out), "", []
    for number, cell in enumerate(notebook.cells, 1):
        page.place, page.attachments = f"{path.name}, cell {number}", cell.get("attachments", {})
        page.remarks = []
        if cell.cell_type == "markdown":
            body += f'<div class="prose">\n{page.prose(cell.source)}</div>\n'
            left_out += [f"{page.place}: {remark}" for remark in page.remarks]
        elif cell.cell_type == "code" and cell.source.strip():
            body += f'<div class="cell">\n{_code(cell)}{_outputs(page, cell, left_out)}</div>\n'
    if not page.headings:
        body = f"{page.heading(html.escape(path.stem), 1)}{body}"
    page.write(html.unescape(striptags(page.headings[0][2])), body, path)
    return left_out


def _code(cell) -> str:
    """Show a cell's code under its label; folded where its author hides it."""
    label = f"In [{cell.execution_count or ' '}]"
    if "define" in cell.metadata.get("tags", []):
        label += ' <span class="tag">definitions</span>'
    code = code_block(cell.source, "ipython3")
    if notebooks.is_folded(cell):
        lines = len(cell.source.splitlines())
        summary = f'<summary class="label">{label} <span>{lines} lines of code</span></summary>'
        return f'<details class="folded">{summary}\n{code}</details>\n'
    return f'<p class="label">{label}</p>\n{code}'


def _outputs(page: Page, cell, left_out: list[str]) -> str:
    """Show what a cell printed and displayed; a picture with the caption that follows it."""
    shown = []
    for output in _merged(cell.outputs):
        text = output.get("data", {}).get("text/markdown", "")
        part = _output(page, output, left_out)
        if text.startswith("**Figure ") and shown and shown[-1].startswith('<p class="figure">'):
            picture = shown.pop().strip().removeprefix('<p class="figure">').removesuffix("</p>")
            part = f"<figure>{picture}\n<figcaption>{page.prose(text)}</figcaption></figure>\n"
        shown.append(part)
    return f'<div class="outputs">\n{"".join(shown)}</div>\n'


def _output(page: Page, output, left_out: list[str]) -> str:
    """Render one output in the richest form that the page can show; else say that it is missing."""
    if output.output_type == "stream":
        text = html.escape(last_state(output.text))
        return f'<pre class="{output.name}">{text}</pre>\n' if text else ""
    if output.output_type == "error":
        summary = html.escape(last_state(f"{output.ename}: {output.evalue}"))
        trace = html.escape(last_state("\n".join(output.traceback)))
        title = f"<p><strong>Error.</strong> {summary}</p>"
        return f'<div class="error">{title}\n<pre>{trace}</pre></div>\n'
    shown, reasons = "", []
    for mime in filter(output.data.__contains__, _RICHEST):
        page.remarks = []
        try:
            shown = _form(page, mime, output)
        except ProjectError as error:
            reasons.append(str(error).removeprefix(f"{page.place}: "))
        if shown:
            if mime.startswith("image/") and not _alt(output, mime):
                reasons.append("a picture without alt text; show figures with run.show")
            reasons += page.remarks
            break
    else:
        if not reasons and any(output.data.values()):
            reasons.append(f"a page cannot show {', '.join(output.data)}")
        if source := output.data.get("text/markdown") or output.data.get("text/latex"):
            shown = f"<pre>{html.escape(source)}</pre>\n"
    if not reasons:
        return shown
    left_out.append(f"{page.place}: {reasons[0]}")
    return f'<p class="omitted">Not shown as it is: {html.escape(reasons[0])}</p>\n{shown}'


def _alt(output, mime: str) -> str:
    about = output.metadata.get(mime, {})
    return str(about.get("alt", "")).strip() if isinstance(about, dict) else ""


def _form(page: Page, mime: str, output) -> str:
    """Render one form of an output; empty where it says nothing."""
    data = output.data[mime]
    if mime == "text/html":
        return page.checked(f'<div class="scroll">{data}</div>\n')
    if mime == "text/markdown":
        voice = " measured" * (output.metadata.get("voice") == "measured")
        return f'<div class="prose{voice}">{page.prose(data)}</div>\n'
    if mime == "text/latex":
        tex = data if "$" in data else f"$${data}$$"
        return f'<div class="prose">{page.prose(tex.strip())}</div>\n'
    if mime == "text/plain":
        text = last_state(data)
        empty = not text or (len(output.data) > 1 and _OBJECT.match(text))
        return "" if empty else f"<pre>{html.escape(text)}</pre>\n"
    try:
        raw = data.encode() if mime == "image/svg+xml" else base64.b64decode(data)
    except ValueError:  # so is what base64 raises
        raise ProjectError(f"{page.place}: a broken picture") from None
    alt = html.escape(_alt(output, mime) or UNDESCRIBED)
    return page.checked(f'<p class="figure"><img src="{data_uri(mime, raw)}" alt="{alt}"></p>\n')


def last_state(text: str) -> str:
    """Give what a terminal shows at the end.

    A carriage return overwrites the line, so that a progress bar keeps its last state; a backspace
    takes one character back, as in Jupyter; colours and other control characters go.
    """
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in _CONTROL.sub("", text).split("\n")]
    return "\n".join(_typed(line).rstrip() for line in lines).strip("\n")


def _typed(line: str) -> str:
    """Let every backspace take the character before it back."""
    first, *others = line.split("\b")
    for part in others:
        first = first[:-1] + part
    return first


def _merged(outputs: list) -> list:
    """Join the pieces of a stream: print where it follows itself, progress bars over the cell."""
    merged = []
    for output in outputs:
        earlier = merged if output.get("name") == "stderr" else merged[-1:]
        same = [one for one in earlier if one.get("name", "") == output.get("name")]
        if same:
            same[0].text += output.text
        else:
            merged.append(output)
    return merged
