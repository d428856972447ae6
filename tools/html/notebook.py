"""An executed notebook as one page: its text, its code, what its cells showed."""

import base64
import html
import re
from pathlib import Path

import nbformat
from mistune.util import striptags
from nbconvert.filters import strip_ansi

from src import ProjectError
from tools.html.page import Page, code_block, data_uri

_RICHEST = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")


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


def _output(page: Page, output) -> str:
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
        return page.checked(f'<div class="scroll">{data}</div>\n')
    if kind == "text/markdown":
        return f'<div class="prose measured">{page.prose(data)}</div>\n'
    if kind in ("text/plain", None):
        return f"<pre>{html.escape(strip_ansi(data))}</pre>\n" if data else ""
    url = data_uri(kind, data.encode() if kind == "image/svg+xml" else base64.b64decode(data))
    return page.checked(
        f'<p class="figure"><img src="{url}" alt="{html.escape(about.get("alt", ""))}"></p>\n'
    )


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
    page, body = Page("notebooks", path.resolve().parent, out), ""
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
            outputs = "".join(_output(page, output) for output in _merged(cell.outputs))
            body += (
                f'<div class="cell">\n<p class="label">In [{cell.execution_count or " "}]{tag}</p>\n'
                f'{code_block(cell.source, "ipython3")}<div class="outputs">\n{outputs}</div></div>\n'
            )
    if not page.headings:
        body = f"{page.heading(html.escape(path.stem), 1)}{body}"
    page.write(html.unescape(striptags(page.headings[0][2])), body, path)
